"""The story of a run: which layers go, what that costs, how sure it is, and where it is from."""

import math
import shlex
from pathlib import Path

from ...cutting.checkpoint_files import count_weights
from ...errors import MetricError, ScanError
from ...models.dtypes import QUANTISED
from ...results.gain import Gain
from ...results.recommendation import Recommended
from ...results.scores import Estimate
from ...values.costs import NUM_RESAMPLES
from ...values.counts import counted
from ...values.estimates import splits_words
from ...values.files import (
    CHECKPOINT_FOLDER,
    CHECKPOINT_GGUF,
    HEALED_FOLDER,
    PLAN_FILE,
    RESULTS_FILE,
    SCAN_FILE,
)
from ...values.layers import drop_option
from ...values.provenance import command_line
from ..charts.run import healing_chart, race_charts, scan_charts
from ..results import Run
from ..story import MODELS, Fact, ModelState, Number, Section, Story, Strip, Table
from ..words import (
    again,
    came_back,
    capital,
    compared,
    dequantised,
    differs,
    few_texts,
    judge_words,
    layer_words,
    loss_fact,
    made_by,
    megabytes,
    out_of,
    perplexity_words,
    small_model,
)
from .evaluation import repeats_warning, speech_table
from .stages import (
    candidates_table,
    failed_proposals,
    gain_table,
    healing_table,
    losses_table,
    rejected,
    scan_table,
)

UNLIKE = 3.0
"""Standard errors from which on selection and test texts are called unlike."""

UNFINISHED = (
    "the run has not ended: these are the results so far; call shallower run again to resume"
)
"""The warning of a run that was interrupted, or is running."""

_SETS = {"losses": "", "out_of_domain": " out of domain"}
"""Where ``results.json`` has losses by state, and of which texts they are."""


def run_story(run: Run, *, gain: Gain | None = None, drawn: bool = True) -> Story:
    """Make the story of a run that has its recommendation; ``drawn`` with figures."""
    recommended = run.recommended
    assert recommended is not None
    return _RunStory(run, recommended, gain, drawn).story()


def choice_parts(run: Run) -> list[str | Table]:
    """Give what is known before a healing: scan, race and sizes, and what was left out."""
    best = run.recommended
    parts: list[str | Table] = [f"scan: {scan_table(run.scan).title}", *rejected(run.scan)]
    if best is not None:
        parts += [candidates_table(best.verified), *failed_proposals(best.verified)]
    return parts


def speech_section(run: Run) -> Section:
    """Show the generation of a run's models beside the whole one, by figures and by samples."""
    lines = ["Samples are of the likeliest tokens; the figures are of all prompts."]
    best = run.recommended
    speech = {name: run.speech[name] for name in MODELS if name in run.speech}
    if best is not None and best.state in speech and best.state != "whole":
        lost = speech[best.state].minus(speech["whole"])["loss_under_whole"]
        acceptance, departure = (
            speech[best.state].of("acceptance"),
            speech[best.state].of("departure"),
        )
        lines.insert(
            0,
            f"Of the whole model's own words the {best.state} model would accept "
            f"{100 * acceptance.mean:.0f} %, and depart after {departure.mean:.1f} tokens. The "
            f"whole model's loss on the {best.state} model's words is {compared(lost)} than on "
            f"its own{', a tie' if lost.tied else ''}.",
        )
    tables = (speech_table(speech),) if speech else ()
    return Section("How it speaks", tuple(lines), tables=tables, samples=run.continuations)


class _RunStory:
    """A run, and what is worked out once for several parts of its story."""

    def __init__(self, run: Run, recommended: Recommended, gain: Gain | None, drawn: bool) -> None:
        self._run, self._best, self._gain, self._drawn = run, recommended, gain, drawn
        self._name = run.scan.model.name if run.scan.model else "model"
        self._weights = None if run.checkpoint is None else count_weights(run.checkpoint)
        self._is_gguf = run.checkpoint is not None and run.checkpoint.suffix == ".gguf"
        self._shares: dict[int, float] | None = None
        if run.scan.keeps_samples and run.scan.num_sequences > 1:
            try:
                found = run.scan.bootstrap(NUM_RESAMPLES, metric="angular")
                self._shares = {n: one.probability for n, one in found.items()}
            except (MetricError, ScanError):
                pass

    def story(self) -> Story:
        run, best = self._run, self._best
        dropped, total = best.plan.dropped, run.scan.num_layers
        return Story(
            "run",
            f"{self._name} without {len(dropped)} of its {total} layers",
            best.sentence(),
            strips=(Strip("layers that go", total, dropped, layer_words(dropped)),),
            steps=self._steps(),
            cost=_cost(best),
            savings=self._savings(),
            warnings=tuple(self._warnings()),
            sections=tuple(self._sections()),
            data=run.to_json(),
        )

    def _steps(self) -> tuple[ModelState, ...]:
        best = self._best
        losses = [(name, loss) for name in MODELS if (loss := getattr(best, name)) is not None]
        most = max(loss.nats - best.whole.nats for _, loss in losses) or 1.0
        steps = []
        for name, loss in losses:
            lost = None if name == "whole" else loss.minus(best.whole)
            more = "" if lost is None else Number.estimate(lost, sign=True).text
            share = max(0.0, (loss.nats - best.whole.nats) / most)
            number = Number.of(loss.nats, loss.stderr)
            steps.append(ModelState(name, number, more, share, name == best.state))
        return tuple(steps)

    def _savings(self) -> tuple[Fact, ...]:
        best, place = self._best, f"{RESULTS_FILE}: recommended"
        total, n = self._run.scan.num_layers, len(best.plan.dropped)
        rows = [
            Fact("layers", f"{n} of {total} ({100 * best.layers_share:.0f} %)", f"{place}.dropped"),
            Fact("parameters", Number.share(best.parameters_share), f"{place}.parameters_share"),
        ]
        if (weights := self._weights) is not None:
            what = "size of" if self._is_gguf else "headers of the safetensors in"
            source = f"{what} {self._run.checkpoint.name}"  # type: ignore[union-attr]
            parameters, num_bytes = weights
            if parameters is not None:
                whole = _before_parameters(parameters, best)
                gone = whole - parameters
                share = Number.share(best.parameters_share).text
                text = f"{gone / 1e6:,.1f} of {whole / 1e6:,.1f} million ({share})"
                rows[-1] = Fact("parameters", Number(text, gone), source)
            words = megabytes(num_bytes)
            _, size = self._run.source or ("", math.inf)
            words += f", of {megabytes(int(size))}" if self._run.source else ""
            # What grew is no saving: warnings have it.
            rows += [Fact("weights on disk", words, source)] if num_bytes < size else []
        return tuple(rows)

    def _warnings(self) -> list[str]:
        best, run = self._best, self._run
        known = self._weights and self._weights[0]
        whole = None if not known else _before_parameters(known, best)
        found = [*run.warnings, *small_model(whole), *few_texts(best.whole.num_texts)]
        if "ended" not in run.marks:
            found.insert(0, UNFINISHED)
        if run.source and self._weights and not self._is_gguf:
            (name, size), left = run.source, self._weights[1]
            if name.endswith(".gguf"):
                found.append(dequantised(name, size, left, blocks=best.plan.blocks))
            elif left > size:
                found.append(
                    f"{name} has {megabytes(size)} of weights, and what is left has "
                    f"{megabytes(left)}, in another dtype (--dtype)"
                )
        n = len(best.plan.dropped)
        share = None if self._shares is None else self._shares.get(n)
        if share is not None and share < 0.5:
            found.append(
                f"the block of least distance is unstable: of {NUM_RESAMPLES:,} resamples of the "
                f"texts {100 * share:.0f} % find the same l*({n})"
            )
        chosen, tested = best.verified.candidates[0], self._tested
        judged = best.verified.judge == "loss" and not chosen.lost_early
        if tested is not None and judged and _apart(chosen.score, chosen.stderr, tested):
            found.append(
                f"the selection texts differ from the test texts: the loss of the same cut is "
                f"{chosen.score:.2f} nats a token on the selection texts, {tested.mean:.2f} on "
                f"the test texts; choose on texts as you will use the model for"
            )
        if best.state in run.speech and run.speech[best.state].repeats:
            found.append(repeats_warning(best.state, run.speech[best.state]))
        if run.scan.num_rejected:
            found.append(f"left out of the scan: {counted(run.scan.num_rejected, 'sample')}")
        return found

    @property
    def _tested(self) -> Estimate | None:
        """The loss on the test set of the recommended cut in the state that it was raced in."""
        best = self._best
        loss = best.patched if best.verified.after == "patch" else best.cut
        return None if loss is None else Estimate(loss.nats, loss.stderr)

    def _sections(self) -> list[Section]:
        sections = [self._sure(), self._costs()]
        if self._run.continuations:
            sections.append(speech_section(self._run))
        return [*sections, self._settings(), self._numbers(), self._again(), self._differs()]

    def _settings(self) -> Section:
        run, scan, verified = self._run, self._run.scan, self._best.verified
        texts = scan.texts[0] if scan.texts else None
        facts = [
            Fact("model", self._name, f"{SCAN_FILE}: model"),
            Fact("dtype", scan.model.dtype if scan.model else "not known", f"{SCAN_FILE}: model"),
            Fact("target", str(run.target), f"{RESULTS_FILE}: wish"),
            Fact("texts", splits_words(run.splits), f"{RESULTS_FILE}: splits"),
            Fact(
                "judge",
                judge_words(verified.judge, verified.unit),
                f"{RESULTS_FILE}: recommended.verified",
            ),
        ]
        if verified.judge == "speech":
            facts.append(
                Fact(
                    "selection prompts",
                    Number.count(verified.num_items),
                    f"{RESULTS_FILE}: recommended.verified",
                )
            )
        if texts is not None:
            facts.append(
                Fact("tokens of a text", f"at most {texts.max_length:,}", f"{SCAN_FILE}: texts")
            )
        if scan.positions is not None:
            facts.append(Fact("compared tokens", str(scan.positions), f"{SCAN_FILE}: positions"))
        lines = (
            f"{capital(self._best.reason)}.",
            "Calibration, selection and test set share no text: losses of the recommendation and "
            "of the sizes are of the test set, those of the race of the selection set.",
        )
        return Section("Settings", lines, tuple(facts))

    def _sure(self) -> Section:
        best, verified = self._best, self._best.verified
        lines = [f"{capital(verified.sentence())}."]
        if best.by_distance is not None:
            lines.append(
                f"The loss of the block of least angular distance is {compared(best.by_distance)} "
                f"than that of this plan, both as bare cuts on the test texts."
            )
        drawings = []
        if self._drawn:
            drawings += [*race_charts(verified), *scan_charts(self._run.scan, self._shares)]
        return Section(
            "What was cut, and how sure that is",
            tuple(lines),
            tables=(candidates_table(verified),),
            drawings=tuple(drawings),
        )

    def _costs(self) -> Section:
        run, gain, drawings = self._run, self._gain, []
        tables = [] if gain is None else [gain_table(gain)]
        tables += [losses_table(self._best.measured)]
        tables += [] if run.healing is None else [healing_table(run.healing)]
        if self._drawn:
            drawings += [healing_chart(run.healing)] if run.healing and run.healing.steps else []
        return Section("What it costs and gains", tables=tuple(tables), drawings=tuple(drawings))

    def _numbers(self) -> Section:
        best, run, scan = self._best, self._run, self._run.scan
        facts = [
            loss_fact(f"{name}{what}", loss, f"{RESULTS_FILE}: recommended.{key}.{name}")
            for losses, (key, what) in zip(best.measured.values(), _SETS.items(), strict=False)
            for name, loss in losses.items()
        ]
        paired = Number.estimate(best.difference, 4, sign=True)
        facts += [
            Fact("lost, nats a token", paired, f"{RESULTS_FILE}: recommended.lost, paired by text"),
            Fact(
                "layers run to choose",
                Number.count(best.verified.layer_forwards),
                f"{RESULTS_FILE}: recommended.layer_forwards; layers times texts",
            ),
            Fact("samples of the scan", Number.count(scan.num_samples), SCAN_FILE),
        ]
        if math.isfinite(run.difference):
            facts.append(
                Fact(
                    "logits after a reload differ by",
                    f"{run.difference:.2g} at most",
                    f"{RESULTS_FILE}: max_logits_difference; stock transformers",
                )
            )
        if scan.model is not None:
            facts.append(
                Fact(
                    "fingerprint of the model",
                    scan.model.fingerprint[:12],
                    f"{SCAN_FILE}; a hash of its norms and shape",
                )
            )
        facts += [
            Fact("texts of the scan", f"{texts.num_texts:,}, {texts.fingerprint[:12]}", SCAN_FILE)
            for texts in scan.texts
        ]
        facts += made_by(best.plan.versions, PLAN_FILE)
        of = counted(best.whole.num_texts, "text")
        line = f"Losses are of {of}; ± is one standard error, over texts."
        return Section("Every number, and where it is from", (line,), tuple(facts))

    def _again(self) -> Section:
        run = self._run
        folder = out_of(run.command, Path(run.out).resolve().name)
        model = shlex.split(run.loaded)
        drop = ["--drop", drop_option(self._best.plan.blocks)]
        whole = [word for word in model if word != "--stream"]  # a cut needs no layers in memory
        kept = ["--as-gguf"] if self._is_gguf else []
        new = command_line("run", *model, "--texts", "TEXTS", "--out", folder)
        commands = {
            "The run": run.command or new,
            "the bare cut alone": command_line("prune", *whole, *drop, *kept, "--out", "CUT"),
        }
        if run.evaluated:
            dtype = run.scan.model.dtype if run.scan.model else "auto"
            options = [*shlex.split(run.evaluated), "--dtype", dtype]
            commands["the losses of the whole model and the bare cut"] = command_line(
                "eval", *model, *drop, *options
            )
            # What is stored in 4 or 8 bits is loaded as it is.
            options = options[:-2] if dtype in QUANTISED else options
            options += [word for word in model if word in ("--trust-remote-code", "--stream")]
            cut = CHECKPOINT_GGUF if self._is_gguf else CHECKPOINT_FOLDER
            for name, loss in ((cut, run.checkpoint), (HEALED_FOLDER, run.healing)):
                if loss is not None:
                    what = "healed" if name == HEALED_FOLDER else "the loss of the checkpoint"
                    commands[what] = command_line("eval", f"{folder}/{name}", *options)
        commands["this page"] = command_line("report", folder)
        return again(f"{'; '.join(commands)}.", *commands.values())

    def _differs(self) -> Section:
        scan = self._run.scan
        length = scan.texts[0].max_length if scan.texts else None
        dtype = scan.model.dtype if scan.model else None
        return differs(length, dtype, self._best.plan.versions)


def _cost(best: Recommended) -> str:
    """Say the cost in words of perplexity, and the share of the lost nats that came back."""
    words = perplexity_words(best.whole, best.loss, best.difference)
    return words if best.state == "cut" else f"{words} {capital(came_back(best.shares))}."


def _apart(score: float, stderr: float, other: Estimate) -> bool:
    """Whether two unpaired figures differ by more than their errors allow."""
    error = math.hypot(stderr, other.stderr)
    return math.isfinite(error) and abs(score - other.mean) > UNLIKE * error


def _before_parameters(parameters: int, best: Recommended) -> int:
    return round(parameters / (1 - best.parameters_share))
