"""How a token is sent to experts, as far as a config says it. Knows no model."""

from dataclasses import dataclass
from typing import Any

from ..errors import ExpertsError, ModelError
from .counts import counted

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
