"""What is read of a model whose layers are streamed, before it is loaded: passes and bytes."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..judgement.bounds import FIRST_ITEMS, STAGES, exhaustive
from ..judgement.criterion import Criterion, Search
from ..judgement.held_out_cuts import TRUTH_ITEMS
from ..judgement.proposals import PROPOSERS
from ..judgement.subject import Subject
from ..judgement.trials import looks_at
from ..judgement.verifying import PATCH_TEXTS, SEARCHED, SEEDS
from ..memory.rehearsal import build_empty
from ..memory.streaming import StreamPlan, plan_stream
from ..models.architecture import find_layers
from ..models.dtypes import plain_dtype
from ..models.source import ModelSource
from ..patching.descent import kept_bytes, num_steps
from ..patching.patch import CPU_TOKENS, NUM_TOKENS
from ..patching.states import divide
from ..storage import free_bytes
from ..texts.batches import AnyTexts
from ..values.counts import counted
from ..values.layers import blocks_of
from ..values.memory import format_size
from ..values.tokens import Tokens
from .recommending import SCAN_TEXTS
from .verified_plans import TABLE_TEXTS, VERIFYING_TEXTS

TOGETHER = 4
"""States of a text, of those that make room for passes of single ones, where cuts run together."""

Pass = tuple[float, float]
"""How many passes over the layers there are, and the tokens of each."""

CHECKED: Pass = (2, 0)
"""A model runs on one text, whole and layer by layer."""


def plan_passes(source: ModelSource, passes: Sequence[Pass]) -> StreamPlan:
    """Plan what passes over the layers of a model read, at most, about.

    Raises FileNotFoundError where its weights are not known here.
    """
    source = source.resolved()
    files = source.weight_files
    if not files:
        raise FileNotFoundError("the weights are not known here")
    return plan_stream(source.read_config(), files, plain_dtype(source.dtype), passes=passes)


class StudyTexts(Protocol):
    """The tokens of each calibration, selection and test text."""

    fit: NDArray[np.int64]
    choose: NDArray[np.int64]
    report: NDArray[np.int64]

    def looks(self, num_choosing: int | None = None) -> list[int]:
        """Count the items of each look at the selection set, or at the first of them."""


@dataclass(frozen=True, slots=True)
class StudyPasses:
    """The passes of a study over the layers of one model, at most, about."""

    num_layers: int
    settings: Any
    texts: StudyTexts

    def of_run(self, sizes: Sequence[int], beside: Sequence[int]) -> list[Pass]:
        """Bound the passes of a run but for its full patch, by sizes and those beside them.

        Checks, proposals and quick patches run twice; the losses check the model once more.
        """
        texts, report = self.texts, self.texts.report.sum()
        fit = texts.fit[:VERIFYING_TEXTS].sum()
        passes: list[Pass] = [(1, texts.fit[:SCAN_TEXTS].sum()), (4, report)]
        for size, count in [*((n, None) for n in sizes), *((n, TABLE_TEXTS) for n in beside)]:
            passes += self._verified(size, count)
            passes.append((3, 2 * TOGETHER * report))  # bare together, each after a patch
        return passes + 2 * [CHECKED, (3, fit)] + [CHECKED]

    def of_curve(self, subject: Subject, chosen: Sequence[Criterion]) -> list[Pass]:
        """Bound the passes of a curve but for its full patches; ``chosen`` are its criteria."""
        settings, texts, report = self.settings, self.texts, self.texts.report.sum()
        fit = texts.fit[:VERIFYING_TEXTS].sum()
        passes = [CHECKED, (1, report), CHECKED, (3, fit), (1, texts.fit.sum())]
        passes += self._chosen(subject, chosen)
        if "recommended" in settings.strategies:
            passes += [one for n in settings.n if n for one in self._verified(n)]
        quick = texts.fit[:PATCH_TEXTS].sum() if settings.quick_patch else None
        cuts = len(settings.n) * len(settings.strategies)
        return passes + self._together(cuts, quick)

    def of_comparison(self, subject: Subject, chosen: Sequence[Criterion]) -> list[Pass]:
        """Bound the passes of a comparison on calibration texts of one name."""
        settings, texts = self.settings, self.texts
        fit, report, choose = (x.sum() for x in (texts.fit, texts.report, texts.choose))
        single = TOGETHER * self.num_layers * texts.report[:TRUTH_ITEMS].sum()
        passes = [CHECKED, (1, report), (1, single), CHECKED, (1, fit)]
        passes += self._chosen(subject, chosen)
        together = self._together(len(settings.n) * len(chosen), fit)
        if settings.judge != "loss":  # which looks at the whole model, and at the cuts by itself
            passes += [(1, report), (1, choose), together[0]]
        return passes + together

    def of_experts(self, reporting: int, choosing: int) -> list[Pass]:
        """Bound the passes of a comparison of experts, of so many forwards over each set."""
        texts, most = self.texts, TOGETHER
        fit, report, choose = (x.sum() for x in (texts.fit, texts.report, texts.choose))
        return [CHECKED, (2, fit), (reporting, most * report), (choosing, most * choose)]

    def patched(self, dropped: Sequence[int], steps: int) -> list[Pass]:
        """Count those of a full patch and of its loss."""
        return [*patched(self.num_layers, dropped, steps), (1, self.texts.report.sum())]

    def _chosen(self, subject: Subject, chosen: Sequence[Criterion]) -> list[Pass]:
        """Bound those of criteria, for all sizes."""
        texts, looks = self.texts, self.texts.looks()
        mean, sizes = texts.choose.mean(), [n for n in subject.sizes if n]
        passes: list[Pass] = []
        for one in chosen:
            own = one.layer_forwards(subject) / (self.num_layers * max(1, subject.num_texts))
            passes.append((1 + ceil(own), texts.fit.sum()))
            each = isinstance(one, Search) and not one.nested
            for n in sizes if each else sizes[-1:]:
                count = one.trial_passes(looks, n)
                heads = one.trial_forwards(self.num_layers, looks, n).heads
                if heads:
                    passes.append((count, TOGETHER * mean * heads / count))
        return passes

    def _together(self, cuts: int, quick: float | None) -> list[Pass]:
        """Those of the losses of cuts, and after quick patches on so many tokens, if any."""
        report = self.texts.report.sum()
        after = [] if quick is None else [(1.0, TOGETHER * cuts * (report + quick))]
        return [(1, TOGETHER * cuts * report), *after]

    def _verified(self, n: int, num_choosing: int | None = None) -> list[Pass]:
        looks, mean = self.texts.looks(num_choosing), self.texts.choose.mean()
        return verified(self.num_layers, n, looks=looks, top=self.settings.top, mean=mean)


def verified(num_layers: int, n: int, looks: Sequence[int], *, top: int, mean: float) -> list[Pass]:
    """Bound the passes of a race of cuts of ``n`` layers, of texts of ``mean`` tokens.

    Screened by the first looks; exchanged, by two passes a step; patched and raced by stages.
    """
    left, first = num_layers - n, sum(looks[: looks_at(looks, FIRST_ITEMS)])
    step = num_layers * looks[0] * left / 2
    steps = SEEDS + SEARCHED["patch"] * exhaustive(num_layers, n, sum(looks)) / step
    proposed = left + 1 + 2 * len(PROPOSERS)
    each = TOGETHER * mean
    return [
        (looks_at(looks, FIRST_ITEMS), each * proposed * looks[0]),
        (2 * steps, each * num_layers * first),
        (len(STAGES) + 1, each * top * sum(looks)),
        (2, each * top * STAGES[-1]),
    ]


@dataclass(frozen=True, slots=True)
class StepsPlan:
    """What the steps of a patch take of the disk, whose layers wait there.

    Attributes:
        steps: how many there are, at most.
        passes: those over all layers that they take, of all that are planned.
        bytes: of temporary files: old and new values of the matrices, moves and momenta.
        free_bytes: what is free where temporary files go.
    """

    steps: int
    passes: int
    bytes: int
    free_bytes: int

    def to_json(self) -> dict[str, int]:
        """Give the fields as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lacks = "" if self.bytes <= self.free_bytes else ", which is not enough: name another"
        passes, size = counted(self.passes, "pass", "passes"), format_size(self.bytes)
        return (
            f"{counted(self.steps, 'step')} take {passes} of these, and {size} of temporary files, "
            f"of {format_size(self.free_bytes)} that are free in {tempfile.gettempdir()} "
            f"(TMPDIR){lacks}"
        )


def plan_steps(model: nn.Module, dropped: Sequence[int], steps: int) -> StepsPlan:
    """Plan the steps of a patch: all layers left from the one before the first block are moved."""
    layers = find_layers(model).modules
    left = [layers[layer] for layer in _moving(len(layers), dropped)]
    passes = ceil(2 * steps * len(left) / len(layers))
    free = free_bytes(Path(tempfile.gettempdir()))
    return StepsPlan(steps, passes, kept_bytes(left), free)


def plan_patch(
    source: ModelSource,
    dropped: Sequence[int],
    texts: AnyTexts,
    *,
    tokens: Tokens,
    num_tokens: int | None,
    measured: bool,
) -> dict[str, StreamPlan | StepsPlan | str]:
    """Plan what a patch reads, or say why that is unknown; TextsError for too few texts."""
    source = source.resolved()
    most = num_tokens or (NUM_TOKENS if torch.cuda.is_available() else CPU_TOKENS)
    fitted, _ = divide(source.load_tokenizer(), texts, tokens=tokens, num_tokens=most)
    empty = build_empty(source.read_config(), plain_dtype(source.dtype))
    steps = plan_steps(empty, dropped, num_steps(fitted))
    passes = [
        *patched(source.count_layers(), dropped, steps.steps),
        *[(3.0, 0.0)] * measured,
        (1, 0),
    ]
    try:
        return {"stream": plan_passes(source, passes), "steps": steps}
    except FileNotFoundError as error:
        return {"stream": f"cannot be estimated beforehand: {error}", "steps": steps}


def _moving(num_layers: int, dropped: Sequence[int]) -> list[int]:
    return [layer for layer in range(min(dropped) - 1, num_layers) if layer not in set(dropped)]


def patched(num_layers: int, dropped: Sequence[int], steps: int) -> list[Pass]:
    """Count the passes of a patch that takes so many steps, whose states wait in files.

    Both models run up to the last block, side by side; the losses of the whole model, of the cut,
    and of the cut behind each layer that is solved run from there on. Then the whole model runs on,
    and the layers that are left are read once to begin with, twice a step, and for two losses.
    """
    blocks, gone = blocks_of(sorted(dropped)), set(dropped)
    first, last = blocks[0].start - 1, blocks[-1].start - 1
    behind = [sum(layer not in gone for layer in range(b.start - 1, num_layers)) for b in blocks]
    losses = num_layers - first + behind[0] + sum(behind)
    moved = blocks[-1].stop + sum(layer not in gone for layer in range(first, last))
    stepped = num_layers - blocks[-1].stop + (3 + 2 * steps) * behind[0]
    return [CHECKED, ((losses + moved + stepped) / num_layers, 0)]
