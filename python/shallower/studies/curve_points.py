"""The points of a curve on one model that is loaded, each measured once."""

from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import (
    CacheError,
    ModelError,
    OutputError,
    PatchError,
    ScanError,
    ShallowerError,
    TextsError,
    one_sentence,
)
from ..forecasts.gain import GAIN_DEVICE, gain
from ..judgement.criteria import criteria
from ..judgement.criterion import Criterion, has_costs
from ..judgement.stored_costs import stored_choice, stored_costs
from ..judgement.trials import ResultStore, judge_inputs
from ..progress import stage
from ..scanning.model import scan
from ..scanning.scan import Scan
from ..storage import write_file
from ..values.curve import SCANNED, Curve, CurvePoint
from ..values.files import PARTIAL_FILE, SCAN_FILE
from ..values.hashing import hash_of
from ..values.identity import title_of
from ..values.layers import deepest_block, layer_count
from ..values.plan import Gone, Plan
from ..values.recipe import Recipe
from ..values.settings import STATES, CurveSettings, State
from .measuring import Measurable, Measured, Measuring
from .study import WHOLE, Part, Study
from .tasks import StudyTasks


class CurvePoints:
    """The points of a curve on one loaded model; ``write`` gets those known so far.

    ``is_complete`` is false where a failure, as for want of memory, may not recur.
    """

    def __init__(
        self,
        study: Study[CurveSettings],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tasks: StudyTasks,
        recipe: Recipe | None,
        write: Callable[[Curve], None],
    ) -> None:
        self._study, self._settings, self._recipe = study, study.settings, recipe
        self._tasks, self._write = tasks, write
        self._store: ResultStore = study.model_store(study.model)
        self._measuring = Measuring(
            study,
            model,
            tokenizer,
            store=self._store,
            scanned=lambda: self._scan,
            tasks=tasks,
            recipe=recipe,
        )
        self._decoder = self._measuring.decoder
        self._plans: dict[tuple[str, int], Plan | str] = {}
        self._time_shares: dict[Gone, float | None] = {}
        self.is_complete = True

    def curve(self) -> Curve:
        """Measure point by point; what is known is written before each next one."""
        settings = self._settings
        with stage("measure the whole model"):
            found = [self._measured(None, "whole", "cut")]
        self._write(self._joined(found))
        if self._study.model.waits_on_disk:
            with stage("judge all cuts together"):
                self._judge_together()
        for state, n, strategy in product(settings.states, settings.n, settings.strategies):
            if state == settings.states[0]:
                with stage(f"choose {layer_count(n)} by {strategy}", f"choose by {strategy}"):
                    self._plan(strategy, n)
            with stage(f"{strategy}, n = {n}, {state}", f"measure {state}"):
                found.append(self._point(strategy, n, state))
            self._write(self._joined(found))
        return self._joined(found)

    def _judge_together(self) -> None:
        """Judge all cuts at once, which read each layer from disk for all of them."""
        settings = self._settings
        found = [self._plan(name, n) for n in settings.n for name in settings.strategies]
        plans = [plan for plan in found if isinstance(plan, Plan)]
        quick = settings.quick_patch and "patched" in settings.states
        self._measuring.judge_together(plans, self._measuring.patched if quick else None)

    def _joined(self, found: Sequence[CurvePoint]) -> Curve:
        """What is known so far, by size, strategy and state."""
        places = {name: place for place, name in enumerate(self._settings.strategies)}
        whole, *cuts = found
        cuts.sort(key=lambda one: (one.n, places[one.strategy], STATES.index(one.state)))
        split, measuring = self._study.split, self._measuring
        counts = {"fit": len(split.fit), "choose": len(split.choose)}
        return Curve(
            title_of(str(self._study.model)),
            len(self._decoder),
            (whole, *cuts),
            {**counts, "report": measuring.judge.num_items},
            self._decoder.identity.dtype,
            measuring.tokens.max_length,
            self._tasks.versions,
            self._described(),
        )

    def _described(self) -> dict[str, Any]:
        """The settings that are shown beside the figures."""
        settings = self._settings
        return {
            "n": list(settings.n),
            "strategies": list(settings.strategies),
            "states": list(settings.states),
            "patch": settings.patch,
            "patch_tokens": settings.patch_tokens if settings.patch == "full" else None,
            "heal": self._recipe and asdict(self._recipe),
            "tasks": self._tasks.to_json(),
            "top": settings.top,
            "seed": settings.seed,
            "parameters": self._measuring.num_parameters,
        }

    def _point(self, strategy: str, n: int, state: State) -> CurvePoint:
        """One point; what cannot be chosen, patched or measured says so in ``failed``."""
        plan = self._plan(strategy, n)
        found = CurvePoint(n, strategy, state, (), n / len(self._decoder), 0.0, None)
        if isinstance(plan, str):
            return replace(found, failed=plan)
        try:
            return self._measured(plan, strategy, state)
        except (CacheError, OutputError):
            raise
        except Exception as error:
            share = self._measuring.parameters_share(plan)
            failed = self._sentence_of(error)
            return replace(found, dropped=plan.dropped, parameters_share=share, failed=failed)

    def _measured(self, plan: Plan | None, strategy: str, state: State) -> CurvePoint:
        measured, dropped = self._measure(plan, state), plan.dropped if plan else ()
        return CurvePoint(
            len(dropped),
            strategy,
            state,
            dropped,
            len(dropped) / len(self._decoder),
            self._measuring.parameters_share(plan),
            measured.loss,
            measured.tasks,
            measured.seconds,
            time_share=self._time_share(plan),
            speech=measured.speech,
        )

    def _measure(self, plan: Plan | None, state: State) -> Measured:
        return self._measuring.measure(plan, self._measurable(state))

    def _measurable(self, state: State) -> Measurable:
        return "quick" if state == "patched" and self._settings.quick_patch else state

    def make(self, part: Part[CurveSettings]) -> None:
        """Measure a part of a curve into the store; what cannot be is left out."""
        if part.what == WHOLE:
            self._measure(None, "cut")
        for n, strategy in product(part.settings.n, part.settings.strategies):
            plan = self._plan(strategy, n)
            if isinstance(plan, str):
                continue
            for state in part.settings.states:
                with suppress(PatchError, ModelError, TextsError):
                    self._measure(plan, state)

    def _sentence_of(self, error: Exception) -> str:
        """An error in one line; one that another time may not happen is remembered."""
        short = isinstance(error.__cause__, torch.OutOfMemoryError)
        if short or not isinstance(error, ShallowerError):
            self.is_complete = False
        return one_sentence(error)

    def _time_share(self, plan: Plan | None) -> float | None:
        """The share of a token's time that is saved; None where no config can tell it."""
        if plan is None:
            return 0.0
        if plan.gone not in self._time_shares:
            try:
                found = gain(self._measuring.model, plan, device=GAIN_DEVICE).on(GAIN_DEVICE)
                self._time_shares[plan.gone] = 1 - found.decode_ratio
            except ModelError:
                self._time_shares[plan.gone] = None
        return self._time_shares[plan.gone]

    # The layers that a strategy would drop.
    def _plan(self, strategy: str, n: int) -> Plan | str:
        """The layers that a strategy drops; a sentence where it cannot choose."""
        key = strategy, n
        if key not in self._plans:
            known = self._study.known_choice(strategy, n)
            if known is not None:
                if strategy in SCANNED:
                    self._recall_scan()
                self._plans[key] = self._measuring.plan(known)
                return self._plans[key]
            try:
                self._plans[key] = plan = self._chosen(strategy, n)
                self._study.keep_choice(strategy, n, plan)
            except (CacheError, OutputError):
                raise
            except Exception as error:
                why = self._sentence_of(error)
                self._plans[key] = f"{strategy} cannot choose {layer_count(n)}: {why}"
        return self._plans[key]

    def _chosen(self, strategy: str, n: int) -> Plan:
        num_layers = len(self._decoder)
        if strategy == "deepest":
            return Plan(num_layers, (deepest_block(num_layers, n),), "deepest")
        if strategy == "similarity":
            return self._scan.plan(n)
        if strategy == "best_plan":
            return self._scan.best_plan(n, n)
        if strategy == "recommended":
            return self._measuring.plans.verify(n).plan
        return self._by(criteria[strategy], n)

    def _by(self, criterion: Criterion, n: int) -> Plan:
        """The choice of a criterion, which looks at the texts that proposals are verified on."""
        verifier = self._measuring.plans.verifier
        subject = verifier.subject
        inputs = {
            "criterion": criterion.name,
            "fitted": verifier.texts,
            "num_texts": subject.num_texts,
            "seed": subject.seed,
            **judge_inputs(subject.trials.judge),
        }
        if has_costs(criterion):
            stored_costs(criterion, subject, self._store, inputs=inputs)
        return stored_choice(criterion, subject, n, store=self._store, inputs=inputs)[0]

    @cached_property
    def _scan(self) -> Scan:
        """The comparison of all layers on the calibration texts, as it lies in the folder."""
        study, measuring = self._study, self._measuring
        place, partial = study.folder / SCAN_FILE, study.folder / PARTIAL_FILE
        if self._recall_scan() or (study.goes_on and place.exists()):
            return Scan.load(place)
        of_model = study.of_models[str(study.model)]
        try:
            scanned = scan(
                replace(self._decoder, files=None if of_model is None else hash_of(of_model)),
                measuring.tokenizer,
                measuring.split.fit,
                max_length=measuring.tokens.max_length,
                batch_size=measuring.tokens.batch_size,
                threads=study.settings.threads,
                checkpoint=partial,
                progress=study.progress,
            )
        except ScanError:
            if not partial.exists():
                raise
            partial.unlink()  # of another study, or of other weights
            return self._scan
        scanned.save(place)
        partial.unlink(missing_ok=True)
        content = b64encode(place.read_bytes()).decode()
        self._store.put("scan", self._scanned_on, {"content": content})
        return scanned

    def _recall_scan(self) -> bool:
        """Put the scan that was made before into the folder, unless it is there; False if none."""
        known, place = self._store.get("scan", self._scanned_on), self._study.folder / SCAN_FILE
        if known is not None and not place.exists():
            write_file(place, b64decode(known["content"]))
        return known is not None

    @property
    def _scanned_on(self) -> dict[str, Any]:
        """What the scan depends on beside the model."""
        measuring = self._measuring
        return {"fitted": measuring.plans.fitted, "batch_size": measuring.tokens.batch_size}
