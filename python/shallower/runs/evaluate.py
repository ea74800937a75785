"""The held-out losses of a model and of a cut, each measured once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..cutting.plans import agreed_plan
from ..errors import CacheError
from ..models.source import ModelSource
from ..values.identity import ModelIdentity
from ..values.layers import Block, ranges
from ..values.loss import Loss
from ..values.memory import MemoryPlan
from ..values.plan import Plan
from ..values.schema import from_fields
from ..values.tokens import Tokens
from .cache import Cache
from .cache_keys import inputs_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class MeasuredLoss:
    """A loss, the model that it was measured on, and when, in ISO 8601, if not just now."""

    loss: Loss
    model: ModelIdentity
    made: str | None = None


class LossCache:
    """The losses of one model on the same texts, by the layers that it is without.

    Args:
        cache: where they are kept.
        inputs: all else that they depend on, or None.
    """

    def __init__(self, cache: Cache, inputs: dict[str, Any] | None) -> None:
        self._cache, self._inputs = cache, inputs

    def get(self, dropped: Sequence[int]) -> MeasuredLoss | None:
        """Look a loss up.

        Args:
            dropped: the layers that the model is without.

        Returns:
            The loss, or None.

        Raises:
            CacheError: its entry is damaged.
        """
        entry = self._cache.find("loss", self._of(dropped))
        if entry is None:
            return None
        try:
            identity = from_fields(ModelIdentity, entry.value["model"])
            return MeasuredLoss(Loss.from_json(entry.value["loss"]), identity, entry.made)
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(f"an entry of the cache is no loss: {error}") from error

    def keep(self, dropped: Sequence[int], loss: Loss, model: ModelIdentity) -> MeasuredLoss:
        """Keep a loss that was just measured.

        Args:
            dropped: the layers that the model was without.
            loss: of the model without them.
            model: the whole model.

        Returns:
            Both together.
        """
        value = {"loss": loss.to_record(), "model": asdict(model)}
        self._cache.put("loss", self._of(dropped), value)
        return MeasuredLoss(loss, model)

    def _of(self, dropped: Sequence[int]) -> dict[str, Any] | None:
        return None if self._inputs is None else {**self._inputs, "dropped": list(dropped)}


@dataclass(frozen=True, kw_only=True)
class EvalJob:
    """The losses of a model before and after a cut.

    Attributes:
        source: the model.
        texts: held-out texts.
        layers: the plan or the blocks that are cut; None for none.
        tokens: how texts become batches.
        device_memory: the memory that may be used, as ``16GB``; what is free by default.
        cache: where losses are looked for and kept.
    """

    source: ModelSource
    texts: list[str]
    layers: Plan | list[Block] | None = None
    tokens: Tokens = field(default_factory=Tokens)
    device_memory: str | None = None
    cache: Cache = field(default_factory=lambda: Cache(None))

    @cached_property
    def losses(self) -> LossCache:
        """The losses that are known."""
        inputs = inputs_of(
            self.cache, {"model": self.source}, {"texts": self.texts},
            tokens=asdict(self.tokens), device_memory=self.device_memory,
        )  # fmt: skip
        return LossCache(self.cache, inputs)

    @cached_property
    def whole(self) -> MeasuredLoss | None:
        """The loss of the whole model, if it is known."""
        return self.losses.get(())

    @cached_property
    def plan(self) -> Plan | None:
        """The plan of the cut, checked against the number of layers.

        Raises:
            LayersError, PlanError, ModelError: there is no such cut of the model.
        """
        if self.layers is None:
            return None
        known = self.whole
        count = self.source.count_layers() if known is None else known.model.num_layers
        plan = agreed_plan(str(self.source.path), count, self.layers)
        if known is not None:
            plan.check_model(known.model)
        return plan

    def memory(self, source: ModelSource) -> MemoryPlan:
        """Plan the memory of the evaluation.

        Args:
            source: the model, its dtype decided or not.

        Raises:
            ModelError: its config cannot be read.
        """
        from .forecast import forecast_source

        return forecast_source(source, "eval", self.tokens, device_memory=self.device_memory)

    def known(self) -> dict[str, MeasuredLoss] | None:
        """Look for the losses.

        Returns:
            The losses ``base`` and, with layers, ``cut``; None if one must be measured.

        Raises:
            LayersError, PlanError, ModelError, CacheError: as :attr:`plan`, or a damaged entry.
        """
        plan, whole = self.plan, self.whole
        if whole is None or plan is None:
            return None if whole is None else {"base": whole}
        cut = self.losses.get(plan.dropped)
        return None if cut is None else {"base": whole, "cut": cut}

    def measure(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, MeasuredLoss]:
        """Measure the losses that are not known.

        Args:
            model: as ``source`` loads it; it is as before afterwards.
            tokenizer: its tokenizer.

        Returns:
            As :meth:`known`.

        Raises:
            TextsError, ModelError, PlanError: as :func:`shallower.evaluate_loss`, or a plan for
                another model.
        """
        from ..cutting.memory import without_layers
        from ..evaluation.loss import fitting_tokens, measure_loss
        from ..models.decoder import Decoder

        decoder, tokens, plan = Decoder.of(model), self.tokens, self.plan
        if self.device_memory is not None:
            micro_batch = self.memory(self.source.resolved()).micro_batch
            tokens = Tokens(tokens.max_length, micro_batch)
        tokens = fitting_tokens(decoder, tokens)
        if plan:
            plan.check_model(decoder.identity)

        def measure(dropped: Sequence[int], description: str) -> MeasuredLoss:
            loss = measure_loss(
                decoder, tokenizer, self.texts, tokens=tokens, description=description
            )
            return self.losses.keep(dropped, loss, decoder.identity)

        losses = {"base": self.whole or measure((), "loss")}
        if plan:
            with without_layers(model, plan.blocks):
                losses["cut"] = self.losses.get(plan.dropped) or measure(
                    plan.dropped, f"loss without {ranges(plan.dropped)}"
                )
        return losses
