"""Iteration: drop a few layers, patch, look again, and choose the next, until enough are gone."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import CacheError, LayersError, PatchError, PlanError, StatesError
from ..values.costs import Costs
from ..values.layers import check_size, layer_number
from ..values.plan import Plan
from ..values.schema import of_type
from ..values.verification import Verified
from .held_out_cuts import told
from .looking_again import costs_in_a_cut
from .proposals import PROPOSING_TEXTS, Proposals, propose
from .token_states import evenly
from .verifying import PATCH_TEXTS, Verifier
from .work import Work


def iterate(verifier: Verifier, n: int, *, step: int) -> tuple[Verified, ...]:
    """Find the layers to drop a few at a time, each few in the model that the last have left.

    The cut so far is patched as quickly as for a race, and its layers are compared anew. What is
    proposed then is raced beside the verifier's own proposals, each patched from the whole model.

    Args:
        verifier: of the model; it judges every step.
        n: layers to drop in all.
        step: layers that go at once; the last step may be of fewer.

    Returns:
        The verified plan of every step, the last of ``n`` layers. Each contains the one before
        it. Layer-forwards and seconds are of the step alone, and hold those of looking again.

    Raises:
        LayersError: ``n`` layers that the model cannot lose; or ``step`` is not in ``1 .. n``.
        PlanError, PatchError, ModelError: as :meth:`Verifier.verify`.

    Example:
        >>> from shallower.judgement.iterating import iterate
        >>> steps = iterate(verifier, 8, step=2)
        >>> [verified.n for verified in steps]
        [2, 4, 6, 8]
    """
    n, step = layer_number(n), layer_number(step)
    check_size(verifier.num_layers, n)
    if not 1 <= step <= n:
        raise LayersError(
            f"step = {step}: expected 1 to n = {n} layers, which go at once (--iterate)"
        )
    found: list[Verified] = []
    for size in [*range(step, n, step), n]:
        found.append(_step(verifier, size, found[-1].plan if found else None))
    return tuple(found)


def _step(verifier: Verifier, size: int, before: Plan | None) -> Verified:
    if before is None:
        return verifier.verify(size)
    seen = _looked_again(verifier, before, size)
    plans = [_plan(verifier, *proposal) for proposal in seen.proposals]
    found = verifier.verify(size, base=before.dropped, more=plans)
    return replace(
        found,
        layer_forwards=found.layer_forwards + seen.work.layer_forwards,
        seconds=found.seconds + seen.work.seconds,
        failed={**found.failed, **seen.failed},
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was seen in a cut: proposals, ``(layers, name)`` each, and what that took."""

    proposals: list[tuple[list[int], str]]
    failed: Mapping[str, str]
    work: Work

    def to_json(self) -> dict[str, Any]:
        return {
            "proposals": [{"dropped": cut, "name": name} for cut, name in self.proposals],
            "failed": dict(self.failed),
            "layer_forwards": self.work.layer_forwards,
            "seconds": self.work.seconds,
        }

    @classmethod
    def from_json(cls, data: Any) -> "_Seen":
        proposals = [
            ([of_type(int, layer) for layer in of_type(list, one["dropped"])],
             of_type(str, one["name"]))
            for one in of_type(list, of_type(dict, data)["proposals"])
        ]  # fmt: skip
        failed = {key: of_type(str, why) for key, why in of_type(dict, data["failed"]).items()}
        work = Work(of_type(int, data["layer_forwards"]), of_type(float, data["seconds"]))
        return cls(proposals, failed, work)


def _looked_again(verifier: Verifier, before: Plan, size: int) -> _Seen:
    """What the layers that are left propose, as it is kept in the store."""
    inputs = {
        "base": list(before.dropped), "n": size, "fitted": verifier.texts, "top": verifier.top,
        "after": verifier.after, "max_blocks": verifier.max_blocks, "num_texts": PROPOSING_TEXTS,
        "patch_texts": PATCH_TEXTS, **verifier.patch.settings, **told(verifier.trials.judge),
    }  # fmt: skip
    known = verifier.store.get("looked_again", inputs)
    if known is None:
        found = _look(verifier, before, size)
        verifier.store.put("looked_again", inputs, found.to_json())
        return found
    try:
        return _Seen.from_json(known)
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(
            f"proposals of the cache are damaged ({error}): remove them (shallower cache --clear), "
            f"or iterate anew (--no-cache)"
        ) from error


def _look(verifier: Verifier, before: Plan, size: int) -> _Seen:
    model, subject, survivors = verifier.trials.model, verifier.subject, before.survivors
    proposals: list[tuple[list[int], str]] = []
    failed: dict[str, str] = {}
    batches = evenly(subject.batches, PROPOSING_TEXTS)
    if verifier.after == "patch":
        with subject.meter.account():  # the races have been charged for it
            verifier.patch.prepare()
    with subject.meter.account() as work, ExitStack() as stack:
        if verifier.after == "patch":
            try:
                stack.enter_context(verifier.patch.patched(before))
            except PatchError as error:
                if isinstance(error.__cause__, torch.OutOfMemoryError):
                    raise  # there may be more of it another time
                failed["patch before looking again"] = str(error)
        costs: Mapping[str, Costs] = {}
        try:
            costs = costs_in_a_cut(model, batches, survivors)
        except StatesError as error:
            failed["looking again"] = str(error)
        subject.meter.ran(len(survivors), sum(map(len, batches)))
    seen = Proposals()
    propose(seen, costs, size - len(before.dropped), base=frozenset(), top=verifier.top)
    allowed = Proposals(max_blocks=verifier.max_blocks)
    for cut, names in seen.names.items():
        among_all = sorted([*before.dropped, *(survivors[layer] for layer in cut)])
        if allowed.allows(among_all):
            proposals += [(among_all, f"{name} again") for name in names]
    return _Seen(proposals, failed, work)


def _plan(verifier: Verifier, cut: list[int], name: str) -> Plan:
    """A proposal that says whose it is."""
    try:
        plan = Plan.of(verifier.num_layers, cut)
    except (LayersError, PlanError) as error:
        raise CacheError(
            f"proposals of the cache are damaged ({error}): remove them (shallower cache --clear), "
            f"or iterate anew (--no-cache)"
        ) from error
    return replace(plan, strategy="costs", metric=name, model=verifier.subject.decoder.identity)
