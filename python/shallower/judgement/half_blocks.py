"""Half-blocks: what the attention and the feed-forward of every layer are worth by themselves.

As of LLM-Drop (2406.15786), by similarity, and of BlockPruner (2406.10594), by loss. A half is
left out by silencing the linear map that writes it into the residual stream. No cut is made of
halves: stock transformers cannot load one (:func:`skips_are_heeded`).
"""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ..errors import CriterionError
from ..memory.sizes import num_parameters
from ..models.architecture import evaluating
from ..models.decoder import Decoder
from ..models.feed_forward import FEED_FORWARD_NAMES
from ..models.layerwise import token_rows
from ..models.residual_writers import Writer, find_writers, silenced
from ..progress import track
from ..texts.batches import Batch
from ..values.schema import finite
from ..values.scores import Difference, Scores
from .subject import Subject
from .token_states import states_of

ATTENTION, FEED_FORWARD = "attention", "feed_forward"

PROBES = 5
"""Forwards of one text in which the maps that write into the stream are found, at least."""

Half = tuple[int, str]
"""A layer and a part of it."""


@dataclass(frozen=True, slots=True)
class HalfBlock:
    """The attention or the feed-forward of a layer, and what the model is without it.

    Attributes:
        layer: its index.
        part: ``attention`` or ``feed_forward``.
        similarity: 1 less the mean cosine of the stream before and after the half, over all
            tokens of the texts that fit; 0 is a half that does nothing. The attention is taken
            as the first, also where both have the same input.
        score: the judge's score of the model without this half, on the texts that choose.
        difference: ``score`` less that of the whole model.
        difference_stderr: its standard error, paired by item.
        parameters: of the modules that make up the half; the norm before it is not among them.
        parameters_share: those as a share of all parameters of the model.
        kv_bytes: bytes of keys and values that a token keeps in the cache of this layer; 0 for a
            feed-forward, None where the layer has no such cache.
        cuttable: whether the installed transformers leaves a half out whose config says so.
    """

    layer: int
    part: str
    similarity: float
    score: float
    difference: float
    difference_stderr: float
    parameters: int
    parameters_share: float
    kv_bytes: int | None
    cuttable: bool

    @property
    def tied(self) -> bool:
        """Whether the model without it cannot be told from the whole model by the judge."""
        return Difference(self.difference, self.difference_stderr, 0).tied

    def to_json(self) -> dict[str, Any]:
        """Give the half as plain JSON values, and ``tied``; what is not finite is None."""
        values = {**asdict(self), "tied": self.tied}
        return {n: finite(v) if isinstance(v, float) else v for n, v in values.items()}


def half_blocks(subject: Subject) -> list[HalfBlock]:
    """Measure the model without each attention and without each feed-forward.

    Every half is tried once on all texts that choose, from the states before its layer on:
    L² + 3 L - 1 layers a text, and 2 L for each that fits. In memory are the states of one batch.

    Args:
        subject: the model, its texts and its judge.

    Returns:
        Layer by layer the attention and the feed-forward, but for layers where they do not write
        into the stream by plain linear maps.

    Raises:
        CriterionError: no layer's do.
        ModelError: more than the residual stream goes from layer to layer, or a score is not
            finite.
    """
    return subject.meter.shared("half_blocks", lambda: _half_blocks(subject))


def _half_blocks(subject: Subject) -> list[HalfBlock]:
    model, decoder = subject.layerwise, subject.decoder
    model.check(subject.batches[0].split(1)[0])
    subject.meter.ran(len(model), 2)
    writers = _writers(subject)
    if not writers:
        raise CriterionError(
            "half-blocks can be told only where attention and feed-forward write into the "
            "residual stream by plain linear maps, and this model has no such layer (experts, a "
            "norm behind them, or quantised weights): load it unquantised, or leave half-blocks out"
        )
    similarities = _similarities(subject, writers)
    whole, scores = _scores(subject, writers)
    total = num_parameters(decoder.model)
    cache, cuttable = _cache_bytes(subject), skips_are_heeded()
    found = []
    for layer, part in writers:
        difference = scores[layer, part].minus(whole)
        parameters = _parameters(model.modules[layer], writers, (layer, part))
        found.append(
            HalfBlock(
                layer, part, similarities[layer, part], scores[layer, part].mean,
                difference.mean, difference.stderr, parameters, parameters / total,
                cache[layer] if part == ATTENTION else 0, cuttable,
            )
        )  # fmt: skip
    return found


def _writers(subject: Subject) -> dict[Half, Writer]:
    """The maps by which the halves write; without the layers where they are not both plain."""
    model, probe = subject.layerwise, subject.batches[0].split(1)[0]
    found: dict[Half, Writer] = {}
    for layer, states in zip(range(len(model)), states_of(model, probe), strict=False):
        writers = find_writers(model, layer, batch=probe, states=states)
        if writers.attention is not None and writers.feed_forward is not None:
            found[layer, ATTENTION] = writers.attention
            found[layer, FEED_FORWARD] = writers.feed_forward
    subject.meter.ran(len(model) * (1 + PROBES) - 1, 1)
    return found


def _similarities(subject: Subject, writers: dict[Half, Writer]) -> dict[Half, float]:
    """1 less the mean cosine of the stream before and after every half, in float64."""
    model = subject.layerwise
    sums = dict.fromkeys(writers, 0.0)
    with track("half-blocks, similarity", subject.num_texts, subject.progress) as advance:
        for batch in subject.batches:
            for layer, (before, after) in enumerate(pairwise(states_of(model, batch))):
                if (layer, FEED_FORWARD) not in writers:
                    continue
                with silenced(writers[layer, FEED_FORWARD]):
                    between = model.run(batch, before, (layer,))
                sums[layer, ATTENTION] += _cosines(batch, before, between)
                sums[layer, FEED_FORWARD] += _cosines(batch, between, after)
            advance(len(batch))
    subject.meter.ran(len(model) + len(writers) // 2, subject.num_texts)
    tokens = sum(int(batch.attention_mask.sum()) for batch in subject.batches)
    return {half: 1 - found / tokens for half, found in sums.items()}


def _cosines(batch: Batch, before: torch.Tensor, after: torch.Tensor) -> float:
    """The sum over all tokens of a batch; NaN where a state is of only zeros."""
    x, y = (token_rows(batch, states).double() for states in (before, after))
    x = x.to(y.device)  # a layer may be on another device than the one before it
    return float(((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).sum())


def _scores(subject: Subject, writers: dict[Half, Writer]) -> tuple[Scores, dict[Half, Scores]]:
    """The judge's scores of the whole model, and of the model without each half."""
    model, judge = subject.layerwise, subject.trials.judge
    whole = np.empty(judge.num_items)
    without = {half: np.empty(judge.num_items) for half in writers}
    num_texts = sum(len(batch) for batch in judge.batches)
    with track("half-blocks", num_texts * len(writers), subject.progress) as advance:
        for index, batch in enumerate(judge.batches):
            items = judge.items[index]
            final = model.run(batch, model.embed(batch), range(len(model)))
            judge.prepare(model, index, final)
            whole[items] = _measured(subject, index, final)
            subject.meter.ran(2 * len(model) - 1, len(batch))  # these, and the states between
            for layer, states in zip(range(len(model)), states_of(model, batch), strict=False):
                for part in (ATTENTION, FEED_FORWARD):
                    if (layer, part) in writers:
                        with silenced(writers[layer, part]):
                            final = model.run(batch, states, range(layer, len(model)))
                        without[layer, part][items] = _measured(subject, index, final)
                        subject.meter.ran(len(model) - layer, len(batch))
                        advance(len(batch))
    scores = {half: Scores(sums, judge.weights) for half, sums in without.items()}
    return Scores(whole, judge.weights), scores


def _measured(subject: Subject, index: int, states: torch.Tensor) -> NDArray[np.float64]:
    model = subject.layerwise
    with model.starting_from(states, ()):
        return subject.trials.judge.measure(model.head, index)


def _parameters(layer: nn.Module, writers: dict[Half, Writer], half: Half) -> int:
    """The parameters of a half: of the modules of its layer that its writer is among.

    A feed-forward may have several there (``fc1`` and ``fc2`` of OPT), which are known by name.
    """
    number, part = half
    first = {p: writers[number, p].name.partition(".")[0] for p in (ATTENTION, FEED_FORWARD)}
    names = {first[part]}
    if part == FEED_FORWARD:
        names |= {n for n, _ in layer.named_children() if FEED_FORWARD_NAMES.fullmatch(n)}
        names.discard(first[ATTENTION])
    return sum(num_parameters(getattr(layer, name)) for name in names)


@torch.inference_mode()
def _cache_bytes(subject: Subject) -> list[int | None]:
    """The bytes of keys and values of a token, layer by layer, as a forward caches them."""
    decoder: Decoder = subject.decoder
    ids = torch.zeros((1, 1), dtype=torch.long, device=decoder.device)
    with evaluating(decoder.model):
        output = decoder.model(input_ids=ids, use_cache=True)
    subject.meter.ran(len(decoder), 1)
    layers = getattr(getattr(output, "past_key_values", None), "layers", [])
    kept: list[int | None] = [_bytes(layer) for layer in layers]
    return kept if len(kept) == len(decoder) else [None] * len(decoder)


def _bytes(cache: Any) -> int | None:
    kept = [getattr(cache, name, None) for name in ("keys", "values")]
    tensors = [tensor for tensor in kept if isinstance(tensor, torch.Tensor)]
    return sum(one.numel() * one.element_size() for one in tensors) if len(tensors) == 2 else None


@torch.inference_mode()
def skips_are_heeded() -> bool:
    """Tell whether transformers leaves out halves of layers that a config says to skip.

    A config may say ``per_layer_config: {"1": {"skip": ["attention"]}}``. A tiny Llama of such a
    config is compared with the same without it, by logits. transformers 5.24 writes the words
    and builds the layer whole.

    Returns:
        Whether the logits differ for an attention or a feed-forward.
    """
    shapes: dict[str, Any] = {
        "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5,
    }  # fmt: skip
    ids = torch.arange(8)[None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = LlamaForCausalLM(LlamaConfig(**shapes)).float().eval()
        expected = whole(input_ids=ids, use_cache=False).logits
        for part in ("attention", "mlp"):
            skipping = {"per_layer_config": {"1": {"skip": [part]}}}
            without = LlamaForCausalLM(LlamaConfig(**shapes | skipping)).float().eval()
            without.load_state_dict(whole.state_dict(), strict=False)
            if not torch.equal(without(input_ids=ids, use_cache=False).logits, expected):
                return True
    return False
