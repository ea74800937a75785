"""The points of a curve: one model, cut, patched and healed, on the texts that report."""

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.in_model import without_layers
from ..cutting.saving import save_model
from ..errors import (
    CacheError,
    LayersError,
    ModelError,
    OutputError,
    PatchError,
    PlanError,
    ShallowerError,
)
from ..evaluation.loss import fitting_tokens
from ..healing.heal import heal
from ..judgement.contest import one_sentence, parameter_shares
from ..judgement.held_out_cuts import HeldOutCuts, Store, loss_as_it_is
from ..judgement.judges.judge import judged_batches
from ..judgement.judges.loss import LossJudge
from ..memory.sizes import num_parameters
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..models.source import ModelSource
from ..patching.patch import with_patch
from ..values.curve import CurvePoint, State
from ..values.hashing import hash_of
from ..values.loss import Loss
from ..values.plan import Plan
from ..values.task_scores import TaskScores
from .curve_strategies import CurveStrategies
from .curve_terms import CurveTerms
from .gain import GAIN_DEVICE, gain

HEALING_FOLDER = ".healing"
"""What is being healed below the folder of a curve; it is gone when it is measured."""


class CurvePoints:
    """The measurements of one model that is loaded, each made once.

    Args:
        model: the whole model, which is as before afterwards.
        tokenizer: its tokenizer.
        terms: what is asked for.
        store: what was measured before, and where results are kept as they are found.
        earlier: points of this very curve that were measured before it was cut short.

    Attributes:
        tokens: length of texts, and how many make one forward.
        num_texts: texts that report and have two tokens.
        num_layers: L.
        dtype: of the weights.
        parameters: their number.
        is_complete: whether nothing failed that may go well another time, as for want of memory.

    Raises:
        TextsError: no text that reports has two tokens.
        ModelError: the layers of the model cannot be run one by one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        terms: CurveTerms,
        *,
        store: Store,
        earlier: Iterable[CurvePoint] = (),
    ) -> None:
        self._model, self._tokenizer, self._terms, self._store = model, tokenizer, terms, store
        self._decoder = Decoder.of(model)
        self.num_layers, self.dtype = len(self._decoder), self._decoder.identity.dtype
        self.parameters = num_parameters(model)
        self.tokens = fitting_tokens(self._decoder, terms.tokens)
        report = terms.splits.report
        self._judge = judge = LossJudge(judged_batches(tokenizer, report, self.tokens))
        self.num_texts, self._rejected = judge.num_items, len(report) - judge.num_items
        layerwise = Layerwise(self._decoder)
        layerwise.check(judge.batches[0])
        self._referee = HeldOutCuts(
            layerwise, judge, judge, store=store, texts=terms.identities[1],
            num_rejected=self._rejected,
        )  # fmt: skip
        known = [one for one in earlier if one.failed is None]
        self._measured = {(one.dropped, one.state): one for one in known}
        self._plans: dict[tuple[str, int], Plan | str] = {
            (one.strategy, one.n): Plan.of(len(self._decoder), one.dropped)
            for one in known
            if one.n
        }
        self._time_shares: dict[tuple[int, ...], float | None] = {}
        self.is_complete = True
        self._strategies = CurveStrategies(
            self._decoder, tokenizer, terms, referee=self._referee, tokens=self.tokens,
            store=store, goes_on=bool(known),
        )  # fmt: skip

    def whole(self) -> CurvePoint:
        """Measure the whole model.

        Returns:
            The first point of the curve.

        Raises:
            ModelError: a loss is not finite.
            TextsError: a task cannot be done.
        """
        return self._point((), "whole", "cut")

    def point(self, strategy: str, n: int, state: State) -> CurvePoint:
        """Measure the model without the layers that a strategy chooses.

        Args:
            strategy: its name.
            n: layers that go.
            state: how far the cut is made good.

        Returns:
            The point; what cannot be chosen, patched or measured says so in ``failed``.

        Raises:
            CacheError: what the cache holds is damaged.
            OutputError: the folder of the curve cannot be written to.
        """
        share = n / len(self._decoder)
        found = CurvePoint(n, strategy, state, (), share, 0.0, None)
        plan = self._plans.get((strategy, n))
        if plan is None:
            try:
                plan = self._strategies.plan(strategy, n)
            except (CacheError, OutputError):
                raise
            except Exception as error:
                self._note(error)
                plan = f"{strategy} cannot choose {n} layers: {one_sentence(error)}"
            self._plans[strategy, n] = plan
        if isinstance(plan, str):
            return replace(found, failed=plan)
        started = time.perf_counter()
        try:
            return self._point(plan.dropped, strategy, state)
        except (CacheError, OutputError):
            raise
        except Exception as error:
            self._note(error)
            return replace(
                found, dropped=plan.dropped, parameters_share=self._share(plan.dropped),
                seconds=time.perf_counter() - started, failed=one_sentence(error),
            )  # fmt: skip

    def _note(self, error: Exception) -> None:
        """Remember a failure that another time may not be one."""
        short = isinstance(error.__cause__, torch.OutOfMemoryError)
        if short or not isinstance(error, ShallowerError):
            self.is_complete = False

    def _share(self, dropped: tuple[int, ...]) -> float:
        return float(parameter_shares(self._decoder)[list(dropped)].sum())

    def _time_share(self, dropped: tuple[int, ...]) -> float | None:
        """The share of a token's time that is saved; None where no config can tell it."""
        if not dropped:
            return 0.0
        if dropped not in self._time_shares:
            try:
                found = gain(self._model, dropped, device=GAIN_DEVICE).on(GAIN_DEVICE)
                self._time_shares[dropped] = 1 - found.decode_ratio
            except ModelError:
                self._time_shares[dropped] = None
        return self._time_shares[dropped]

    def _point(self, dropped: tuple[int, ...], strategy: str, state: State) -> CurvePoint:
        """The point of a cut, whoever has chosen it; cuts that are alike are measured once."""
        key = dropped, state
        if key not in self._measured:
            inputs = self._inputs(dropped, state)
            known = inputs and self._store.get("curve_point", inputs)
            if known:
                self._measured[key] = _recalled(known)
            else:
                share = len(dropped) / len(self._decoder)
                started = time.perf_counter()
                done = CurvePoint(
                    len(dropped), strategy, state, dropped, share, self._share(dropped),
                    *self._measure(dropped, state), time.perf_counter() - started,
                    time_share=self._time_share(dropped),
                )  # fmt: skip
                self._measured[key] = done
                if inputs:
                    self._store.put("curve_point", inputs, done.to_record())
        return replace(self._measured[key], strategy=strategy)

    def _inputs(self, dropped: tuple[int, ...], state: State) -> dict[str, Any] | None:
        """All that a point depends on beside the model; None where that is not known."""
        terms, settings = self._terms, self._terms.settings
        if state == "healed":
            return None  # what is trained on is known by the curve alone
        made = {} if state == "cut" else {key: settings[key] for key in ("patch", "patch_tokens")}
        return {
            "dropped": list(dropped), "state": state, **made, "fitted": terms.identities[0],
            "items": terms.identities[1], "tasks": terms.tasks.identity,
            "seed": terms.seed,
        }  # fmt: skip

    def _measure(
        self, dropped: tuple[int, ...], state: State
    ) -> tuple[Loss, tuple[TaskScores, ...]]:
        """The loss and the tasks of a cut in one of its states."""
        tasks, plan = self._terms.tasks, self._plan_of(dropped) if dropped else None
        if state == "healed":
            assert plan is not None
            with self._healed(plan) as (model, tokenizer):
                return self._loss(model), tasks.scores(model, tokenizer)
        if state == "patched":
            assert plan is not None
            with self._patched(plan):
                return self._loss(self._model), tasks.scores(self._model, self._tokenizer)
        loss = self._referee.loss(self._referee.losses.scores(dropped))
        if plan is None or not tasks.names:
            return loss, tasks.scores(self._model, self._tokenizer)
        with without_layers(self._model, dropped):
            return loss, tasks.scores(self._model, self._tokenizer)

    def _plan_of(self, dropped: tuple[int, ...]) -> Plan:
        return replace(Plan.of(len(self._decoder), dropped), model=self._decoder.identity)

    def _loss(self, model: PreTrainedModel) -> Loss:
        """The loss of a model as it is now."""
        return loss_as_it_is(Layerwise(model), self._judge, num_rejected=self._rejected)

    @contextmanager
    def _patched(self, plan: Plan) -> Iterator[None]:
        """The model cut and patched for as long as the body runs."""
        if self._terms.quick_patch:
            quick = self._strategies.sizes.verifier.patch
            with quick.patched(plan), without_layers(self._model, plan.dropped):
                yield
            return
        with with_patch(
            self._model, self._tokenizer, plan, texts=self._terms.splits.fit,
            max_length=self.tokens.max_length, num_tokens=self._terms.patch_tokens,
            progress=False,
        ):  # fmt: skip
            yield

    @contextmanager
    def _healed(self, plan: Plan) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """The cut, patched where it can be, and trained on; its folder is gone afterwards."""
        terms, recipe = self._terms, self._terms.heal
        assert recipe is not None
        all_of_them = self._terms.out / HEALING_FOLDER
        folder = all_of_them / hash_of([terms.job, list(plan.dropped)])[:16]
        cut, healed = folder / "cut", folder / "healed"
        if terms.job is None:
            shutil.rmtree(folder, ignore_errors=True)  # nobody knows of what it is
        compares = recipe.distill or recipe.objective != "lm"
        if not healed.exists():
            if not cut.exists():
                self._save(plan, cut)
            heal(
                cut, terms.to_heal, healed, recipe=recipe, eval_texts=terms.splits.choose,
                original=terms.origin[0] if compares else None, merge=True,
                progress=False, trust_remote_code=terms.origin[1],
            )  # fmt: skip
        dtype: Any = self._decoder.identity.dtype
        yield ModelSource(healed, dtype).load()
        shutil.rmtree(folder, ignore_errors=True)
        if not any(all_of_them.iterdir()):
            all_of_them.rmdir()

    def _save(self, plan: Plan, path: Path) -> None:
        """Save the cut, patched where it can be."""
        try:
            with self._patched(plan):
                save_model(self._model, self._tokenizer, path, plan=plan)
        except PatchError:
            with without_layers(self._model, plan.dropped):
                save_model(self._model, self._tokenizer, path, plan=plan)


def _recalled(known: dict[str, Any]) -> CurvePoint:
    try:
        return CurvePoint.from_json(known)
    except (KeyError, TypeError, ValueError, LayersError, PlanError) as error:
        raise CacheError(
            f"a point of a curve in the cache is damaged ({error}): remove it (shallower cache "
            f"--clear), or measure anew (--no-cache)"
        ) from error
