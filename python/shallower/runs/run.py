"""The whole way: scan, measure every size, save the largest cut, heal it."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, OutputError, RecipeError, ShallowerError
from ..models.source import ModelSource
from ..processes import refuse_several
from ..reporting.figures import HEAT_MAP_FILE
from ..storage import check_free, write_file
from ..texts.sequences import ReadOnce
from ..texts.sources import Texts
from ..values.files import (
    CHECKPOINT_FOLDER,
    HEALED_FOLDER,
    PARTIAL_FILE,
    PLAN_FILE,
    RESULTS_FILE,
    SCAN_FILE,
)
from ..values.healing import Healing
from ..values.layers import check_sizes
from ..values.loss import Comparison, Loss
from ..values.plan import Plan
from ..values.recipe import Recipe
from ..values.tokens import BatchSize, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..scanning.scan import Scan

RUN_FILES = (CHECKPOINT_FOLDER, SCAN_FILE, PLAN_FILE, HEAT_MAP_FILE, RESULTS_FILE)
"""What a run leaves, but for the healed model."""

PROMPT = "The most important thing about a good plan is"


@dataclass(frozen=True, slots=True)
class Run:
    """The results of a run, and where they are.

    Attributes:
        scan: the comparison of all layers.
        comparison: the held-out losses of the whole model and of every cut that was measured.
        plan: the layers that the saved cut is without.
        difference: the greatest absolute difference between the logits of the saved cut, reloaded
            by stock transformers, and those of the model with its layers skipped. NaN until it is
            known, which is null in JSON.
        before: the whole model's greedy continuation of the prompt.
        after: that of the cut.
        out: the folder of the run.
        healing: the record of the healing, if the cut was healed.
    """

    scan: "Scan"
    comparison: Comparison
    plan: Plan
    difference: float
    before: str
    after: str
    out: Path
    healing: Healing | None = None

    @property
    def losses(self) -> tuple[Loss, Loss]:
        """The held-out losses of the whole model and of the saved cut."""
        saved = next(cut for cut in self.comparison.cuts if cut.block == self.plan.blocks[0])
        return self.comparison.base, saved.loss

    def to_json(self) -> dict[str, Any]:
        """Give the run as plain JSON values.

        Returns:
            What is in ``results.json``; ``healing`` only if the cut was healed.
        """
        values = {
            "format": "shallower.run",
            "version": 1,
            "num_layers": self.scan.num_layers,
            "num_samples": self.scan.num_samples,
            "num_rejected": self.scan.num_rejected,
            "dtype": self.scan.model and self.scan.model.dtype,
            **self.comparison.to_json(),
            "plan": self.plan.to_json(),
            "max_logits_difference": None if math.isnan(self.difference) else self.difference,
            "continuation": {"before": self.before, "after": self.after},
        }
        return values if self.healing is None else {**values, "healing": self.healing.to_json()}

    @classmethod
    def load(cls, out: str | Path) -> "Run":
        """Read a run from its folder.

        Args:
            out: the folder.

        Returns:
            The run; its losses are not known by text.

        Raises:
            OutputError: ``results.json`` is not there, or is damaged.
            ScanError, ModelError: the scan or the healing is.
        """
        from ..scanning.scan import Scan

        out = Path(out)
        try:
            values = json.loads((out / RESULTS_FILE).read_bytes())
            comparison = Comparison.from_json(values)
            plan = Plan.from_json(values["plan"])
            difference, continued = values["max_logits_difference"], values["continuation"]
            before, after = str(continued["before"]), str(continued["after"])
        except (OSError, ValueError, KeyError, TypeError, ShallowerError) as error:
            message = f"{out / RESULTS_FILE} is not of a run, or is damaged: {error}"
            raise OutputError(message) from error
        healing = Healing.load(out / HEALED_FOLDER) if "healing" in values else None
        scanned = Scan.load(out / SCAN_FILE)
        difference = math.nan if difference is None else float(difference)
        return cls(scanned, comparison, plan, difference, before, after, out, healing)

    def save(self) -> None:
        """Write ``results.json`` into the folder of the run.

        Raises:
            OutputError: the folder cannot be written to.
        """
        content = json.dumps(self.to_json(), indent=2) + "\n"
        write_file(self.out / RESULTS_FILE, content.encode())


def run(
    model: "PreTrainedModel | ModelSource",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    texts: Iterable[str] = (),
    *,
    eval_texts: Iterable[str],
    out: str | Path,
    sizes: Sequence[int] = (1, 2, 4, 8),
    max_length: int = 256,
    batch_size: BatchSize = "auto",
    threads: int | None = None,
    prompt: str = PROMPT,
    heal: bool | Recipe = False,
    heal_steps: int | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    total: int | None = None,
    report: Callable[[Run], None] | None = None,
) -> Run:
    """Scan a model, measure every block size, save the largest cut, and heal it if asked to.

    Leaves in ``out``: ``scan.safetensors``, ``shallower_plan.json``, ``results.json`` and
    ``checkpoint/``, which is reloaded with stock transformers and compared; with ``heal`` also
    ``healed/``, patched and trained by :func:`shallower.heal` on the same texts. Where no patch
    helps, or the texts are too few for one, the cut is healed alone, with a warning. An
    interrupted scan goes on where it was. ``results.json`` is there before the checkpoint is
    compared, and before the healing. The model is as before afterwards.

    Args:
        model: a causal language model of transformers, or the source that it is loaded from.
        tokenizer: its tokenizer; a source has its own.
        texts: calibration texts, any iterable of strings, read once. With ``heal`` they are kept
            in memory.
        eval_texts: held-out texts to measure losses on, read once.
        out: the folder to write to.
        sizes: block sizes to measure; the largest is saved.
        max_length: tokens of a text at most; a healing has its own, by its recipe.
        batch_size: texts in one forward; ``auto`` is as many as the device has memory for, on a
            CPU 8 at most.
        threads: threads of the Rust core, all by default.
        prompt: a text for the models to continue.
        heal: patch and heal the largest cut: True, or the settings. True trains in the dtype of
            the model, float16 in bfloat16.
        heal_steps: steps of the healing, of 16 sequences each; 5,000 by default.
        overwrite: replace what is in ``out``, once the new is complete.
        progress: bars with ETA on standard error; by default if that is a terminal.
        total: how many texts there are, for the ETA, where ``texts`` does not tell.
        report: hears the results before a healing starts, which may take days.

    Returns:
        The results, which are in ``results.json`` too.

    Raises:
        OutputError: ``out`` holds a run already, or cannot be written to.
        LayersError: a size that the model cannot lose.
        RecipeError: ``heal_steps`` without ``heal``, or settings that do not fit.
        TextsError: no texts, or too few; no text to measure a loss on.
        StatesError: no text could be compared.
        ModelError: the model cannot be loaded, or the saved cut is another model; then
            ``results.json`` holds all that is known.
        MissingExtraError: ``heal`` without peft.
        ProcessesError: this is one of several processes, as torchrun starts them.

    Example:
        >>> done = sh.run(
        ...     model, tokenizer, texts, eval_texts=held_out, out="runs/tiny", sizes=[2, 4]
        ... )
        >>> len(done.plan.dropped), done.difference < 1e-4
        (4, True)
    """
    out = Path(out)
    check_run(
        model, texts, eval_texts, out=out, sizes=sizes, heal=heal, heal_steps=heal_steps,
        overwrite=overwrite,
    )  # fmt: skip
    from ..evaluation.loss import require_predictable

    original, trust_remote_code = _origin(model)
    if isinstance(model, ModelSource):
        model, tokenizer = model.load()
    if tokenizer is None:
        raise ModelError("a model in memory needs its tokenizer: give both, or a ModelSource")
    eval_texts, tokens = list(eval_texts), Tokens(max_length, batch_size)
    require_predictable(tokenizer, eval_texts, max_length)
    stage = None
    if heal:
        from .healing_stage import HealingStage, choose_recipe

        texts = ReadOnce(texts)
        recipe = heal if isinstance(heal, Recipe) else choose_recipe(model, heal_steps)
        stage = HealingStage(
            out, recipe, texts, eval_texts, original, trust_remote_code, overwrite, progress
        )
        stage.check(model, tokenizer)
    done = _scan_and_cut(
        model, tokenizer, texts, eval_texts=eval_texts, out=out, sizes=sizes, tokens=tokens,
        threads=threads, prompt=prompt, overwrite=overwrite, progress=progress, total=total,
    )  # fmt: skip
    if report is not None:
        report(done)
    if stage is not None:
        stage.patch(model, tokenizer, done.plan, measured=done.losses, tokens=tokens)
        del model  # nothing needs it any more, and the training needs its memory
        done = replace(done, healing=stage.heal())
        done.save()
    return done


def check_run(
    model: "PreTrainedModel | ModelSource",
    texts: Iterable[str] = (),
    eval_texts: Iterable[str] = (),
    *,
    out: str | Path,
    sizes: Sequence[int],
    heal: bool | Recipe = False,
    heal_steps: int | None = None,
    overwrite: bool = False,
) -> None:
    """Refuse what :func:`run` would refuse, before anything is loaded.

    Args:
        model: as for :func:`run`; of a source the config is read, last of all.
        texts: as for :func:`run`; of files the first text is read.
        eval_texts: as for :func:`run`; of files the first text is read.
        out: the folder to write to.
        sizes: block sizes to measure.
        heal: as for :func:`run`.
        heal_steps: as for :func:`run`.
        overwrite: replace what is in ``out``.

    Raises:
        OutputError, LayersError, RecipeError, TextsError, ModelError, MissingExtraError,
            ProcessesError: as :func:`run`.
    """
    refuse_several("runs are")
    out = Path(out)
    if heal_steps is not None and heal is not True:
        raise RecipeError(
            "heal_steps without heal=True (--heal-steps without --heal): healing is asked for by "
            "heal, and settings of your own have their own steps"
        )
    for name in (RESULTS_FILE, CHECKPOINT_FOLDER, *([HEALED_FOLDER] if heal else [])):
        check_free(out / name, overwrite)
    for source in (texts, eval_texts):
        if isinstance(source, Texts):
            source.check()
    if isinstance(heal, Recipe):
        # A teacher is loaded by its name, which a model in memory need not have.
        heal.check(original=isinstance(model, ModelSource))
    if heal:
        from ..healing.checks import require_peft

        require_peft()
    check_sizes(sizes, _num_layers(model))


def _num_layers(model: "PreTrainedModel | ModelSource") -> int:
    if isinstance(model, ModelSource):
        return model.count_layers()
    from ..models.architecture import find_layers

    return len(find_layers(model))


def _origin(model: "PreTrainedModel | ModelSource") -> tuple[str, bool]:
    """The name of a model, and whether its own code may be run."""
    if isinstance(model, ModelSource):
        return str(model), model.trust_remote_code
    return str(model.name_or_path) or type(model).__name__, False


def _scan_and_cut(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: Iterable[str],
    *,
    eval_texts: list[str],
    out: Path,
    sizes: Sequence[int],
    tokens: Tokens,
    threads: int | None,
    prompt: str,
    overwrite: bool,
    progress: bool | None,
    total: int | None,
) -> Run:
    """The run without a healing, saved; an interrupted scan goes on where it was."""
    from ..cutting.memory import without_layers
    from ..cutting.saving import save_model
    from ..judgement.compare import compare_cuts
    from ..scanning.model import scan

    options: dict[str, Any] = {
        "max_length": tokens.max_length,
        "batch_size": tokens.batch_size,
        "progress": progress,
    }
    partial, path = out / PARTIAL_FILE, out / CHECKPOINT_FOLDER
    if overwrite:
        partial.unlink(missing_ok=True)
    scanned = scan(
        model, tokenizer, texts, threads=threads, checkpoint=partial, total=total, **options
    )
    scanned.save(out / SCAN_FILE)
    comparison = compare_cuts(model, tokenizer, scanned, texts=eval_texts, sizes=sizes, **options)
    plan = scanned.plan(max(sizes))
    plan.save(out / PLAN_FILE)
    before = continue_text(model, tokenizer, prompt)
    done = Run(scanned, comparison, plan, math.nan, before, "", out)
    with without_layers(model, plan.blocks):
        save_model(model, tokenizer, path, plan=plan, overwrite=overwrite, losses=done.losses)
        after = continue_text(model, tokenizer, prompt)
    done = replace(done, after=after)
    done.save()
    partial.unlink(missing_ok=True)
    done = replace(done, difference=_verify(model, tokenizer, done, max(eval_texts, key=len)))
    done.save()
    return done


def _verify(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", done: Run, text: str
) -> float:
    """Compare the saved cut with the model; a failure says that the results are there."""
    from ..cutting.saving import verify_checkpoint

    path = done.out / CHECKPOINT_FOLDER
    try:
        return verify_checkpoint(model, tokenizer, path, layers=done.plan.blocks, text=text)
    except ModelError as error:
        raise ModelError(f"{error}; all else is in {done.out / RESULTS_FILE}") from error


def continue_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    *,
    num_tokens: int = 24,
) -> str:
    """Continue a text greedily, whatever the model's own settings prefer.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: the text to continue.
        num_tokens: tokens to add at most.

    Returns:
        The prompt and its continuation.
    """
    import torch

    from ..models.decoder import Decoder

    encoded = tokenizer(prompt, return_tensors="pt").to(Decoder.of(model).device)
    generate: Any = model.generate
    with torch.inference_mode():
        output = generate(**encoded, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
