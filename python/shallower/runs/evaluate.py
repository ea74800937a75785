"""The measures of a model and of a cut, each taken once."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..cutting.plans import agreed_plan
from ..errors import CacheError
from ..models.source import ModelSource
from ..values.identity import ModelIdentity
from ..values.layers import Block, ranges
from ..values.memory import MemoryPlan
from ..values.plan import Plan
from ..values.schema import from_fields
from ..values.tokens import Tokens
from .inputs import inputs_of
from .measures import Measure
from .store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Measured:
    """A result, the model that it was measured on, and when, in ISO 8601, if not just now."""

    value: Any
    model: ModelIdentity
    made: str | None = None


class ResultCache:
    """The results of one measure on one model, by the layers that it is without.

    Args:
        cache: where they are kept.
        measure: what was measured.
        inputs: all that they depend on beside the layers, or None.
    """

    def __init__(self, cache: Store, measure: Measure[Any], inputs: dict[str, Any] | None) -> None:
        self._cache, self._measure, self._inputs = cache, measure, inputs

    def get(self, dropped: Sequence[int]) -> Measured | None:
        """Look a result up.

        Args:
            dropped: the layers that the model is without.

        Returns:
            The result, or None.

        Raises:
            CacheError: its entry is damaged.
        """
        kind = self._measure.kind
        entry = self._cache.find(kind, self._of(dropped))
        if entry is None:
            return None
        try:
            identity = from_fields(ModelIdentity, entry.value["model"])
            return Measured(self._measure.read(entry.value), identity, entry.made)
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(f"an entry of the cache is no {kind}: {error}") from error

    def keep(self, dropped: Sequence[int], value: Any, model: ModelIdentity) -> Measured:
        """Keep a result that was just measured.

        Args:
            dropped: the layers that the model was without.
            value: of the model without them.
            model: the whole model.

        Returns:
            Both together.
        """
        record = {**self._measure.record(value), "model": asdict(model)}
        self._cache.put(self._measure.kind, self._of(dropped), record)
        return Measured(value, model)

    def _of(self, dropped: Sequence[int]) -> dict[str, Any] | None:
        return None if self._inputs is None else {**self._inputs, "dropped": list(dropped)}


Results = Mapping[str, Mapping[str, Measured]]
"""By the kind of a measure, ``base`` and, with layers, ``cut``."""


@dataclass(frozen=True, kw_only=True)
class EvalJob:
    """The measures of a model before and after a cut.

    Attributes:
        source: the model.
        measures: what it is measured by, of different kinds; at least one.
        layers: the plan or the blocks that are cut; None for none.
        device_memory: the memory that may be used, as ``16GB``; what is free by default.
        cache: where results are looked for and kept.
    """

    source: ModelSource
    measures: Sequence[Measure[Any]]
    layers: Plan | list[Block] | None = None
    device_memory: str | None = None
    cache: Store = field(default_factory=lambda: Store(None))

    @cached_property
    def results(self) -> dict[str, ResultCache]:
        """The results that are known, by the kind of their measure."""
        own = inputs_of(self.cache, {"model": self.source}, {}, device_memory=self.device_memory)
        found = {}
        for measure in self.measures:
            settings = None if own is None else measure.inputs(self.cache)
            known = None if settings is None else {**(own or {}), **settings}
            found[measure.kind] = ResultCache(self.cache, measure, known)
        return found

    @cached_property
    def whole(self) -> dict[str, Measured | None]:
        """The results of the whole model by kind, where they are known."""
        return {kind: known.get(()) for kind, known in self.results.items()}

    @cached_property
    def plan(self) -> Plan | None:
        """The plan of the cut, checked against the number of layers.

        Raises:
            LayersError, PlanError, ModelError: there is no such cut of the model.
        """
        if self.layers is None:
            return None
        known = next((one.model for one in self.whole.values() if one), None)
        count = self.source.count_layers() if known is None else known.num_layers
        plan = agreed_plan(str(self.source.path), count, self.layers)
        if known is not None:
            plan.check_model(known)
        return plan

    @property
    def tokens(self) -> Tokens:
        """The longest texts of all measures."""
        return max((one.tokens for one in self.measures), key=lambda tokens: tokens.max_length)

    def memory(self, source: ModelSource, tokens: Tokens | None = None) -> MemoryPlan:
        """Plan the memory of the evaluation.

        Args:
            source: the model, its dtype decided or not.
            tokens: of a measure; by default those of the longest texts.

        Raises:
            ModelError: its config cannot be read.
        """
        from .forecast import forecast_source

        return forecast_source(
            source, "eval", tokens or self.tokens, device_memory=self.device_memory
        )

    def known(self) -> Results | None:
        """Look for the results.

        Returns:
            The results; None if one must be measured.

        Raises:
            LayersError, PlanError, ModelError, CacheError: as :attr:`plan`, or a damaged entry.
        """
        plan, found = self.plan, {}
        for kind, known in self.results.items():
            sides = {"base": self.whole[kind]}
            if plan:
                sides["cut"] = known.get(plan.dropped)
            found[kind] = {side: one for side, one in sides.items() if one}
            if len(found[kind]) < len(sides):
                return None
        return found

    def prepare(self) -> None:
        """Find out what is wrong with the measures before a model is loaded.

        Raises:
            ShallowerError: as the measures say.
        """
        for measure in self.measures:
            measure.prepare()

    def measure(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, dict[str, Measured]]:
        """Measure what is not known.

        Args:
            model: as ``source`` loads it; it is as before afterwards.
            tokenizer: its tokenizer.

        Returns:
            As :meth:`known`.

        Raises:
            ShallowerError: as the measures say, or a plan for another model.
        """
        from ..cutting.in_model import without_layers
        from ..models.decoder import Decoder

        decoder, plan = Decoder.of(model), self.plan
        if plan:
            plan.check_model(decoder.identity)
        found = {}
        for one in self.measures:
            known = self.whole[one.kind]
            found[one.kind] = {"base": known or self._measured(one, (decoder, tokenizer), ())}
        if plan:
            with without_layers(model, plan.blocks):
                for one in self.measures:
                    known = self.results[one.kind].get(plan.dropped)
                    loaded = decoder, tokenizer
                    found[one.kind]["cut"] = known or self._measured(one, loaded, plan.dropped)
        return found

    def _measured(
        self, measure: Measure[Any], loaded: "tuple[Decoder, PreTrainedTokenizerBase]",
        dropped: Sequence[int],
    ) -> Measured:  # fmt: skip
        tokens = measure.tokens
        if self.device_memory is not None:
            planned = self.memory(self.source.resolved(), tokens)
            tokens = Tokens(tokens.max_length, planned.micro_batch)
        name = f" without {ranges(dropped)}" if dropped else ""
        value = measure.measure(*loaded, tokens=tokens, name=name)
        return self.results[measure.kind].keep(dropped, value, loaded[0].identity)
