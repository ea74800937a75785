"""A residual network whose layers' worth is known.

Ten channels of twenty-four are all that the coupling layers read, and they write to the others: so
one can take back exactly what the one before it has added. Texts are drawn from the network itself,
so that its own loss on them is the least there is, and that of a cut tells what the cut has lost.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from shallower.judgement.judges.judge import LossJudge
from shallower.judgement.subject import Subject
from shallower.judgement.trials import Trials
from shallower.models.decoder import Decoder
from shallower.models.layerwise import Layerwise
from shallower.texts.batches import TokenBatches
from shallower.values.tokens import Tokens
from tests.conftest import WORDS

KINDS = ("plain", "plain", "identity", "plain", "adds", "takes back", "plain", "scales")
NUM_LAYERS = len(KINDS)
IDENTITY = KINDS.index("identity")
PAIR = (KINDS.index("adds"), KINDS.index("takes back") + 1)
"""The block of the two layers that cancel, half-open."""
SCALES = KINDS.index("scales")
"""The last layer, which multiplies the stream by 1 + GROWTH; the final norm undoes it."""
GROWTH = 0.5
READ = 10
"""Channels that coupling layers read; they write to the others."""


class ToyConfig(PreTrainedConfig):
    model_type = "toy_residual"

    def __init__(self, kinds=KINDS, vocab_size=97, hidden_size=24, **options):
        self.kinds = list(kinds)
        self.num_hidden_layers = len(self.kinds)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**{"tie_word_embeddings": True, **options})


class ToyLayer(nn.Module):
    """x + o(mean of v over the tokens so far), then h + down(act(up h))."""

    def __init__(self, kind, width):
        super().__init__()
        self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.act = nn.Identity() if kind == "scales" else nn.Tanh()
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden_states, **_):
        counts = torch.arange(1, hidden_states.shape[1] + 1, device=hidden_states.device)
        so_far = self.v_proj(hidden_states).cumsum(dim=1) / counts[:, None].to(hidden_states.dtype)
        hidden_states = hidden_states + self.o_proj(so_far)
        return hidden_states + self.down_proj(self.act(self.up_proj(hidden_states)))


class ToyBase(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        pass


class ToyModel(ToyBase):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ToyLayer(kind, config.hidden_size) for kind in config.kinds)
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-12)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, use_cache=None, **_):
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class ToyForCausalLM(ToyBase):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = ToyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, use_cache=None, **options):
        states = self.model(input_ids, attention_mask, use_cache, **options)
        return CausalLMOutput(logits=self.lm_head(states.last_hidden_state))


@torch.no_grad()
def toy_model(kinds=KINDS, seed=0, dtype=torch.float32):
    """The network, of given kinds of layers."""
    model = ToyForCausalLM(ToyConfig(kinds)).eval()
    source = torch.Generator().manual_seed(seed)

    def fill(weight, size):
        weight.copy_(torch.randn(weight.shape, generator=source) * size / weight.shape[1] ** 0.5)

    fill(model.model.embed_tokens.weight, 24**0.5)
    before = None
    for kind, layer in zip(kinds, model.model.layers, strict=True):
        fill(layer.v_proj.weight, 1.0)
        fill(layer.o_proj.weight, 0.7)
        fill(layer.up_proj.weight, 1.0)
        fill(layer.down_proj.weight, 1.0)
        if kind == "identity":
            layer.o_proj.weight.zero_()
            layer.down_proj.weight.zero_()
        elif kind == "scales":
            layer.o_proj.weight.zero_()
            width = len(layer.down_proj.weight)
            layer.up_proj.weight.copy_(torch.eye(2 * width, width))
            layer.down_proj.weight.copy_(GROWTH * torch.eye(width, 2 * width))
        elif kind == "adds":
            for reader in (layer.v_proj, layer.up_proj):
                reader.weight[:, READ:] = 0
            for writer in (layer.o_proj, layer.down_proj):
                writer.weight[:READ] = 0
        elif kind == "takes back":
            layer.load_state_dict(before.state_dict())
            layer.o_proj.weight.neg_()
            layer.down_proj.weight.neg_()
        before = layer
    return model.to(dtype)


@torch.no_grad()
def toy_texts(model, count=48, length=24, seed=0):
    """Texts of known words that the network itself has drawn, token by token."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(WORDS), (count, 1), generator=source)
    for _ in range(length - 1):
        odds = model(ids).logits[:, -1].float().softmax(dim=-1)
        ids = torch.cat([ids, torch.multinomial(odds, 1, generator=source)], dim=1)
    return [
        " ".join(WORDS[token] for token in text[: length - i % 5]) for i, text in enumerate(ids)
    ]


def make_subject(model, tokenizer, texts, *, sizes=(1, 2), batch_size=8, max_length=256, **options):
    """A subject that fits on texts and judges by the loss on the same."""
    decoder = Decoder.of(model)
    read = TokenBatches(tokenizer, texts, Tokens(max_length, batch_size), min_tokens=2)
    batches = list(read)
    judged = TokenBatches(tokenizer, texts, Tokens(max_length, batch_size), min_tokens=2)
    trials = Trials(Layerwise(decoder), LossJudge(_in_order(judged)))
    return Subject(decoder, batches, trials, sizes, (read.identity,), **options)


def _in_order(read):
    """Batches whose texts are numbered by the order of the batches."""
    batches, start = [], 0
    for batch in read:
        batches.append(replace(batch, samples=np.arange(start, start + len(batch))))
        start += len(batch)
    return batches
