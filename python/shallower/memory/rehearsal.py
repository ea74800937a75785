"""A step run on a model without weights, and the bytes that it would hold at its peak.

The real code runs on fake tensors, while a dispatch mode sees every storage come and go.
"""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import ModelError, why
from ..models.loading import loader_with_head

Step = TypeVar("Step")

EXPERTS = (None, "grouped_mm", "batched_mm")
"""Ways to run experts that are tried: the model's own, then those without loops over data."""


def build_empty(
    config: PretrainedConfig, dtype: torch.dtype, *, experts: str | None = None
) -> PreTrainedModel:
    """Build a causal model without weights on the meta device; ``experts`` is how experts run."""
    trusted = type(config).__module__.startswith("transformers_modules.")  # its code has run
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    if experts is not None:
        config._experts_implementation = experts
    try:
        with torch.device("meta"):
            model: PreTrainedModel = loader_with_head(config).from_config(
                config, dtype=dtype, trust_remote_code=trusted
            )
    except Exception as error:  # transformers raises bare ones for what it does not know
        raise ModelError(f"cannot build a model from the config: {why(error)}") from error
    return model.eval()


_COMPARISONS = (torch.ops.aten.equal.default, torch.ops.aten.allclose.default)
"""Values are taken as those that the code expects."""


def first_that_runs(make: Callable[[str | None], Step]) -> Step | None:
    """Rehearse once by ``make``, with the model's own way to run experts, or without loops."""
    for experts in EXPERTS:
        try:
            return make(experts)
        except ModelError:
            return None
        except Exception:  # whatever a family does whose shapes depend on values
            continue
    return None


_BY_EXPERT = torch.ops.aten._grouped_mm.default


def output_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation gives within a dispatch mode; grouped products are faked by shape."""
    # Before 2.15 torch knows fake products by expert of bfloat16 alone.
    if (
        func is not _BY_EXPERT
        or args[0].dtype == torch.bfloat16
        or not isinstance(args[0], FakeTensor)
    ):
        return func(*args, **kwargs)
    left, right, ends = (*args, kwargs.get("offs"))[:3]
    shape = [*left.shape[:-1], right.shape[-1]]
    if right.ndim == 2:
        shape = [len(ends), *shape] if left.ndim == 2 else shape[1:]
    return left.new_empty(shape)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages, but those ``known``, until they go; ``peak`` is the most.

    ``padded`` is None where tensors have values. Else one that is read is what is likely: masks
    have padding if the texts have.
    """

    def __init__(self, known: set[int], *, padded: bool | None = None) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known, self._padded = known, padded

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._padded is not None:
            if func is torch.ops.aten._local_scalar_dense.default:
                return self._likely(args[0])
            if func in _COMPARISONS:
                return True
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            with self:  # there, what is made of other operations arrives as a whole
                if (output := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return output
        output = output_of(func, args, kwargs)
        for value in tree_iter(output):
            if isinstance(value, torch.Tensor):
                self._count(value)
        return output

    def _count(self, value: torch.Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size

    def _likely(self, value: torch.Tensor) -> Any:
        """The value of a tensor that has none."""
        if value.dtype == torch.bool:
            return not self._padded
        return 1.0 if value.is_floating_point() else 1


class Rehearsal:
    """A model whose weights are fake, in place of those on the meta device, to run steps on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._weights: set[int] = set()
        with self._mode:
            self._replace()

    def _replace(self) -> None:
        """Put fake tensors of the CPU where the model has tensors of the meta device."""
        made: dict[int, torch.Tensor] = {}

        def fake(value: torch.Tensor) -> torch.Tensor:
            if id(value) not in made:
                new = torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device="cpu"
                )
                if isinstance(value, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=value.requires_grad)
                made[id(value)] = new
                self._weights.add(new.untyped_storage()._cdata)
            return made[id(value)]

        kept = []  # so that no id is given twice
        place: Any
        for module in self.model.modules():
            for place in (module._parameters, module._buffers, vars(module)):
                for name, value in list(place.items()):
                    if isinstance(value, torch.Tensor):
                        kept.append(value)
                        place[name] = fake(value)

    def run(self, step: Callable[[], object], *, padded: bool = True) -> int:
        """Run a step, with inputs from the CPU and a mask if ``padded``; count its bytes."""
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(self._mode)
            live = stack.enter_context(LiveBytes(set(self._weights), padded=padded))
            step()
        return live.peak
