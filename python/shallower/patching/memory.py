"""The memory of a patch: its equations beside the weights, of which layers can wait elsewhere."""

from collections.abc import Collection, Iterable

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..evaluation.loss import FORWARD
from ..memory.device import Room
from ..memory.placement import resident_bytes
from ..memory.plan import Forward, ForwardStep, plan_step
from ..memory.rehearsal import build_empty, first_that_runs
from ..memory.weights import num_parameters
from ..models.architecture import find_layers
from ..models.decoder import Decoder
from ..models.dtypes import plain_dtype
from ..models.feed_forward import Targets, feed_forward_targets
from ..models.source import ModelSource
from ..texts.batches import Batch
from ..values.estimates import OFFLOADED, WEIGHTS, MemoryPlan, usable
from ..values.tokens import Tokens
from .descent import graph_bytes, kept_bytes, matrices
from .least_squares import solver_bytes
from .patch import CPU_TOKENS, NUM_TOKENS, patch_tokens
from .states import BATCH_TOKENS, FILES, MAX_HELD_OUT

DEFAULT_PATCH_BATCH = 16
"""Texts in one forward of a patch."""


@torch.inference_mode()
def _run(decoder: Decoder, batch: Batch) -> None:
    decoder.layers.runner(
        input_ids=torch.from_numpy(batch.input_ids),
        attention_mask=torch.from_numpy(batch.attention_mask),
        use_cache=False,
    )


class PatchStep:
    """A patch by ``refit`` that fits ``num_tokens`` at most, on a whole model without weights."""

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: str,
        *,
        length: int,
        num_tokens: int,
        room: Room,
        experts: str | None = None,
    ) -> None:
        self._config, self._dtype = config, dtype
        self._length, self._num_tokens, self._room = length, num_tokens, room
        self._states, self._losses = (
            ForwardStep(config, dtype, kind, length=length, card=room.card, experts=experts)
            for kind in (Forward(_run), FORWARD)
        )

    def parts(self, texts: int, recompute: bool | None = None) -> dict[str, int]:
        """Count the bytes as ``memory.plan.Parts``; what does not fit a GPU stays beside it."""
        model, weights = self._states.model, sum(self._states.weights.values())
        forward, losses = (
            step.parts(texts)["activations"] for step in (self._states, self._losses)
        )
        inputs, width = writer_widths(model)
        size, batch_tokens = model.dtype.itemsize, texts * self._length
        held_out = min(MAX_HELD_OUT, self._num_tokens)
        solver = solver_bytes(
            inputs,
            width,
            batch_tokens=batch_tokens,
            value_bytes=size,
            held_tokens=held_out,
            kept_tokens=2 * self._num_tokens // self._length,
        )
        working = max(solver.adding + forward, solver.solving, losses) - forward
        moving, descending = descent_bytes(model, batch_tokens=batch_tokens)
        rest = {
            "activations": forward,
            "held-out states": 2 * held_out * width * size,
            "solver": max(solver.held + working, descending),
        }
        if not self._room.card:  # beside one they are in the memory of the CPU
            rest["moves of the matrices"] = moving
        kept, budget = weights, usable(self._room.size) - sum(rest.values())
        if self._room.card and weights > budget:
            kept = resident_bytes(self._config, self._dtype, budget)
        return {WEIGHTS: kept, OFFLOADED: weights - kept, **rest}


def plan_patch(
    config: PretrainedConfig, dtype: str, *, tokens: Tokens, num_tokens: int, room: Room
) -> MemoryPlan:
    """Count what a patch takes of a device, and the weights that it has room for."""
    texts = DEFAULT_PATCH_BATCH if tokens.batch_size == "auto" else tokens.batch_size

    def rehearsed(experts: str | None) -> PatchStep:
        step = PatchStep(
            config,
            dtype,
            length=tokens.max_length,
            num_tokens=num_tokens,
            room=room,
            experts=experts,
        )
        step.parts(texts)
        return step

    step = first_that_runs(rehearsed)
    return plan_step(None if step is None else step.parts, [(texts, None)], room.size)


def temporary_bytes(
    model: ModelSource | PreTrainedModel,
    texts: Iterable[str] | None = None,
    *,
    dropped: Collection[int] = (),
    num_tokens: int | None = None,
    max_length: int,
    of_run: bool = False,
) -> int:
    """Count the bytes of the temporary files of a patch, at most, about.

    It fits ``num_tokens`` at most, by default as many as a patch, or that of a run; no text has
    more tokens than bytes. Streamed layers keep there what moves, too.
    """
    on_cpu, on_disk = not torch.cuda.is_available(), False
    if isinstance(model, ModelSource):
        source, on_disk = model.resolved(), model.is_streamed
        model = build_empty(source.read_config(), plain_dtype(source.dtype))
    most = patch_tokens(num_parameters(model), on_cpu=on_cpu) if of_run else num_tokens
    most = most or (CPU_TOKENS if on_cpu else NUM_TOKENS)
    count = most if texts is None else 0
    for text in () if texts is None else texts:
        if count >= most:
            break
        count += min(max_length, len(text.encode(errors="replace")))
    tokens = min(count, most) + min(MAX_HELD_OUT, count) + 2 * (max_length + BATCH_TOKENS)
    decoder = Decoder.of(model)
    states = FILES * tokens * int(decoder.config.hidden_size) * model.dtype.itemsize
    moving = {*range(min(dropped, default=1) - 1, len(decoder))} - {*dropped} if on_disk else ()
    return states + kept_bytes(decoder.layers.modules[layer] for layer in moving)


def descent_bytes(model: nn.Module, *, batch_tokens: int) -> tuple[int, int]:
    """Count the bytes of the CPU and of the device that a descent of all layers takes.

    On the CPU lie old values, twice, moves and momenta; on the device the widest layer's graph and
    slopes, and the step of its largest matrix.
    """
    size, layers, most = getattr(model, "dtype", torch.float32).itemsize, find_layers(model), 0
    for layer in layers.modules:
        weights = [getattr(module, name).numel() for module, name in matrices(layer)]
        working = (size + 4) * sum(weights) + 20 * max(weights, default=0)
        most = max(most, graph_bytes(layer, batch_tokens) + working)
    return kept_bytes(layers.modules), most


def writer_widths(model: nn.Module) -> tuple[int, int]:
    """Find F, the inputs of the widest layer's writers, and D, the channels of the stream."""
    decoder = Decoder.of(model)
    width = int(decoder.config.hidden_size)
    targets, both = (feed_forward_targets(model, attention=also) for also in (False, True))
    feed_forward, known = _last_inputs(model, targets, width), set(targets.modules)
    rest = Targets(tuple(name for name in both.modules if name not in known), (), both.transposed)
    attention = _last_inputs(model, rest, width)
    layers = {*feed_forward, *attention}
    inputs = max(
        (attention.get(layer, 0) + feed_forward.get(layer, 0) for layer in layers), default=width
    )
    return inputs, width


def _last_inputs(model: nn.Module, targets: Targets, width: int) -> dict[str, int]:
    """The inputs of the last of some linear maps to the residual stream, by layer."""
    path = find_layers(model).path
    found = {}
    for name in targets.modules:
        module = model.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        outputs, inputs = weight.T.shape if isinstance(module, Conv1D) else weight.shape
        if outputs == width:
            found[name.removeprefix(path + ".").partition(".")[0]] = int(inputs)
    return found
