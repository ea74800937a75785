"""Criteria of blocks: how alike the states at both ends of a block are."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import CriterionError
from ...experts.hooks import ExpertHooks
from ...models.layerwise import rows
from ...models.residual_writers import find_writers
from ...progress import track
from ...scanning.builder import MIN_BATCH, ScanBuilder
from ...scanning.hidden_states import states_of
from ...scanning.scan import Scan, keep_scan, known_scan, scan_inputs
from ...settings.stages import ScanSettings
from ...values.costs import Costs
from ...values.counts import counted
from ...values.plan import Plan
from ...values.positions import Positions
from ..criterion import Criterion
from ..kept_states import kept_states
from ..subject import ALL_TOKENS, Subject

CKA_BATCH = 64
"""Texts in a minibatch of CKA, at most."""


class Scanned(Criterion):
    """A criterion of the one pass at the last tokens of texts that such criteria share."""

    cost = (
        "One pass over the texts, shared by angular, cosine, relative_l2 and cka; last tokens "
        "alone."
    )

    def costs(self, subject: Subject) -> Costs:
        """Read the metric of that name from the scan."""
        return shared_scan(subject).costs(self.name)


class Angular(Scanned):
    """The mean angle between x⁽ˡ⁾ and x⁽ᵐ⁾ at the last token, over π (2403.17887, eq. 5).

    It does not see what changes the length of the states alone.
    """

    name = "angular"
    summary = "Mean angle between the states at both ends of a block, at the last token."


class BestPlan(Scanned):
    """The blocks whose angular distances have the least sum, of any number of blocks."""

    name = "best_plan"
    summary = "Least sum of angular distances over any number of blocks."

    def costs(self, subject: Subject) -> Costs:
        """Read the angular distances."""
        return shared_scan(subject).costs("angular")

    def plans(self, subject: Subject) -> Mapping[int, Plan]:
        """Choose blocks together for each of ``subject.sizes``."""
        scanned = shared_scan(subject)
        return {n: scanned.best_plan(n, n) for n in subject.sizes}


class Cosine(Scanned):
    """1 less the mean cosine of x⁽ˡ⁾ and x⁽ᵐ⁾ at the last token.

    It does not see what changes the length of the states alone.
    """

    name = "cosine"
    summary = "1 less the mean cosine of the states at both ends of a block, at the last token."


class RelativeL2(Scanned):
    """The mean of ‖x⁽ᵐ⁾ − x⁽ˡ⁾‖ / ‖x⁽ˡ⁾‖ at the last token.

    A layer that only scales the states costs what it scales them by, although no norm behind it
    would see that.
    """

    name = "relative_l2"
    summary = "Mean length of what a block adds, over that of its input, at the last token."

    def costs(self, subject: Subject) -> Costs:
        """Read them beside the scan."""
        return _shared(subject, BESIDE).costs(self.name)


class LinearCka(Scanned):
    """1 less the linear CKA of x⁽ˡ⁾ and x⁽ᵐ⁾ across texts, at the last token (2010.15327, eq. 2).

    It compares how texts lie towards one another, and so sees no rotation and no scaling that is
    the same for all of them. Minibatches of up to 64 texts are unbiased, and noisy where there
    are few texts; below 4 there are none.
    """

    name = "cka"
    summary = "1 less the linear CKA of the states at both ends of a block, across texts."

    def costs(self, subject: Subject) -> Costs:
        """Compare minibatches; a CriterionError refuses fewer than 4 texts."""
        scanned = _shared(subject, BESIDE)
        if scanned.num_samples < MIN_BATCH:
            raise CriterionError(
                f"the criterion {self.name} compares how texts lie towards one another: "
                f"{counted(scanned.num_samples, 'text')}, too few: give at least {MIN_BATCH} "
                f"(--texts)"
            )
        return Costs.of_blocks(
            1 - np.triu(scanned.cka),
            metric=self.name,
            model=scanned.model,
            texts=scanned.texts,
            positions=scanned.positions,
        )


SCAN, OF_EXPERTS, BESIDE = "scan", "scan with experts", "scan by other metrics"
"""What one pass gives: the scan of ``shallower scan``, and what that has not."""


def shared_scan(subject: Subject, *, experts: bool = False) -> Scan:
    """Compare all states at the last tokens of calibration texts, once for all criteria.

    A scan of the same tokens in the store of the subject is not made again. Rejected texts are
    counted with a warning; StatesError if none is left. ``experts`` gathers their statistics too.
    """
    name = OF_EXPERTS if experts else SCAN
    if name in subject.made:
        return _shared(subject, name)
    looks = [len(batch) for batch in subject.batches]
    inputs = scan_inputs(subject.texts, looks, ScanSettings(experts=experts))
    known = known_scan(subject.store, inputs, keep_samples=not experts)
    if known is not None:
        subject.made[name] = known, subject.num_layers * subject.num_texts
        return _shared(subject, name)
    scanned = _shared(subject, name)
    keep_scan(subject.store, inputs, scanned)
    return scanned


def _shared(subject: Subject, name: str) -> Scan:
    """One of the scans of a subject; the others that its pass gives are shared, too."""

    def make() -> Scan:
        pass_of = (OF_EXPERTS,) if name == OF_EXPERTS else (SCAN, BESIDE)
        found = _scans(subject, [one for one in pass_of if one not in subject.made])
        ran = subject.num_layers * subject.num_texts
        subject.made.update({other: (scan, ran) for other, scan in found.items() if other != name})
        return found[name]

    return subject.shared(name, make)


def _scans(subject: Subject, names: Sequence[str]) -> dict[str, Scan]:
    """Compare all states in one pass over the texts, by each of some scans."""
    positions, count = Positions(), subject.num_texts
    hooks = ExpertHooks(subject.decoder) if OF_EXPERTS in names else None
    minibatch, metrics = -(-count // -(-count // CKA_BATCH)), ScanSettings().metrics
    more: dict[str, dict[str, Any]] = {
        SCAN: {"metrics": metrics, "keep_samples": True},
        OF_EXPERTS: {"metrics": metrics, "experts": hooks and hooks.statistics},
        BESIDE: {
            "metrics": ("relative_l2",),
            "cka_batch": minibatch if count >= MIN_BATCH else None,
        },
    }
    of: Any = {"model": subject.decoder.identity, "positions": positions}
    builders = {name: ScanBuilder(subject.num_layers + 1, **more[name], **of) for name in names}
    (found,) = states_of(subject.decoder, [[*subject.batches]], positions, experts=hooks)
    with hooks or nullcontext(), closing(found) as parts, track("scan", count) as advance:
        for part in parts:
            for builder in builders.values():
                builder.take([part])
            advance(part.steps)
    return {name: builder.finish(subject.texts) for name, builder in builders.items()}


class LinearMap(Criterion):
    """1 − R² of x⁽ˡ⁾ + ΔT x⁽ˡ⁾ as a prediction of x⁽ᵐ⁾, on texts held out.

    ΔT = argmin Σₜ ‖x⁽ᵐ⁾ − x⁽ˡ⁾ − ΔT x⁽ˡ⁾‖² + Σᵢ λᵢ ‖ΔTᵢ‖², ΔTᵢ the column for channel i and λᵢ its
    sum of squares over the N tokens, times D/N: the channels of a stream differ a
    thousandfold in size. The penalty is on the change, so that the map falls back to doing
    nothing. R² is of the variance of x⁽ᵐ⁾, which the layers behind the block read, so blocks of
    all sizes can be compared. First tokens and others that carry massive activations are left
    out: they outweigh all others together.

    A layer that only scales the states costs next to nothing: a linear map can stand in for it.
    """

    name = "linear_map"
    summary = "1 less the R² of a linear map in place of the block, on texts held out."
    cost = (
        "One pass over about 8,192 tokens, shared with reachable; (L+1)·D values for each of 4,608 "
        "of them, and L(L+1)/2 products of (512 × 4,096) by (4,096 × D)."
    )

    def costs(self, subject: Subject) -> Costs:
        kept, size = kept_states(subject), subject.num_layers + 1
        blocks, errors = np.full((2, size, size), np.nan)
        for start, inputs in self._inputs(subject):
            for stop, scores in enumerate(kept.unexplained(start, *inputs), start + 1):
                blocks[start, stop], errors[start, stop] = scores.mean, scores.stderr
        return Costs.of_blocks(
            blocks,
            stderr=errors,
            metric=self.name,
            model=subject.decoder.identity,
            texts=subject.texts,
            positions=ALL_TOKENS,
        )

    def _inputs(self, subject: Subject) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
        """For every start what a block is predicted from, at the tokens that are kept."""
        kept = kept_states(subject)
        return enumerate(zip(kept.fitted[:-1], kept.held_out[:-1], strict=True))


class Reachable(LinearMap):
    """1 − R² of x⁽ˡ⁾ + ΔW a as a prediction of x⁽ᵐ⁾, on texts held out: what a patch can reach.

    a are the inputs of the last matrix of the feed-forward in layer l − 1, before the block, and
    ΔW is fitted as ΔT is for linear_map. No layer is before layer 0, so blocks that start there
    are not measured; nor those behind a layer that does not write by a plain linear map. A layer
    that only scales costs what those inputs do not tell of the states.
    """

    name = "reachable"
    summary = "1 less the R² of the layer before the block with a new matrix, on texts held out."
    cost = (
        "Two passes over about 8,192 tokens, one of them shared with linear_map; beside what that "
        "keeps 16 bytes a pair of the feed-forward's channels, and its products."
    )

    def _inputs(self, subject: Subject) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
        """For every start from 1 on the last matrix's inputs; a CriterionError if none is plain."""
        model, tokens, plain = subject.layerwise, kept_states(subject).tokens, False
        states = [model.embed(batch) for batch in tokens.batches]
        probe = tokens.batches[0].split(1)[0]
        for layer in range(subject.num_layers - 1):
            for some in model.passes((layer,)):
                beginning = states[0][:1, : probe.input_ids.shape[1]]
                writer = find_writers(model, layer, batch=probe, states=beginning).feed_forward
                parts: tuple[list[torch.Tensor], ...] = ([], [])
                for index, batch in enumerate(tokens.batches):
                    with _watched(None if writer is None else writer.module) as taken:
                        states[index] = model.run(batch, states[index], some)
                    if writer is None:
                        continue
                    inputs = taken[-1].view(*batch.input_ids.shape, -1)
                    for kept, masks in zip(parts, (tokens.fitted, tokens.held_out), strict=True):
                        kept.append(rows(inputs, masks[index]).to(subject.decoder.device))
            if writer is not None:
                plain = True
                yield layer + 1, (torch.cat(parts[0]), torch.cat(parts[1]))
        if not plain:
            raise CriterionError(
                f"the criterion {self.name} needs feed-forwards that write by plain linear maps, "
                f"and this model has none (experts, a norm behind it, or quantised weights): "
                f"load it unquantised, or leave out {self.name} (--criteria)"
            )


@contextmanager
def _watched(module: nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Keep what a module is given while the body runs."""
    taken: list[torch.Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        taken.append(args[0])

    if module is None:
        yield taken
        return
    with module.register_forward_pre_hook(keep):
        yield taken
