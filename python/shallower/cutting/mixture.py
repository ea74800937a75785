"""The routed experts in a checkpoint: which layers have them, and which tensors hold them.

A tensor of one expert has its number in its name, ``….experts.3.…``; a stack holds a part for
every expert along its outermost axis. Anything else of a mixture must be known to stay whole, as
shared experts do, or the cut is refused. Knows names and shapes alone, and no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ExpertsError, InMemoryOnlyError, ModelError
from ..values.experts import DroppedExperts, Routing
from ..values.layers import ranges
from .checkpoint_files import StoredTensor
from .tensor_names import SINGLE_EXPERT, module_of

_PACKED = ("I16", "I32", "I64", "U16", "U32", "U64")
"""Dtypes of quantised matrices whose axes are not those of the plain ones."""


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A layer with routed experts as stock loaders store it, by the names of tensors in it."""

    stacks: Mapping[str, int]  # those with a part for every expert: length of axis 0
    whole: frozenset[str]  # those without parts of experts
    heads: frozenset[str]  # first parts of names that may belong to the mixture

    def is_stack(self, name: str, tensor: StoredTensor, *, num_experts: int) -> bool:
        """Whether a tensor has a part for every expert; ModelError where that is not known."""
        length = self.stacks.get(name)
        if length is not None:
            return _checked(name, tensor, (length,))
        if name in self.whole:
            return False
        kin = self._kin(name)
        if kin is not None and kin in self.stacks:
            if _outermost(tensor.shape) == 1:  # one scale for all
                return False
            return _checked(name, tensor, (num_experts, self.stacks[kin]))
        if kin is None and name.partition(".")[0] in self.heads:
            raise ModelError(
                f"the tensor {name} beside the experts is unknown to transformers, and "
                f"may hold a part for each of them: drop experts from a checkpoint without it"
            )
        return False

    def _kin(self, name: str) -> str | None:
        """The known tensor that one of a quantised checkpoint, such as its scales, goes with."""
        known = [*self.stacks, *self.whole]
        longest = max(
            (k for k in known if name.startswith((f"{k}_", f"{k}."))), key=len, default=""
        )
        if longest:
            return longest
        alike = [k for k in known if module_of(k) == module_of(name)]
        kinds = {k in self.stacks for k in alike}
        return min(alike) if len(kinds) == 1 else None


def _outermost(shape: Sequence[int]) -> int:
    """The length of the first axis that is longer than one; 1 if none is."""
    return next((size for size in shape if size != 1), 1)


def _checked(name: str, tensor: StoredTensor, lengths: Iterable[int]) -> bool:
    if _outermost(tensor.shape) not in lengths or tensor.dtype in _PACKED:
        raise ModelError(
            f"the tensor {name} of {tensor.dtype} and shape {tensor.shape} does not hold one "
            f"expert's part after the other, as packed ones do not: drop experts from a checkpoint "
            f"in a plain dtype"
        )
    return True


@dataclass(frozen=True, slots=True)
class Mixture:
    """The routed experts of a model."""

    name: str  # of the model, for errors
    routing: Routing
    layers: frozenset[int]  # layers with experts

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer."""
        return self.routing.num_experts

    def check(self, dropped: DroppedExperts, gone: Iterable[int] = ()) -> None:
        """Refuse experts that are not there or that a router needs; ``gone`` are whole layers."""
        number = self.num_experts
        if dropped.num_experts != number:
            raise ExpertsError(
                f"the plan is for {dropped.num_experts} experts a layer, and {self.name} has "
                f"{number}: plan again, or name the experts yourself"
            )
        layers = self.layers - set(gone)
        if more := sorted(dropped.by_layer.keys() - layers):
            raise ExpertsError(
                f"layer {more[0]} has no routed experts: those with experts are "
                f"{ranges(sorted(layers)) or 'none that stays'}"
            )
        if missing := sorted(layers - dropped.by_layer.keys()):
            raise ExpertsError(
                f"layer {missing[0]} would keep all of its {number} experts, and a config has one "
                f"number for all layers: name {dropped.count} of each of {ranges(sorted(layers))}"
            )
        for layer in dropped.by_layer:
            self.routing.check(dropped.kept(layer), layer)


def find_stacks(
    dropped: DroppedExperts,
    stored: Mapping[int, StoredLayer],
    layers: Sequence[Mapping[str, StoredTensor]],
) -> list[tuple[int, str]]:
    """Find the tensors that hold a part for every expert, as layers and names in them.

    ``stored`` are the layers as stock loaders store them, ``layers`` those of the checkpoint.
    """
    stacks = []
    for layer in dropped.by_layer:
        single = _single_experts(layers[layer])
        if wrong := sorted(single ^ set(range(dropped.num_experts))) if single else []:
            raise ModelError(
                f"the checkpoint {'also has' if wrong[0] in single else 'lacks'} expert {wrong[0]} "
                f"of layer {layer}, and its config counts {dropped.num_experts}: fetch it again"
            )
        named = _stacks(layer, stored[layer], layers[layer], num_experts=dropped.num_experts)
        if not named or (not single and len(named) < 2):  # a router beside the experts at least
            raise ModelError(
                f"the checkpoint does not hold the experts of layer {layer} under names that "
                f"transformers knows: save it by transformers first"
            )
        stacks += [(layer, name) for name in named]
    return stacks


def _single_experts(names: Iterable[str]) -> set[int]:
    """The experts that have tensors of their own."""
    matches = map(SINGLE_EXPERT.search, names)
    return {int(match[1]) for match in matches if match}


def _stacks(
    layer: int, stored: StoredLayer, tensors: Mapping[str, StoredTensor], *, num_experts: int
) -> list[str]:
    """The tensors of a layer that hold a part for every expert."""
    rest = [pair for pair in tensors.items() if not SINGLE_EXPERT.search(pair[0])]
    try:
        return [pair[0] for pair in rest if stored.is_stack(*pair, num_experts=num_experts)]
    except ModelError as error:
        raise ModelError(f"layer {layer}: {error}") from error


def compare_stored(
    names: Mapping[str, Sequence[int]], fewer: Mapping[str, Sequence[int]]
) -> StoredLayer:
    """Tell stacks from what stays whole by the shapes in a layer, and in one of fewer experts."""
    stacks, whole, heads = {}, set(), set()
    for name, shape in names.items():
        head = name.partition(".")[0]
        if SINGLE_EXPERT.search(name):
            heads.add(head)
            continue
        if fewer.get(name) == shape:
            whole.add(name)
            continue
        small, length = fewer.get(name, ()), _outermost(shape)
        axis = list(shape).index(length) if length > 1 else 0
        if list(shape[axis + 1 :]) != list(small[axis + 1 :]) or len(small) != len(shape):
            raise InMemoryOnlyError(
                f"the experts of {name} do not lie one after the other, which is cut in memory "
                f"only: use prune, or load_model, drop_experts and save_model"
            )
        stacks[name] = length
        heads.add(head)
    return StoredLayer(stacks, frozenset(whole), frozenset(heads))


def refuse_experts_outside(names: Iterable[str], prefix: str, num_layers: int) -> None:
    """Refuse experts that lie in no decoder layer, as those for multi-token prediction."""
    for name in names:
        number = name.removeprefix(prefix).partition(".")[0]
        inside = name.startswith(prefix) and number.isdecimal() and int(number) < num_layers
        if not inside and "experts" in name.split("."):
            raise ModelError(
                f"the tensor {name} is of experts outside of the {num_layers} decoder layers, as "
                f"layers for multi-token prediction have: which of them could go was not "
                f"measured; take those layers out of the checkpoint first, or drop whole layers"
            )
