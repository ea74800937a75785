"""Experts to drop: of every layer that has routed experts as many, named by layer.

A config has one number of experts for all layers, so every layer drops as many. Indices are
0-based. Knows no model; layers are those of the whole model.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from ..errors import ExpertsError, LayersError, ModelError, why
from .counts import counted
from .layers import MAX_LAYERS, drop_option, dropped_layers, layer_number, parse_layers
from .layers import blocks_of as ranges_of
from .schema import of_type

MAX_EXPERTS = 65_536
"""More than any layer has; keeps a hostile plan from asking for the memory of the machine."""

MAX_FILE_BYTES = 64 << 20
"""Of a file of experts; one of 1,000 layers and 10,000 experts each is smaller."""

Experts = Mapping[int, Iterable[SupportsIndex]]
"""By layer of the whole model, the indices of the experts that go."""


@dataclass(frozen=True, slots=True)
class DroppedExperts:
    """The routed experts that go, as many of each layer that has any and stays.

    Stock configs have one number of experts for all layers (transformers #45332), so a cut is
    uniform. Shared experts, and layers without experts, are not named.

    Attributes:
        num_experts: routed experts of a layer before the cut.
        by_layer: by layer of the whole model, ascending, the indices of those that go, ascending.
        criterion: by which they were chosen, if by one.
    """

    num_experts: int
    by_layer: Mapping[int, tuple[int, ...]]
    criterion: str | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.num_experts <= MAX_EXPERTS:
            raise ExpertsError(
                f"experts can go of layers that have 2 to {MAX_EXPERTS:,}, not {self.num_experts}"
            )
        if not self.by_layer:
            raise ExpertsError(
                "no expert is named of a layer that stays: name at least one of every layer that "
                "has experts and stays, or drop whole layers alone"
            )
        named = {}
        for layer, experts in self.by_layer.items():
            if not 0 <= layer < MAX_LAYERS:
                raise ExpertsError(f"experts of layer {layer}: expected 0 .. {MAX_LAYERS - 1}")
            named[layer] = self._checked(layer, experts)
        object.__setattr__(self, "by_layer", dict(sorted(named.items())))
        counts = {len(experts): layer for layer, experts in self.by_layer.items()}
        if len(counts) > 1:
            (few, other), (many, layer) = min(counts.items()), max(counts.items())
            raise ExpertsError(
                f"layer {layer} loses {counted(many, 'expert')} and layer {other} {few}: a config "
                f"has one number of experts, so every layer must lose as many"
            )

    def _checked(self, layer: int, experts: Iterable[SupportsIndex]) -> tuple[int, ...]:
        try:
            return dropped_layers(self.num_experts, tuple(experts))
        except LayersError as error:
            said = str(error).replace("layers", "experts").replace("layer", "expert")
            raise ExpertsError(f"layer {layer}: {said.replace('the model', 'it')}") from error

    @classmethod
    def of(
        cls, num_experts: int, experts: "DroppedExperts | Experts | str | Path"
    ) -> "DroppedExperts":
        """Make it of anything that names experts.

        Args:
            num_experts: routed experts of a layer.
            experts: a value, which passes through; indices by layer; the text of
                ``--drop-experts``; or the path of a file with a layer a line.

        Returns:
            The checked value.

        Raises:
            ExpertsError: an expert that is not there or named twice, none or every one of a layer,
                other numbers in other layers; or a text or file that cannot be read.
        """
        if isinstance(experts, DroppedExperts):
            if experts.num_experts != num_experts:
                raise ExpertsError(
                    f"the plan is for {experts.num_experts} experts a layer, and the model has "
                    f"{num_experts}: plan again, or name the experts yourself"
                )
            return experts
        if isinstance(experts, str | Path):
            experts = parse_experts(experts)
        try:
            named = {layer_number(layer): tuple(some) for layer, some in experts.items()}
        except (AttributeError, TypeError, LayersError) as error:
            raise ExpertsError(
                f"cannot read the experts to drop: expected them by layer, as "
                f"{{0: [3, 5], 1: [2, 7]}}, and not {experts!r:.60}"
            ) from error
        return cls(num_experts, named)  # type: ignore[arg-type]  # checked there

    @property
    def count(self) -> int:
        """Experts that go of each layer."""
        return len(next(iter(self.by_layer.values())))

    @property
    def num_kept(self) -> int:
        """Experts that stay in each layer."""
        return self.num_experts - self.count

    @property
    def share(self) -> str:
        """How many go of how many: ``2 of 8 experts``."""
        return f"{self.count} of {counted(self.num_experts, 'expert')}"

    def kept(self, layer: int) -> tuple[int, ...]:
        """The indices of a layer's experts that stay, ascending; KeyError for another layer."""
        gone = set(self.by_layer[layer])
        return tuple(expert for expert in range(self.num_experts) if expert not in gone)

    def without(self, layers: Iterable[int]) -> "DroppedExperts":
        """The same of fewer layers; those that go whole lose no single experts."""
        gone = set(layers)
        left = {layer: some for layer, some in self.by_layer.items() if layer not in gone}
        return DroppedExperts(self.num_experts, left, self.criterion)

    def __str__(self) -> str:
        """As ``--drop-experts`` takes it: ``0:3,5;1:2,7``."""
        return ";".join(
            f"{layer}:{drop_option(ranges_of(experts))}" for layer, experts in self.by_layer.items()
        )

    def to_json(self) -> dict[str, Any]:
        """Give plain JSON values, which :meth:`from_json` reads."""
        by_layer = {str(layer): list(experts) for layer, experts in self.by_layer.items()}
        chosen = {} if self.criterion is None else {"criterion": self.criterion}
        return {"num_experts": self.num_experts, "drop": by_layer, **chosen}

    @classmethod
    def from_json(cls, data: Any) -> "DroppedExperts":
        """Read what :meth:`to_json` gave; KeyError, TypeError, ValueError or ExpertsError."""
        drop = of_type(dict, of_type(dict, data)["drop"])
        by_layer = {
            _number(layer): tuple(of_type(int, expert) for expert in of_type(list, experts))
            for layer, experts in drop.items()
        }
        criterion = data.get("criterion")
        by = None if criterion is None else of_type(str, criterion)
        return cls(of_type(int, data["num_experts"]), by_layer, by)


def check_counts(counts: Iterable[int], num_experts: int) -> None:
    """Refuse numbers of experts that layers of so many cannot lose: ExpertsError."""
    for n in counts:
        if not isinstance(n, SupportsIndex) or not 1 <= n < num_experts:
            raise ExpertsError(
                f"cannot drop {n} of {counted(num_experts, 'expert')} a layer: expected 1 to "
                f"{num_experts - 1}"
            )


def _number(text: str) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", text):
        raise ValueError(f"{text!r} is not the index of a layer")
    return int(text)


def parse_experts(text: str | Path) -> dict[int, tuple[int, ...]]:
    """Read ``"0:3,5;1:2,8:10"``, indices and half-open ranges by layer; or a file of such lines."""
    file = experts_file(text)
    lines = text if file is None else _text_of(file)
    found: dict[int, tuple[int, ...]] = {}
    for part in re.split(r"[;\n]", re.sub("#.*", "", str(lines))):
        part = part.strip()
        if not part:
            continue
        match = re.fullmatch(r"([0-9]{1,9})\s*:\s*(.+)", part)
        if not match:
            raise ExpertsError(
                f"cannot read {part!r:.60}: expected a layer and its experts, as 0:3,5;1:2,8:10 "
                f"(--drop-experts), a file of such lines, or a plan"
            )
        layer = int(match[1])
        if layer in found:
            raise ExpertsError(f"layer {layer} is named twice: name all of its experts at once")
        try:
            blocks = parse_layers(match[2])
        except LayersError as error:
            raise ExpertsError(f"experts of layer {layer}: {error}") from error
        if any(block.stop > MAX_EXPERTS for block in blocks):
            raise ExpertsError(f"layer {layer} has no expert {max(b.stop for b in blocks) - 1}")
        found[layer] = tuple(expert for block in blocks for expert in block.layers)
    if not found:
        raise ExpertsError(
            "no expert is named: expected layers and their experts, as 0:3,5;1:2,8:10"
        )
    return found


def experts_file(text: str | Path) -> Path | None:
    """The file of experts that is named; None if it is experts that are."""
    if isinstance(text, Path) or (text and not re.search(r"[;\n]|^\s*\d+\s*:", text)):
        return Path(text)
    return None


def _text_of(path: Path) -> str:
    try:
        with path.expanduser().open(encoding="utf-8-sig") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise ExpertsError(
            f"{str(path)!r:.200} is neither experts, as 0:3,5;1:2,8:10, nor a file of such lines, "
            f"nor a plan: {why(error, path)}"
        ) from error
    if len(text) > MAX_FILE_BYTES:
        raise ExpertsError(f"{path} is too large to be a list of experts")
    return text


CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
"""The keys by which configs say how many experts a token is sent to."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token is sent to experts, as far as the config describes it."""

    num_experts: int  # of a layer
    chosen: int  # experts of a token
    num_groups: int = 1  # contiguous and equal, of which some are chosen first
    groups_chosen: int = 1
    two_decide: bool = False  # a group is chosen by its two best experts together

    @classmethod
    def of(cls, config: Any, num_experts: int) -> "Routing":
        """Read it from the config of a decoder; ModelError where that lacks the experts a token."""
        config = getattr(config, "ffn_config", config)
        found = (getattr(config, name, None) for name in CHOSEN)
        chosen = next((one for one in found if isinstance(one, int)), None)
        if chosen is None:
            raise ModelError(
                f"the config of {getattr(config, 'model_type', 'the model')} does not say how many "
                f"experts a token is sent to: expected {', '.join(CHOSEN)}"
            )
        groups, most = getattr(config, "n_group", None), getattr(config, "topk_group", None)
        method = getattr(config, "topk_method", None)
        if groups is None or method == "greedy":
            return cls(num_experts, chosen)
        return cls(num_experts, chosen, groups, most or groups, method != "group_limited_greedy")

    def check(self, kept: tuple[int, ...], layer: int) -> None:
        """Refuse experts among which the router could not choose: ExpertsError says why."""
        if len(kept) < self.chosen:
            raise ExpertsError(
                f"{counted(len(kept), 'expert')} would be left in layer {layer}, and its router "
                f"sends a token to {self.chosen}: keep at least {self.chosen}"
            )
        size = self.num_experts // self.num_groups
        groups = [sum(e // size == group for e in kept) for group in range(self.num_groups)]
        if len(set(groups)) > 1:  # of one group there is one number
            raise ExpertsError(
                f"layer {layer} would keep {', '.join(map(str, groups))} experts of its "
                f"{self.num_groups} groups: its router chooses groups first, which must stay as "
                f"large as one another"
            )
        if self.two_decide and groups[0] < 2:
            raise ExpertsError(
                f"layer {layer} would keep {groups[0]} expert of each of its {self.num_groups} "
                f"groups, and the two best of a group decide about it: keep at least 2 of each"
            )
        if groups[0] * self.groups_chosen < self.chosen:
            raise ExpertsError(
                f"layer {layer} would keep {counted(groups[0], 'expert')} of a group, and its "
                f"router sends a token to {self.chosen} experts of {self.groups_chosen} groups: "
                f"keep at least {-(-self.chosen // self.groups_chosen)} of each"
            )
