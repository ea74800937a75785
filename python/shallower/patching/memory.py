"""The memory of a patch: its equations beside the weights, of which layers can wait elsewhere."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from ..evaluation.loss import FORWARD
from ..memory.batching import Forward, ForwardStep
from ..memory.rehearsal import build_empty, first_that_runs
from ..models.architecture import find_layers
from ..models.decoder import Decoder
from ..models.device_map import map_within
from ..models.feed_forward import Targets, feed_forward_targets
from ..texts.batches import Batch
from ..values.memory import MemoryPlan, usable
from ..values.tokens import Tokens
from .descent import graph_bytes, matrices
from .least_squares import solver_bytes
from .states import MAX_HELD_OUT

DEFAULT_PATCH_BATCH = 16
"""Texts in one forward of a patch."""

WEIGHTS, OFFLOADED = "weights on the device", "weights offloaded"


@torch.inference_mode()
def _run(decoder: Decoder, batch: Batch) -> None:
    decoder.layers.runner(
        input_ids=torch.from_numpy(batch.input_ids),
        attention_mask=torch.from_numpy(batch.attention_mask),
        use_cache=False,
    )


def plan_patch(
    config: PretrainedConfig,
    dtype: str,
    *,
    tokens: Tokens,
    num_tokens: int,
    device_bytes: int,
    card: bool,
) -> MemoryPlan:
    """Count what a patch by ``refit`` takes of a device, and the weights that it has room for.

    Args:
        config: of the whole model.
        dtype: dtype of the weights.
        tokens: the length of texts, and their number; ``auto`` is 16.
        num_tokens: tokens to fit, at most.
        device_bytes: free memory of the device.
        card: whether it is a GPU, beside which layers can wait in the memory of the CPU.

    Returns:
        The plan, whose parts but ``weights offloaded`` make the peak; without a peak where the
        model cannot be rehearsed.
    """
    texts = DEFAULT_PATCH_BATCH if tokens.batch_size == "auto" else tokens.batch_size
    length = tokens.max_length

    def rehearsed(experts: str | None) -> tuple[ForwardStep, int, int]:
        step = ForwardStep(config, dtype, Forward(_run), experts=experts)
        losses = ForwardStep(config, dtype, FORWARD, experts=experts)
        return step, step.live(texts, length, card), losses.live(texts, length, card)

    done = first_that_runs(rehearsed)
    if done is None:
        return MemoryPlan(None, texts, None, device_bytes)
    step, forward, losses = done
    inputs, width = writer_widths(step.model)
    size = step.model.dtype.itemsize
    solver = solver_bytes(
        inputs, width, batch_tokens=texts * length, kept_tokens=2 * num_tokens // length,
        value_bytes=size, held_tokens=min(MAX_HELD_OUT, num_tokens),
    )  # fmt: skip
    working = max(solver.adding + forward, solver.solving, losses) - forward
    moving, descending = descent_bytes(step.model, batch_tokens=texts * length)
    parts = {
        WEIGHTS: step.weights,
        OFFLOADED: 0,
        "activations": forward,
        "held-out states": 2 * min(MAX_HELD_OUT, num_tokens) * width * size,
        "solver": max(solver.held + working, descending),
    }
    if not card:  # beside one they are in the memory of the CPU
        parts["moves of the matrices"] = moving
    rest = sum(parts.values()) - step.weights
    if card and step.weights + rest > usable(device_bytes):
        kept = _resident_bytes(config, dtype, usable(device_bytes) - rest)
        parts[WEIGHTS], parts[OFFLOADED] = kept, step.weights - kept
    return MemoryPlan(rest + parts[WEIGHTS], texts, None, device_bytes, parts)


def place_weights(
    config: PretrainedConfig, dtype: str, plan: MemoryPlan, *, spare: Iterable[int] = ()
) -> dict[str, int | str] | None:
    """Divide the weights of a model as a plan says.

    Args:
        config: of the whole model.
        dtype: dtype of the weights.
        plan: as :func:`plan_patch` made it.
        spare: layers that go to the CPU before the others: those that are dropped.

    Returns:
        A device map as :func:`shallower.load_model` takes it; None where all weights stay.
    """
    if not plan.parts.get(OFFLOADED):
        return None
    plain: torch.dtype = getattr(torch, dtype)
    model = build_empty(config, plain)
    budget = plan.parts[WEIGHTS]
    return map_within(model, budget, dtype=plain, device=torch.cuda.current_device(), spare=spare)


def _resident_bytes(config: PretrainedConfig, dtype: str, budget: int) -> int:
    """The bytes of weights on a GPU within a budget, with room for one layer that waits; the
    least that is possible where even that is too much.
    """
    plain: torch.dtype = getattr(torch, dtype)
    model = build_empty(config, plain)
    layers = find_layers(model).modules
    sizes = [sum(p.numel() for p in layer.parameters()) * plain.itemsize for layer in layers]
    least = sum(p.numel() for p in model.parameters()) * plain.itemsize - sum(sizes) + max(sizes)
    try:
        map_within(model, budget, dtype=plain)
    except ModelError:
        return least
    return budget


def descent_bytes(model: nn.Module, *, batch_tokens: int) -> tuple[int, int]:
    """Count what the way down of a patched cut takes beside the model.

    Args:
        model: a causal language model, without weights.
        batch_tokens: tokens of a batch, padding included.

    Returns:
        The bytes in the memory of the CPU, if all layers move: their old values, twice, moves and
        momenta. And those on the device of the widest layer: the graph of its forward, by the
        inputs and outputs of its linear maps, its slopes, and the step of its largest matrix.
    """
    size = getattr(model, "dtype", torch.float32).itemsize
    moving = most = 0
    for layer in find_layers(model).modules:
        weights = [getattr(module, name).numel() for module, name in matrices(layer)]
        moving += 4 * size * sum(weights)
        working = (size + 4) * sum(weights) + 20 * max(weights, default=0)
        most = max(most, graph_bytes(layer, batch_tokens) + working)
    return moving, most


def writer_widths(model: nn.Module) -> tuple[int, int]:
    """Find the widths of the linear maps that a patch solves, by structure.

    Args:
        model: a causal language model, without weights.

    Returns:
        F, the inputs of the widest layer's last maps of attention and feed-forward together, and
        D, the channels of the residual stream.
    """
    decoder = Decoder.of(model)
    width = int(decoder.config.hidden_size)
    feed_forward = _last_inputs(model, feed_forward_targets(model), width)
    both = feed_forward_targets(model, attention=True)
    known = set(feed_forward_targets(model).modules)
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
