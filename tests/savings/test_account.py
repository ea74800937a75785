"""What a model holds and does, counted without its weights, beside models that have them;
and operations recorded on tensors that are there: products, and the stretches between them.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, GPT2Config, LlamaConfig, T5Config

from shallower import ModelError
from shallower.cutting.twin import shortened_config
from shallower.memory.rehearsal import build_empty
from shallower.savings.account import Recorder, count
from tests.conftest import mostly_slow
from tests.families import IS_OLDER, random_model, small_config

CONTEXT, BATCH = 24, 2
FAMILIES = (
    "gemma3_text", "gpt2", "mixtral", "deepseek_v3", "llama", "qwen2", "gemma2", "bloom", "falcon",
    "gpt_oss",
)  # fmt: skip

WIDE = LlamaConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
    num_attention_heads=8, num_key_value_heads=2,
)  # fmt: skip


def changed(config, **values):
    """A config with other values."""
    return type(config).from_dict({**config.to_dict(), **values})


FLAT = changed(WIDE, num_hidden_layers=1)


def bytes_in(cache):
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(value.numel() * value.element_size() for value in held)


def work(operations):
    return [(one.flops, one.read, one.written, one.launches) for one in operations]


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, quick=("mixtral",)))
def test_a_family_counts_as_its_real_model(name):
    """Parameters, bytes of a real cache, and FLOPs by torch's own counter."""
    model = random_model(name)
    found = count(small_config(name), "float32", context=CONTEXT, batch=BATCH)
    assert found.parameters == sum({id(p): p.numel() for p in model.parameters()}.values())
    ids = torch.ones((BATCH, CONTEXT), dtype=torch.long)
    model.set_attn_implementation("eager")  # torch's counter knows no attention of a CPU,
    model.config._experts_implementation = "eager"  # and no products by expert
    with torch.no_grad(), FlopCounterMode(display=False) as prefill:
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    name = "cache" if "cache" in output else "past_key_values"  # until transformers 5.23
    cache = output[name]
    assert isinstance(cache, DynamicCache)
    assert found.cache_bytes == sum(found.layer_caches) == bytes_in(cache)
    with torch.no_grad(), FlopCounterMode(display=False) as decode:
        model(input_ids=ids[:, :1], use_cache=True, **{name: cache})
    assert found.cache_growth * BATCH == bytes_in(cache) - found.cache_bytes
    for operations, counted in ((found.prefill, prefill), (found.decode, decode)):
        assert sum(one.flops for one in operations) == counted.get_total_flops() > 0


def test_tied_embeddings_count_once():
    tied = count(changed(FLAT, tie_word_embeddings=True), "bfloat16")
    plain = count(FLAT, "bfloat16")
    table = WIDE.vocab_size * WIDE.hidden_size
    assert plain.parameters - tied.parameters == table
    assert plain.weight_bytes - tied.weight_bytes == 2 * table
    assert work(plain.decode) == work(tied.decode)  # the head is multiplied by either way


def by_hand(config, tokens, seen, kept):
    """The products of a Llama in bfloat16: FLOPs, bytes read and written, in their order."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = d // heads
    kv = config.num_key_value_heads * head

    def linear(rows, inputs, outputs):
        moved = 2 * (rows * inputs + inputs * outputs), 2 * rows * outputs
        return 2 * rows * inputs * outputs, *moved

    attention = 4 * tokens * seen * d, 2 * (tokens * d + 2 * seen * kv), 2 * tokens * d
    layer = [
        linear(tokens, d, d), linear(tokens, d, kv), linear(tokens, d, kv), attention,
        linear(tokens, d, d), linear(tokens, d, f), linear(tokens, d, f), linear(tokens, f, d),
    ]  # fmt: skip
    return [*layer * config.num_hidden_layers, linear(kept, d, config.vocab_size)]


@pytest.mark.parametrize("kv_heads", mostly_slow([8, 2, 1], [2, 1]))
def test_the_products_of_a_llama_are_those_of_a_count_by_hand(kv_heads):
    """Heads that share keys read them once, the head is counted once, and only the last token's."""
    config = changed(WIDE, num_key_value_heads=kv_heads)
    found = count(config, "bfloat16", context=64)
    for operations, tokens, seen in ((found.prefill, 64, 64), (found.decode, 1, 65)):
        products = [(o.flops, o.read, o.written) for o in operations if o.flops]
        expected = by_hand(config, tokens, seen, 1)
        assert products[-len(expected) :] == expected
        assert len(products) == len(expected) or IS_OLDER  # the angles of positions: a product
    head = config.hidden_size // config.num_attention_heads
    assert found.cache_growth == 2 * 2 * config.num_hidden_layers * kv_heads * head


def test_keys_that_are_repeated_for_a_mask_are_read_once():
    """A window takes a mask, for which transformers repeats keys for every head."""
    one = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    config, tokens = changed(small_config("gemma3_text"), **one), 20
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    flops = 4 * heads * tokens * tokens * config.head_dim
    found = count(config, "float32", context=tokens).prefill
    (attention,) = [one for one in found if one.layer == 0 and one.flops == flops]
    row = 4 * tokens * config.head_dim
    mask = tokens * tokens
    assert config.sliding_window < tokens
    assert attention.read == row * (heads + 2 * kv_heads) + mask
    assert attention.written == row * heads


def test_a_token_reads_the_experts_that_it_takes():
    config = changed(small_config("mixtral"), num_hidden_layers=2)
    experts, taken = config.num_local_experts, config.num_experts_per_tok
    of_expert = 3 * config.hidden_size * config.intermediate_size
    one, all_of_them = (
        sum(o.read for o in count(config, "float32", context=8, batch=batch).decode if o.flops)
        for batch in (1, experts)
    )
    assert taken < experts
    unread = 4 * config.num_hidden_layers * (experts - taken) * of_expert
    more = all_of_them - one
    assert unread <= more <= 1.5 * unread  # states and caches beside the matrices


@pytest.mark.parametrize(
    "name",
    mostly_slow(["gemma3_text", "gpt2", "llama", "mixtral"], ["gpt2"]),
)
def test_the_account_of_a_cut_is_that_of_the_whole_less_its_layers(name):
    config = small_config(name)
    dropped = (3, 4)
    kept = tuple(i for i in range(config.num_hidden_layers) if i not in dropped)
    after = shortened_config(build_empty(config, torch.float32), kept)
    whole, cut = (count(one, "float32", context=CONTEXT) for one in (config, after))
    for phase in ("prefill", "decode"):
        left = [one for one in getattr(whole, phase) if one.layer not in dropped]
        assert work(left) == work(getattr(cut, phase))
    gone = sum(whole.layer_weights[layer] for layer in dropped)
    assert whole.weight_bytes - gone == cut.weight_bytes
    assert tuple(whole.layer_caches[layer] for layer in kept) == cut.layer_caches


@pytest.mark.parametrize("dtype", mostly_slow(["nf4", "int8"], ["nf4"]))
def test_quantised_weights_are_read_as_they_are_stored(dtype):
    plain, small = (count(FLAT, name, context=16) for name in ("bfloat16", dtype))
    less = plain.weight_bytes - small.weight_bytes
    assert less > 0
    read = [sum(one.read for one in account.decode) for account in (plain, small)]
    # Every quantised matrix is read once by a token; scales are rounded to whole bytes.
    assert read[0] - read[1] == pytest.approx(less, rel=1e-3)


def test_positions_that_were_not_learned_are_refused():
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    assert count(config, "float32", context=31).parameters
    with pytest.raises(ModelError, match=r"context = 32: the model has learned 32 .*--context"):
        count(config, "float32", context=32)


def test_a_config_of_something_else_is_refused():
    with pytest.raises(ModelError, match="cannot build a model from the config"):
        count(T5Config(), "float32")


def test_what_was_counted_is_known_again():
    """By all that decides it: the words of the config, the way of its attention, the forward."""
    found = count(FLAT, "bfloat16", context=CONTEXT)
    assert count(copy.deepcopy(FLAT), "bfloat16", context=CONTEXT) is found
    eager, wider = copy.deepcopy(FLAT), copy.deepcopy(FLAT)
    eager._attn_implementation = "eager"
    wider.intermediate_size *= 2
    for config, context in ((eager, CONTEXT), (wider, CONTEXT), (FLAT, CONTEXT + 1)):
        assert count(config, "bfloat16", context=context) != found
    assert count(FLAT, "float32", context=CONTEXT) != found


FLOAT = 4


class Block(nn.Module):
    """A norm, a matrix, an activation, a matrix, a residual sum."""

    def __init__(self, width=16, inner=32):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, states):
        normed = self.scale * states * states.pow(2).mean(-1, keepdim=True).rsqrt()
        return states + self.down(torch.relu(self.up(normed)))


def recorded(model, *inputs, layers=(), **options):
    recorder = Recorder(model, **options)
    with torch.no_grad(), recorder.inside(layers):
        model(*inputs)
    return recorder.operations


def test_products_and_stretches_by_hand():
    rows, width, inner = 5, 16, 32
    norm, up, relu, down, residual = recorded(Block(), torch.ones(rows, width))
    states, hidden = FLOAT * rows * width, FLOAT * rows * inner
    matrix = FLOAT * width * inner
    assert (norm.flops, norm.read, norm.written) == (0, states + FLOAT * width, states)
    assert (up.flops, up.read, up.written) == (2 * rows * width * inner, states + matrix, hidden)
    assert (relu.flops, relu.read, relu.written) == (0, hidden, hidden)
    assert down.flops == 2 * rows * width * inner
    assert (down.read, down.written) == (hidden + matrix + FLOAT * width, states)
    # Nobody reads the sum inside this body, so that nothing says that it is written.
    assert (residual.read, residual.written) == (2 * states, 0)
    assert [one.launches for one in (norm, up, relu, down, residual)] == [5, 1, 1, 1, 1]


def test_rows_of_a_table_are_read_where_they_are_used():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(1000, 16), nn.Linear(16, 4, bias=False)

        def forward(self, ids):
            return self.head(self.table(ids))

    (head,) = recorded(Embedded(), torch.tensor([3, 1, 2]))
    assert head.read == FLOAT * (3 * 16 + 16 * 4)


def test_new_keys_are_put_behind_those_of_a_cache():
    class Appending(nn.Module):
        def forward(self, cached, new, query):
            keys = torch.cat([cached, new], dim=-2)
            return query @ keys.transpose(-1, -2)

    cached, new = torch.ones(2, 50, 8), torch.ones(2, 1, 8)
    append, product = recorded(Appending(), cached, new, torch.ones(2, 1, 8), cached=[cached])
    assert (append.read, append.written) == (FLOAT * 16, FLOAT * 16)
    assert product.read == FLOAT * 2 * (51 * 8 + 8)
    copied, _ = recorded(Appending(), cached, new, torch.ones(2, 1, 8))
    assert (copied.read, copied.written) == (FLOAT * 2 * 51 * 8, FLOAT * 2 * 51 * 8)


def test_what_is_written_in_place_is_written_once():
    class InPlace(nn.Module):
        def forward(self, state, update):
            state.add_(update).mul_(2)

    (one,) = recorded(InPlace(), torch.ones(6), torch.ones(6))
    assert (one.read, one.written) == (FLOAT * 12, FLOAT * 6)
