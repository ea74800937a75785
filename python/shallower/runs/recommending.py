"""Recommending: the stages of a run on one model that is loaded, from its scan to a checkpoint."""

import json
import math
import warnings
from dataclasses import replace
from functools import cached_property

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.in_model import without_layers
from ..cutting.saving import save_model, verify_checkpoint
from ..errors import ModelError, PatchError, PlanError, TextsError
from ..evaluation.loss import fitting_tokens
from ..judgement.choosing_size import SizeChoice, sizes_beside
from ..judgement.held_out_cuts import HeldOutCuts, Store, loss_as_it_is
from ..judgement.judges.judge import judged_batches
from ..judgement.judges.loss import LossJudge
from ..memory.sizes import num_parameters
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..patching.patch import CPU_TOKENS, with_patch
from ..patching.saving import save_patched
from ..progress import track
from ..reporting.results import Continuations, Run, weights_mark
from ..savings.timing import own_device
from ..scanning.model import scan
from ..scanning.scan import Scan
from ..storage import write_file
from ..values.files import (
    CHECKPOINT_FOLDER,
    GAIN_FILE,
    PARTIAL_FILE,
    PLAN_FILE,
    RESULTS_FILE,
    SCAN_FILE,
)
from ..values.loss import Loss
from ..values.patch import Patch
from ..values.plan import Plan
from ..values.recommendation import Recommended
from .asked import Asked
from .continuing import continue_text
from .gain import GAIN_DEVICE, gain
from .sizes import Sizes

SCAN_TEXTS = 256
"""Texts by which layers are compared, at most: errors of distances are small long before those
of losses.
"""

PATCH_TOKENS = 196_608
"""Tokens that the patch that is saved fits, at most: as many as its steps take."""

CPU_WORK = 3e13
"""Tokens times parameters that a CPU patches in some ten minutes."""


class Recommending:
    """A run on one model; results are written before each next step.

    Args:
        model: the whole model, which is as before afterwards.
        tokenizer: its tokenizer.
        asked: what is asked for.
        store: what was measured before, and where results are kept as they are found.

    Raises:
        TextsError: no text that reports has two tokens.
        ModelError: the layers of the model cannot be run one by one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        asked: Asked,
        store: Store,
    ) -> None:
        self._model, self._tokenizer, self._asked, self._store = model, tokenizer, asked, store
        self._decoder = Decoder.of(model)
        self._tokens = fitting_tokens(self._decoder, asked.tokens)
        report = asked.splits.report
        self._judge = judge = LossJudge(judged_batches(tokenizer, report, self._tokens))
        self._num_rejected = len(report) - judge.num_items
        layerwise = Layerwise(self._decoder)
        layerwise.check(judge.batches[0])
        self._referee = HeldOutCuts(
            layerwise, judge, judge, store=store, texts=asked.identities[1],
            num_rejected=self._num_rejected,
        )  # fmt: skip

    def run(self, earlier: Run | None = None) -> Run:
        """Do all stages but a healing.

        Args:
            earlier: the results of the same job, as far as it came when it was cut short.

        Returns:
            The results; they are written into ``results.json`` before each next step.

        Raises:
            PlanError: no cut does what is asked for.
            ModelError: the saved checkpoint is another model, or a loss is not finite.
            StatesError, OutputError, CacheError, LayersError: as :func:`run`.
        """
        self._sizes.require_possible()
        if earlier is not None:
            self._scan = earlier.scan
        results = self._begun()
        if earlier is None:
            results.save()
        (self._asked.out / PARTIAL_FILE).unlink(missing_ok=True)  # only now it is not needed
        try:
            choice, sizes = self._sizes.choose()
        except PlanError:
            self._withdraw()
            raise
        if earlier is not None and self._is_intact(earlier):
            results = earlier
        else:
            if self._asked.target.max_loss is None:
                found = self._recommended(results, choice)
                assert found is not None
            else:
                found = self._within(results, choice)
            results = found
            results.save()
        return self._with_table(results, sizes)

    def _withdraw(self) -> None:
        """Take back what was written: no cut does what is asked for, another target may follow."""
        for name in (PLAN_FILE, GAIN_FILE, RESULTS_FILE, SCAN_FILE):
            (self._asked.out / name).unlink(missing_ok=True)

    def _begun(self) -> Run:
        """The results when nothing but the scan is known."""
        asked = self._asked
        splits, whole = asked.splits, self._referee.loss(self._referee.losses.scores(()))
        texts = {"fit": len(splits.fit), "choose": len(splits.choose), "report": whole.num_texts}
        marks = {"job": asked.job}
        return Run(
            asked.out, asked.target, self._scan, whole, texts, command=asked.command, marks=marks
        )

    def _is_intact(self, earlier: Run) -> bool:
        """Whether the recommended cut of an earlier run of this job is where it was saved."""
        mark = earlier.marks.get("checkpoint")
        return mark is not None and mark == weights_mark(self._asked.out / CHECKPOINT_FOLDER)

    @cached_property
    def _scan(self) -> Scan:
        """The comparison of all layers, as it lies in the folder."""
        asked, out = self._asked, self._asked.out
        partial = out / PARTIAL_FILE
        scanned = scan(
            self._model, self._tokenizer, asked.splits.fit[:SCAN_TEXTS],
            max_length=self._tokens.max_length,
            batch_size=self._tokens.batch_size, threads=asked.threads, checkpoint=partial,
            keep_samples=True, progress=asked.progress,
        )  # fmt: skip
        scanned.save(out / SCAN_FILE)
        return scanned

    @cached_property
    def _sizes(self) -> Sizes:
        return Sizes(
            self._decoder, self._tokenizer, self._asked, scanned=lambda: self._scan,
            referee=self._referee, tokens=self._tokens, store=self._store,
        )  # fmt: skip

    def _within(self, results: Run, choice: SizeChoice) -> Run:
        """The most layers whose patched cut loses no more than is asked for, saved.

        A quick patch leaves more of the loss than the one that is saved: so larger sizes are tried
        if their losses, less by as much as that of ``choice`` was, fit.
        """
        n = choice.n
        while (found := self._recommended(results, replace(choice, n=n))) is None:
            if n == 1:
                self._withdraw()
                raise PlanError(
                    f"no cut loses at most {self._asked.target.max_loss:g} nats a token: the best "
                    f"of a single layer loses {self._kept} after the patch, on the texts that "
                    f"choose; ask for more (max_loss, --max-loss)"
                )
            n -= 1
        larger = self._larger(n)
        for size in range(larger, n, -1):
            deeper = self._recommended(results, replace(choice, n=size))
            if deeper is not None:
                return deeper
        if larger > n:  # what was saved is still there
            self._tell_of(self._sizes.verify(n).plan)
        return found

    def _larger(self, n: int) -> int:
        """The most layers that are expected to lose no more than is asked for, after a patch."""
        most = self._asked.target.max_loss
        assert most is not None
        quick = self._sizes.lost(n).mean
        share = min(1.0, max(0.0, self._kept.mean / quick)) if quick > 0 else 1.0
        while n + 1 < len(self._decoder) and share * self._sizes.lost(n + 1).mean <= most:
            n += 1
        return n

    def _recommended(self, results: Run, choice: SizeChoice) -> Run | None:
        """Patch the verified plan of a size and save it; None if it loses more than is asked."""
        verified, losses = self._sizes.verify(choice.n), self._referee.losses
        plan = verified.plan
        self._tell_of(plan)
        cut = losses.scores(plan.dropped)
        told = [self._continued(Continuations(text, ""), "whole") for text in self._asked.prompts]
        with without_layers(self._model, plan.blocks):
            told = [self._continued(one, "cut") for one in told]
        block = self._scan.best_block(choice.n)
        worse = None if set(block.layers) == set(plan.dropped) else losses.scores(block.layers)
        recommended = Recommended(
            verified, choice.reason, results.whole, self._referee.loss(cut), patched=None,
            healed=None, by_distance=None if worse is None else worse.minus(cut),
            layers_share=choice.n / len(self._decoder),
            parameters_share=self._sizes.share(plan.dropped),
            max_loss=self._asked.target.max_loss,
        )  # fmt: skip
        results = replace(results, recommended=recommended, continuations=tuple(told))
        results.save()
        try:
            with with_patch(
                self._model, self._tokenizer, plan, texts=self._asked.splits.fit,
                max_length=self._tokens.max_length, progress=self._asked.progress,
                num_tokens=patch_tokens(self._decoder),
            ) as done:  # fmt: skip
                return self._saved(results, plan, done)
        except (PatchError, TextsError) as error:
            why = f"the cut is not patched: {error}"
            warnings.warn(why, stacklevel=2)
        recommended = replace(recommended, unpatched=why)
        with without_layers(self._model, plan.blocks):
            return self._saved(replace(results, recommended=recommended), plan, None)

    def _tell_of(self, plan: Plan) -> None:
        """Write the plan, and what its cut saves, for the page; not what no config can tell."""
        plan.save(self._asked.out / PLAN_FILE)
        place, target = self._asked.out / GAIN_FILE, self._asked.target
        device = GAIN_DEVICE if target.latency is None else target.device or own_device().name
        told = target.latency is not None or target.memory is not None
        try:
            found = gain(self._model, plan, device=device, context=target.context if told else None)
        except ModelError:
            place.unlink(missing_ok=True)
            return
        write_file(place, (json.dumps(found.to_json(), indent=1) + "\n").encode())

    def _saved(self, results: Run, plan: Plan, done: Patch | None) -> Run | None:
        """Save the model as it is now, and reload it by stock transformers."""
        if not self._is_wanted():
            return None
        folder, recommended = self._asked.out / CHECKPOINT_FOLDER, results.recommended
        assert recommended is not None
        if done is None:
            losses = results.whole, recommended.cut
            save_model(
                self._model, self._tokenizer, folder, plan=plan, overwrite=True, losses=losses
            )
        else:
            losses = results.whole, self._loss_on(self._judge, self._num_rejected)
            told = tuple(self._continued(one, "patched") for one in results.continuations)
            save_patched(
                self._model, self._tokenizer, folder, done=done, overwrite=True, losses=losses
            )
            recommended = replace(recommended, patched=losses[1])
            results = replace(results, recommended=recommended, continuations=told)
        results.save()
        text = max(self._asked.splits.report, key=len)
        try:
            difference = verify_checkpoint(
                self._model, self._tokenizer, folder, layers=None, text=text
            )
        except ModelError as error:
            all_else = self._asked.out / RESULTS_FILE
            raise ModelError(f"{error}; all else is in {all_else}") from error
        marks = {**results.marks, "checkpoint": weights_mark(folder)}
        return replace(results, difference=difference, marks=marks)

    def _is_wanted(self) -> bool:
        """Whether the model as it is now loses no more than is asked for, if that is asked for."""
        most = self._asked.target.max_loss
        if most is None:
            return True
        verifier = self._sizes.verifier
        judge = verifier.trials.judge
        assert isinstance(judge, LossJudge)
        now = self._loss_on(judge, 0).by_text
        assert now is not None
        self._kept = now.minus(verifier.scores((), after="none"))
        error = self._kept.stderr if math.isfinite(self._kept.stderr) else 0.0
        return self._kept.mean + error <= most

    def _loss_on(self, judge: LossJudge, num_rejected: int) -> Loss:
        """The loss of the model as it is now."""
        return loss_as_it_is(Layerwise(self._model), judge, num_rejected=num_rejected)

    def _continued(self, told: Continuations, name: str) -> Continuations:
        """Let the model as it is now continue a prompt."""
        text = continue_text(self._model, self._tokenizer, told.prompt)
        return replace(told, **{name: text})

    def _with_table(self, results: Run, sizes: set[int]) -> Run:
        """Measure every size of the table, that of the recommended cut first."""
        assert results.recommended is not None
        assert results.whole.by_text is not None
        n = len(results.recommended.plan.dropped)
        decided = {n, *sizes}
        sizes = decided | set(sizes_beside(n, len(self._decoder)))
        bar = track("what other sizes cost", len(sizes), self._asked.progress)
        with bar as advance:
            for size in sorted(sizes, key=lambda size: (size != n, size)):
                passing = size not in decided
                row = self._sizes.row(size, results.whole.by_text, in_passing=passing)
                others = (other for other in results.table if other.n != size)
                table = sorted([*others, row], key=lambda one: one.n)
                results = replace(results, table=tuple(table))
                results.save()
                advance(1)
        return results


def patch_tokens(decoder: Decoder) -> int:
    """Say how many tokens the patch of a run fits.

    Args:
        decoder: the whole model.

    Returns:
        ``PATCH_TOKENS``; on a CPU fewer for a model of more than some 150 million parameters, as
        many fewer as it is larger, but at least a sixth: as many as ``patch`` by default.
    """
    if decoder.device.type != "cpu":
        return PATCH_TOKENS
    affordable = int(CPU_WORK / num_parameters(decoder.model))
    return min(PATCH_TOKENS, max(CPU_TOKENS, affordable))
