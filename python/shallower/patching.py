"""Healing without training: the layer before a cut is solved anew, in closed form.

The last matrix of that layer's feed-forward writes into the residual stream. It is found
again by least squares, so that the stream jumps to where the dropped layers would have taken it,
x^(stop) of the whole model. No parameter is added, and the checkpoint stays standard.

Three methods: ``refit`` solves the matrix itself, from its own inputs, and the matrices after
the cut as well, as long as the loss on held-out text falls; ``map`` puts a D×D map behind it
(ReplaceMe, 2505.02819); ``magnitude`` only closes the gap between the norms (Prune&Comp,
2507.18212).
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .artifacts import Layers, Loss, Plan, blocks_of, dropped_layers
from .calibration import Batch, TokenBatches, untouched
from .errors import PatchError, TextsError
from .exports import CARD_FILE, healed_card
from .least_squares import NormalEquations
from .models.architecture import find_layers
from .models.identity import identify
from .models.layerwise import Layerwise
from .models.writers import Writer, Writers, find_writers
from .progress import track
from .pruning import drop_layers, save_model
from .storage import new_folder, write_file

METHODS = ("refit", "map", "magnitude")

PATCH_FILE = "shallower_patch.json"

RIDGES = (0.03, 0.3, 3.0)
"""Penalties on the change of a matrix that are tried, as shares of its inputs' mean square."""

FIRST_WEIGHTS = (0.01, 0.001, 0.1, 1.0)
"""What the first token of a text, which carries massive activations, may count."""

ATTENTION_STEP = 0.5
"""How much of the attention's share of a jump it is given; the feed-forward, whose inputs
change with it, is then solved for all that is left."""

MAX_HELD_OUT = 8192
"""Tokens on which choices are made, at most."""

PATIENCE = 2
"""Layers after the cut that may fail to lower the loss, one after the other, before it ends."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A layer that was solved anew.

    Attributes:
        layer: its index among the original layers.
        matrices: the names of its matrices that changed.
        target: the original state that it was solved for, x^(target).
        ridge: the penalty on the change, as a share of the inputs' mean square.
        first_weight: what the first token of a text counted.
        explained: the share of what was missing that the fit adds on held-out text, R².
        nats: the held-out loss with it, in nats a token.
    """

    layer: int
    matrices: tuple[str, ...]
    target: int
    ridge: float
    first_weight: float
    explained: float
    nats: float


@dataclass(frozen=True, slots=True)
class Patch:
    """What a patch did, and what it is worth on held-out text.

    The held-out texts are every eighth of those given. Choices were made on them, so that a
    loss on other text may be a little worse.

    Attributes:
        plan: the layers that went.
        method: ``refit``, ``map`` or ``magnitude``.
        num_tokens: tokens that were fitted.
        num_held_out: tokens that choices were made on.
        original: the loss of the whole model, in nats a token.
        cut: the loss of the cut, before the patch.
        patched: the loss after it.
        fits: the layers that were solved anew.
        scales: for ``magnitude``, what the norms grow by across each block.
    """

    plan: Plan
    method: str
    num_tokens: int
    num_held_out: int
    original: float
    cut: float
    patched: float
    fits: tuple[Fit, ...] = ()
    scales: tuple[float, ...] = ()

    @property
    def recovered(self) -> float:
        """The share of the lost nats that came back."""
        lost = self.cut - self.original
        return (self.cut - self.patched) / lost if lost > 0 else math.nan

    def to_json(self) -> dict[str, Any]:
        """The patch as plain JSON values."""
        values = {**asdict(self), "plan": self.plan.to_json(), "recovered": self.recovered}
        return {"format": "shallower.patch", "version": 1, **values}


def patch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Layers,
    texts: Iterable[str],
    method: str = "refit",
    max_length: int = 256,
    batch_size: int = 16,
    num_tokens: int = 131_072,
    progress: bool | None = None,
) -> Patch:
    """Drop layers and heal the cut in closed form, in place.

    Args:
        model: the whole model, in float32, bfloat16 or float16.
        tokenizer: its tokenizer.
        layers: blocks, ranges or indices to drop, 0-based.
        texts: calibration texts, as for :func:`shallower.scan`; every eighth is held out, to
            choose by and to report on.
        method: ``refit`` (the default), ``map`` or ``magnitude``.
        max_length: tokens of a text at most.
        batch_size: texts in one forward.
        num_tokens: tokens to fit, at most. States of so many tokens lie in a temporary file:
            twice ``num_tokens`` times D values. Memory grows with the widths alone.
        progress: a bar on standard error; by default if that is a terminal.

    Returns:
        What was done and what it is worth.

    Raises:
        PatchError: the loss on held-out text would not fall; there is no layer before a
            block; a layer does not write by a plain linear map (mixtures of experts, norms
            behind the feed-forward, quantised weights). The model is then as it was.
        TextsError: there are too few texts.
        LayersError, ModelError: as :func:`shallower.drop_layers`.
    """
    if method not in METHODS:
        raise PatchError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if num_tokens < 1:
        raise PatchError(f"num_tokens = {num_tokens}: expected at least 1")
    found = find_layers(model)
    plan = Plan(len(found), blocks_of(dropped_layers(len(found), layers)), model=identify(model))
    if plan.blocks[0].start == 0 and method != "magnitude":
        raise PatchError(
            f"there is no layer before the block {plan.blocks[0]} that could be solved anew: "
            f"drop later layers, or use the method magnitude"
        )
    fitted, held_out = _divide(tokenizer, texts, max_length, batch_size, num_tokens)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        undo = stack.enter_context(_restoring())
        work = stack.enter_context(
            _Patching(Layerwise(model), plan, fitted, held_out, undo, progress)
        )
        done = work.magnitude() if method == "magnitude" else work.solve(method)
        if not done.patched < done.cut:
            raise PatchError(
                f"the patch does not help: the loss on {done.num_held_out} held-out tokens is "
                f"{done.patched:.4f} nats with it and {done.cut:.4f} without, of "
                f"{done.original:.4f} before the cut; give more texts, or another method"
            )
        drop_layers(model, plan.blocks)
        undo.clear()
    return done


def save_patched(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    done: Patch,
    overwrite: bool = False,
    losses: tuple[Loss, Loss] | None = None,
    more: Mapping[str, bytes] | None = None,
) -> None:
    """Save a patched model as :func:`shallower.save_model` does, with ``shallower_patch.json``
    and a card that says what was done.

    Args:
        model: as :func:`patch` left it.
        tokenizer: saved beside it, unless ``None``.
        path: a folder that does not exist yet, or is empty.
        done: what :func:`patch` gave.
        overwrite: replace what is at ``path``, once the new checkpoint is complete.
        losses: on text that no choice was made on, before the cut and after the patch.
        more: files to put beside it, by name.

    Raises:
        OutputError, ModelError: as :func:`shallower.save_model`.
    """
    with new_folder(Path(path), overwrite) as folder:
        folder.rmdir()
        save_model(model, tokenizer, folder, done.plan, losses=losses)
        card = healed_card(folder / CARD_FILE, _WHAT[done.method], _rows(done))
        report = json.dumps(done.to_json(), indent=2) + "\n"
        beside = {CARD_FILE: card.encode(), PATCH_FILE: report.encode(), **(more or {})}
        for name, content in beside.items():
            write_file(folder / name, content)


_WHAT = {
    "refit": "matrices beside it were solved anew by least squares; nothing was trained.",
    "map": "a linear map was fused into the matrix before it; nothing was trained.",
    "magnitude": "the matrices behind it were scaled; nothing was trained.",
}


def _rows(done: Patch) -> list[tuple[str, str]]:
    rows = [
        ("method", done.method),
        ("tokens fitted", f"{done.num_tokens:,}"),
        ("held-out loss, nats a token", f"{done.original:.4f} whole, {done.cut:.4f} cut, "
         f"{done.patched:.4f} patched, on {done.num_held_out:,} tokens that choices were made on"),
        ("lost nats recovered", f"{100 * done.recovered:.0f} %"),
    ]  # fmt: skip
    changed = ", ".join(name for fit in done.fits for name in fit.matrices)
    return [*rows, ("matrices solved anew, by source layer", changed)] if changed else rows


@contextmanager
def _restoring() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Weights and what they were: put back at the end, unless the list is emptied."""
    changed: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        yield changed
    finally:
        for weight, before in reversed(changed):
            weight.copy_(before)


def _divide(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    max_length: int,
    batch_size: int,
    num_tokens: int,
) -> tuple[list[Batch], list[Batch]]:
    """Batches to fit and batches held out, every eighth text; as many texts as are needed."""
    counts = [0, 0]
    enough = (num_tokens, min(MAX_HELD_OUT, num_tokens))
    parts: tuple[list[str], list[str]] = ([], [])
    for index, text in enumerate(texts):
        held = index % 8 == 7
        if counts[0] >= enough[0] and counts[1] >= enough[1]:
            break
        if counts[held] < enough[held]:
            parts[held].append(text)
            with untouched(tokenizer):
                encoded = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
            counts[held] += len(encoded)
    fitted, held_out = (
        list(TokenBatches(tokenizer, part, max_length, batch_size, min_tokens=2)) for part in parts
    )
    if not fitted or not held_out:
        raise TextsError(
            f"{len(parts[0]) + len(parts[1])} texts are too few to fit and to hold out: give at "
            f"least 8 with two tokens each, better some thousand"
        )
    return fitted, held_out


class _Stored:
    """States of batches, in one temporary file."""

    def __init__(
        self, file: Path, batches: Sequence[Batch], width: int, dtype: torch.dtype
    ) -> None:
        sizes = [batch.input_ids.size * width for batch in batches]
        whole = torch.from_file(str(file), shared=True, size=sum(sizes), dtype=dtype)
        self._parts = [
            part.view(*batch.input_ids.shape, width)
            for part, batch in zip(whole.split(sizes), batches, strict=True)
        ]

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._parts[index]

    def __setitem__(self, index: int, states: torch.Tensor) -> None:
        self._parts[index].copy_(states)


@dataclass(slots=True)
class _Set:
    """Batches with the states of the whole model and of the cut one, as far as both have come."""

    batches: Sequence[Batch]
    whole: _Stored
    cut: _Stored


class _Patching:
    """The work on one model: both models' states advance layer by layer, side by side."""

    def __init__(
        self,
        model: Layerwise,
        plan: Plan,
        fitted: Sequence[Batch],
        held_out: Sequence[Batch],
        undo: list[tuple[torch.Tensor, torch.Tensor]],
        progress: bool | None,
    ) -> None:
        self.model, self.plan, self.undo, self.progress = model, plan, undo, progress
        self._batches = fitted, held_out
        self.survivors = plan.survivors
        self.first_weight = FIRST_WEIGHTS[0]

    def __enter__(self) -> "_Patching":
        self.model.check(self._batches[1][0])
        self._folder = tempfile.TemporaryDirectory(prefix="shallower-")
        folder = Path(self._folder.name)
        sample = self.model.embed(self._batches[0][0])
        width, dtype = sample.shape[-1], sample.dtype
        self.fitted, self.held_out = (
            _Set(
                batches,
                _Stored(folder / f"{name}.whole", batches, width, dtype),
                _Stored(folder / f"{name}.cut", batches, width, dtype),
            )
            for name, batches in zip(("fitted", "held_out"), self._batches, strict=True)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def solve(self, method: str) -> Patch:
        """The layers before the blocks; for ``refit``, those after them too."""
        first = self.plan.blocks[0].start - 1
        after = {block.start - 1: block.stop for block in self.plan.blocks}
        for states in (self.fitted, self.held_out):
            for index, batch in enumerate(states.batches):
                embedded = self.model.embed(batch)
                states.whole[index] = self.model.run(batch, embedded, range(first))
                states.cut[index] = states.whole[index]
        original, cut = self._loss(first, range(first, len(self.model))), self._loss(first)
        nats, fits, failures = cut, [], 0
        with track("patch", len(self.survivors) - first, self.progress) as advance:
            for layer in self.survivors[first:]:
                target = after.get(layer, layer + 1)
                self._advance_whole(layer, target)
                wanted = layer in after or (method == "refit" and failures < PATIENCE)
                fit = self._fit(layer, target, method, layer in after) if wanted else None
                if fit and (layer in after or fit.nats < nats):
                    fits.append(fit)
                    nats, failures = fit.nats, 0
                elif wanted:
                    self._take_back()
                    failures += 1
                if failures >= PATIENCE and layer > max(after):
                    break
                self._advance_cut(layer)
                advance(1)
        return self._done(method, original, cut, nats, fits=tuple(fits))

    def magnitude(self) -> Patch:
        """Everything that is written after a block is divided by what the norms grow across it.

        A norm stands before each reader of the stream, so that this is the same as to multiply
        the stream itself, and the embeddings stay.
        """
        states = self.held_out
        sums = {place: 0.0 for block in self.plan.blocks for place in (block.start, block.stop)}
        counts = 0
        for chosen in (self.fitted, self.held_out):
            for index, batch in enumerate(chosen.batches):
                hidden = self.model.embed(batch)
                chosen.cut[index] = hidden
                mask = _rest(batch)
                at = 0
                for place in sorted(sums):
                    hidden = self.model.run(batch, hidden, range(at, place))
                    at = place
                    sums[place] += float(hidden[mask].float().norm(dim=-1).double().sum())
                counts += int(mask.sum())
        original, cut = self._loss(0, range(len(self.model))), self._loss(0, self.survivors)
        scales = tuple(sums[block.stop] / sums[block.start] for block in self.plan.blocks)
        batch, factor = states.batches[0], 1.0
        hidden = self.model.embed(batch)
        for layer in self.survivors:
            passed = [s for b, s in zip(self.plan.blocks, scales, strict=True) if b.stop <= layer]
            factor = math.prod(passed)
            if factor != 1.0:
                writers = find_writers(self.model, layer, batch, hidden)
                for writer in self._both(layer, writers):
                    for weight in writer.module.parameters(recurse=False):
                        self._change(weight, weight / factor)
            hidden = self.model.run(batch, hidden, (layer,))
        return self._done("magnitude", original, cut, self._loss(0, self.survivors), scales=scales)

    def _both(self, layer: int, writers: Writers) -> tuple[Writer, Writer]:
        if writers.attention is None or writers.feed_forward is None:
            raise PatchError(
                f"layer {layer} does not write into the residual stream by two plain linear maps, "
                f"which the method magnitude scales"
            )
        return writers.attention, writers.feed_forward

    def _done(self, method: str, original: float, cut: float, patched: float, **more: Any) -> Patch:
        fitted, held_out = (
            sum(int(batch.attention_mask.sum()) for batch in batches) for batches in self._batches
        )
        return Patch(self.plan, method, fitted, held_out, original, cut, patched, **more)

    def _advance_whole(self, layer: int, target: int) -> None:
        for states in (self.fitted, self.held_out):
            for index, batch in enumerate(states.batches):
                states.whole[index] = self.model.run(
                    batch, states.whole[index], range(layer, target)
                )

    def _advance_cut(self, layer: int) -> None:
        for states in (self.fitted, self.held_out):
            for index, batch in enumerate(states.batches):
                states.cut[index] = self.model.run(batch, states.cut[index], (layer,))

    def _fit(self, layer: int, target: int, method: str, jump: bool) -> Fit | None:
        """Solve a layer's matrices for the whole model's state; the best of a few choices."""
        self._mark = len(self.undo)
        batch = self.held_out.batches[0]
        writers = find_writers(self.model, layer, batch, self.held_out.cut[0])
        feed_forward = writers.feed_forward
        if feed_forward is None:
            if not jump:
                return None
            raise PatchError(
                f"layer {layer}, before the block, does not write into the residual stream by a "
                f"plain linear map (experts, a norm behind it, or quantised weights): load the "
                f"model unquantised, or drop another block"
            )
        before = self._missing(layer)
        changed = [feed_forward.name]
        if method == "refit" and writers.attention is not None:
            self._give_attention_its_share(layer, writers.attention, feed_forward)
            changed.insert(0, writers.attention.name)
        rest, first = self._equations(layer, (feed_forward,))
        own = feed_forward.weight.double()
        if method == "map":
            rest, first = rest.mapped(own), first.mapped(own)

        def change(ridge: float, first_weight: float) -> None:
            penalty = rest.scale.expand(len(rest.gram))
            delta = rest.plus(first, first_weight).solve(ridge, penalty) / feed_forward.scale
            new = own + (delta @ own if method == "map" else delta)
            self._set(feed_forward, new)

        choices = [(RIDGES[0], self.first_weight)]
        best, nats = choices[0], math.inf
        trials = [(RIDGES[0], w) for w in FIRST_WEIGHTS] if jump else choices
        for trial in trials:
            change(*trial)
            if (loss := self._loss(layer)) < nats:
                best, nats = trial, loss
        for ridge in RIDGES[1:]:
            change(ridge, best[1])
            if (loss := self._loss(layer)) >= nats:
                break
            best, nats = (ridge, best[1]), loss
        change(*best)
        self.first_weight = best[1]
        explained = 1.0 - self._missing(layer) / before
        prefix = f"{layer}."
        return Fit(layer, tuple(prefix + name for name in changed), target, *best, explained, nats)

    def _give_attention_its_share(self, layer: int, attention: Writer, other: Writer) -> None:
        rest, first = self._equations(layer, (attention, other))
        inputs = attention.weight.shape[1]
        diagonal = rest.gram.diagonal()
        parts = diagonal[:inputs], diagonal[inputs:]
        penalty = torch.cat([part.mean().expand(len(part)) for part in parts])
        joint = rest.plus(first, self.first_weight).solve(RIDGES[0], penalty)
        delta = ATTENTION_STEP * joint[:, :inputs] / attention.scale
        self._set(attention, attention.weight.double() + delta)

    def _equations(
        self, layer: int, writers: tuple[Writer, ...]
    ) -> tuple[NormalEquations, NormalEquations]:
        """What is missing to the whole model's states, from the writers' inputs.

        Summed apart for the first tokens of the texts, and for all others.
        """
        states = self.fitted
        sums: tuple[NormalEquations, ...] = ()
        for index, batch in enumerate(states.batches):
            with _inputs([writer.module for writer in writers]) as taken:
                output = self.model.run(batch, states.cut[index], (layer,))
            inputs = torch.cat([x.view(*output.shape[:2], -1) for x in taken()], dim=-1)
            missing = states.whole[index].to(output.device).float() - output.float()
            if not sums:
                sizes = inputs.shape[-1], missing.shape[-1]
                sums = tuple(NormalEquations.empty(*sizes, inputs.device) for _ in range(2))
            for equations, mask in zip(sums, (_rest(batch), _first(batch)), strict=True):
                equations.add(inputs[mask], missing[mask])
        return sums[0], sums[1]

    def _missing(self, layer: int) -> float:
        """The squared distance to the whole model's states on held-out text, first tokens apart."""
        states, total = self.held_out, 0.0
        for index, batch in enumerate(states.batches):
            output = self.model.run(batch, states.cut[index], (layer,))
            missing = states.whole[index].float() - output.float()
            total += float(missing[_rest(batch)].double().square().sum())
        return total

    def _loss(self, layer: int, layers: Sequence[int] | None = None) -> float:
        """The held-out loss, from the cut model's states before ``layer``."""
        if layers is None:
            layers = [index for index in self.survivors if index >= layer]
        total, count = 0.0, 0
        for index, batch in enumerate(self.held_out.batches):
            logits = self.model.logits(batch, self.held_out.cut[index], layers)
            for row, length in enumerate(batch.attention_mask.sum(axis=1).tolist()):
                expected = torch.from_numpy(batch.input_ids[row, 1:length]).to(logits.device)
                predicted = logits[row, : length - 1].float()
                total += float(functional.cross_entropy(predicted, expected, reduction="sum"))
                count += length - 1
        return total / count if math.isfinite(total) else math.inf

    def _set(self, writer: Writer, weight: torch.Tensor) -> None:
        self._change(writer.parameter, writer.stored(weight))

    def _change(self, parameter: torch.Tensor, value: torch.Tensor) -> None:
        if all(parameter is not known for known, _ in self.undo):
            self.undo.append((parameter, parameter.detach().clone()))
        parameter.copy_(value)

    def _take_back(self) -> None:
        while len(self.undo) > self._mark:
            parameter, before = self.undo.pop()
            parameter.copy_(before)


def _first(batch: Batch) -> torch.Tensor:
    """The first tokens of the texts, (B, T); batches are padded on the right."""
    mask = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    mask[:, 0] = True
    return mask


def _rest(batch: Batch) -> torch.Tensor:
    """All tokens but the first and the padding."""
    return torch.from_numpy(batch.attention_mask).bool() & ~_first(batch)


@contextmanager
def _inputs(modules: Sequence[nn.Module]) -> Iterator[Callable[[], list[torch.Tensor]]]:
    """Give a function that tells what the modules were given."""
    taken: dict[int, torch.Tensor] = {}

    def keep(place: int) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            taken[place] = args[0]

        return hook

    handles = [m.register_forward_pre_hook(keep(place)) for place, m in enumerate(modules)]
    try:
        yield lambda: [taken[place] for place in range(len(modules))]
    finally:
        for handle in handles:
            handle.remove()
