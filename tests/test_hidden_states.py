"""Hidden states: the rows that a plain forward has, whatever the batch; no trace afterwards."""

import copy
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

import shallower as sh
from conftest import tiny_llama
from shallower import _reference, pipeline
from shallower.accumulation import ScanBuilder
from shallower.calibration import Batch
from shallower.hidden_states import chosen_tokens, evaluating, stream
from shallower.models.architecture import find_layers
from shallower.positions import Positions

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
}
SEQUENCES = [
    list(range(start, start + n)) for start, n in ((3, 7), (20, 1), (40, 5), (9, 7), (60, 3))
]
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            **SIZES,
            intermediate_size=48,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=3,
            max_window_layers=2,
        )
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=3
        )
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES, intermediate_size=48)),
    "llama": lambda: tiny_llama(4),
}


def padded(sequences, left=False, first=0):
    """A batch by hand; pads hold a token of their own, so that reading one shows."""
    longest = max(map(len, sequences))
    ids = np.full((len(sequences), longest), 99, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if left else slice(len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return Batch(ids, mask, np.arange(first, first + len(sequences)))


def batched(sequences, size, left=False):
    return [
        padded(sequences[start : start + size], left, start)
        for start in range(0, len(sequences), size)
    ]


def states_of(model, batches):
    """(S, L+1, D), by sample."""
    parts = [(batch.samples, states) for batch, states, _ in stream(model, batches)]
    joined = torch.cat([states for _, states in parts], dim=1).transpose(0, 1)
    return joined[np.argsort(np.concatenate([samples for samples, _ in parts]))]


def plain_states(model, sequence):
    """The states of one text on its own, by a plain forward and one hook of this test's."""
    kept = []
    layers = find_layers(model).modules
    handle = layers[-1].register_forward_hook(
        lambda _module, _args, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([sequence]), output_hidden_states=True).hidden_states
    handle.remove()
    return torch.stack([*(state[0, -1] for state in hidden[:-1]), kept[0][0, -1]]), hidden[-1][
        0, -1
    ]


def hooks_in(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_a_plain_forward(family):
    torch.manual_seed(1)
    model = FAMILIES[family]().eval()
    got = states_of(model, batched(SEQUENCES, 5))
    assert got.shape == (5, 5, 32)
    for sequence, states in zip(SEQUENCES, got, strict=True):
        expected, normed = plain_states(model, sequence)
        torch.testing.assert_close(states, expected, atol=2e-6, rtol=1e-5)
        assert (states[-1] - normed).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_last_token_is_found_under_any_padding(family, left, size):
    torch.manual_seed(2)
    model = FAMILIES[family]().eval()
    got = states_of(model, batched(SEQUENCES, size, left))
    for sequence, states in zip(SEQUENCES, got, strict=True):
        torch.testing.assert_close(states, plain_states(model, sequence)[0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("size", [1, 5])
def test_the_best_blocks_do_not_depend_on_the_padding(llama, left, size):
    states = states_of(llama, batched(SEQUENCES, size, left))
    expected = sh.analyse_states(states_of(llama, batched(SEQUENCES, 1)).numpy())
    scanned = sh.analyse_states(states.numpy())
    assert [scanned.best_block(n) for n in range(1, 6)] == [
        expected.best_block(n) for n in range(1, 6)
    ]


def test_the_last_token_is_the_last_that_is_no_padding():
    mask = np.array([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]])
    batch = Batch(np.zeros((5, 4), dtype=np.int64), mask, np.arange(5))
    rows, columns = chosen_tokens(batch, Positions())
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert columns.tolist() == [3, 1, 3, 2, 3]


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", ["last", "last:2", "last:9", "random:1", "random:3", "all"])
def test_the_chosen_tokens_are_those_of_a_plain_forward(llama, name, left):
    positions = Positions.parse(name, 5)
    (whole,) = stream(llama, [padded(SEQUENCES)], Positions.parse("all"))
    lengths = [len(sequence) for sequence in SEQUENCES]
    starts = np.cumsum([0, *lengths])
    assert whole[1].shape == (7, sum(lengths), 32)
    for text, sequence in enumerate(SEQUENCES):
        with torch.no_grad():
            ids = torch.tensor([sequence])
            hidden = llama(input_ids=ids, output_hidden_states=True).hidden_states
        expected = torch.cat(hidden[:-1])
        got = whole[1][:-1, starts[text] : starts[text + 1]]
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    for size in (1, 2, len(SEQUENCES)):
        for batch, states, samples in stream(llama, batched(SEQUENCES, size, left), positions):
            wanted = [positions.chosen(lengths[text], text) for text in batch.samples]
            texts = np.repeat(batch.samples, [len(tokens) for tokens in wanted])
            assert samples.tolist() == texts.tolist()
            expected = whole[1][:, starts[texts] + np.concatenate(wanted)]
            torch.testing.assert_close(states, expected, atol=2e-6, rtol=1e-5)
            assert states.is_contiguous()


def test_a_batch_without_tokens_gives_no_rows(llama):
    empty = Batch(np.zeros((2, 3), np.int64), np.zeros((2, 3), np.int64), np.arange(2))
    ((_, states, samples),) = stream(llama, [empty], Positions.parse("all"))
    assert states.shape == (7, 0, 32)
    assert samples.shape == (0,)
    builder = ScanBuilder(7, ["angular"], keep_samples=True)
    builder.add(states, samples, state_first=True, sequences=samples)
    builder.add(torch.ones(7, 1, 32), [0], state_first=True, sequences=np.array([3]))
    builder.add(states, samples, state_first=True, sequences=samples)
    builder.add(torch.ones(7, 1, 32), [0], state_first=True, sequences=np.array([3]))
    scan = builder.finish()
    assert (scan.num_samples, scan.num_sequences, len(scan.samples())) == (2, 1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_states_come_in_the_dtype_of_the_model(dtype):
    model = tiny_llama(3).to(dtype)
    ((_, states, _),) = stream(model, [padded(SEQUENCES)])
    assert states.dtype == dtype
    assert states.device.type == "cpu"
    assert not states.requires_grad
    assert states.is_contiguous()


def test_neither_the_head_nor_a_cache_is_used(llama):
    seen = []
    llama.lm_head.register_forward_hook(lambda *_: seen.append("head"))
    llama.model.register_forward_hook(lambda _module, _args, out: seen.append(out.cache))
    list(stream(llama, batched(SEQUENCES, 2)))
    assert seen == [None] * 3


def test_batches_come_back_in_order_and_one_at_a_time(llama):
    asked = []

    def batches():
        for batch in batched(SEQUENCES, 1):
            asked.append(batch)
            yield batch

    for number, (batch, _, _) in enumerate(stream(llama, batches())):
        assert batch is asked[number]
        assert len(asked) <= number + 2


def test_no_batches_give_no_states(llama):
    assert list(stream(llama, [])) == []


def test_states_stay_as_they_were_when_more_are_asked_for(llama):
    streamed = stream(llama, batched(SEQUENCES, 1))
    _, first, _ = next(streamed)
    before = first.clone()
    list(streamed)
    assert torch.equal(first, before)


def mixed_modes(model):
    model.train()
    model.model.layers[1].eval()
    model.model.layers[2].mlp.eval()
    return [module.training for module in model.modules()]


def test_nothing_is_left_behind_at_the_end(llama):
    modes = mixed_modes(llama)
    list(stream(llama, batched(SEQUENCES, 2)))
    assert hooks_in(llama) == 0
    assert [module.training for module in llama.modules()] == modes


def test_nothing_is_left_behind_when_the_consumer_stops_early(llama):
    modes = mixed_modes(llama)
    streamed = stream(llama, batched(SEQUENCES, 1))
    next(streamed)
    assert hooks_in(llama) == 7
    streamed.close()
    assert hooks_in(llama) == 0
    assert [module.training for module in llama.modules()] == modes


def test_nothing_is_left_behind_when_the_batches_raise(llama):
    def broken():
        yield padded(SEQUENCES)
        yield padded(SEQUENCES)
        raise ConnectionError("gone")

    modes = mixed_modes(llama)
    with pytest.raises(ConnectionError):
        list(stream(llama, broken()))
    assert hooks_in(llama) == 0
    assert [module.training for module in llama.modules()] == modes


def test_nothing_is_left_behind_when_the_model_raises(llama):
    modes = mixed_modes(llama)
    with pytest.raises(IndexError):
        list(stream(llama, [padded([[5, 1000]])]))
    assert hooks_in(llama) == 0
    assert [module.training for module in llama.modules()] == modes


def test_nothing_is_left_behind_when_a_scan_is_interrupted(llama, words, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    modes = mixed_modes(llama)
    monkeypatch.setattr(pipeline.ScanBuilder, "add", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        sh.scan(llama, words, ["w1 w2", "w3"] * 20, batch_size=2)
    assert hooks_in(llama) == 0
    assert [module.training for module in llama.modules()] == modes
    assert caught.value is not None


def test_hooks_of_others_stay(llama):
    seen = []
    llama.model.layers[2].register_forward_hook(lambda *_: seen.append(2))
    list(stream(llama, batched(SEQUENCES, 5)))
    assert hooks_in(llama) == 1
    assert seen == [2]


def test_dropout_is_off():
    model = tiny_llama(attention_dropout=0.5).train()
    one, other = (states_of(model, batched(SEQUENCES, 5)) for _ in range(2))
    assert torch.equal(one, other)
    assert model.training


def test_modes_are_restored_after_an_error(llama):
    modes = mixed_modes(llama)
    with suppress(RuntimeError), evaluating(llama):
        assert not any(module.training for module in llama.modules())
        raise RuntimeError
    assert [module.training for module in llama.modules()] == modes


class Tuples(nn.Module):
    """A layer as transformers wrote them: keyword input, a tuple out."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, hidden_states):
        return hidden_states + self.linear(hidden_states), "attentions"


class TupleModel(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Tuples(config.hidden_size) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids, **_):
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states=hidden_states)
        return self.norm(hidden_states)


@pytest.mark.parametrize("size", [1, 5])
def test_a_layer_that_returns_a_tuple_is_read_by_its_states(size):
    torch.manual_seed(3)
    model = TupleModel(LlamaConfig(**SIZES, intermediate_size=48)).eval()
    got = states_of(model, batched(SEQUENCES, size))
    for sequence, states in zip(SEQUENCES, got, strict=True):
        expected = [model.embed(torch.tensor(sequence[-1]))]
        for layer in model.layers:
            expected.append(layer(expected[-1])[0])
        torch.testing.assert_close(states, torch.stack(expected).detach())


class Reversed(TupleModel):
    def forward(self, input_ids, **_):
        return self.layers[0](hidden_states=self.embed(input_ids))


def test_a_model_that_does_not_run_all_its_layers_is_refused():
    model = Reversed(LlamaConfig(**SIZES, intermediate_size=48))
    with pytest.raises(sh.ModelError, match=r"no states for \[1, 2, 3, 4\]"):
        list(stream(model, [padded(SEQUENCES)]))
    assert hooks_in(model) == 0


def short_list(llama):
    llama.model.layers = llama.model.layers[:5]
    return llama


def wrong_count(llama):
    llama.config.num_hidden_layers = 7
    return llama


@pytest.mark.parametrize("spoil", [short_list, wrong_count])
def test_a_list_of_another_length_than_the_config_says_is_refused(llama, spoil):
    with pytest.raises(sh.ModelError, match="module lists"):
        list(stream(spoil(llama), [padded(SEQUENCES)]))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])])
def test_a_module_that_is_no_model_of_transformers_is_refused(model):
    with pytest.raises(sh.ModelError, match="no transformers config"):
        list(stream(model, [padded(SEQUENCES)]))


def test_layers_whose_owner_takes_no_tokens_are_run_by_the_model_around_it():
    model = BertLMHeadModel(BertConfig(**SIZES, intermediate_size=48, is_decoder=True)).eval()
    expected = torch.stack([plain_states(model, sequence)[0] for sequence in SEQUENCES])
    assert torch.allclose(states_of(model, batched(SEQUENCES, 2)), expected, atol=1e-5)


def test_states_with_the_batch_on_another_axis_are_refused():
    model = XLNetLMHeadModel(
        XLNetConfig(vocab_size=100, d_model=32, n_layer=4, n_head=4, d_inner=48)
    ).eval()
    with pytest.raises(sh.ModelError, match=r"\(B, T, D\)"):
        list(stream(model, batched(SEQUENCES[:1] * 3, 3)))


def oracle(model, tokenizer, texts, max_length=256):
    """Every state of every text by itself, (S, L+1, D)."""
    return np.stack(
        [
            plain_states(model, tokenizer(text)["input_ids"][:max_length])[0].numpy()
            for text in texts
        ]
    )


TEXTS = [" ".join(f"w{(7 * i + 3 * j) % 97}" for j in range(1 + i % 11)) for i in range(23)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_scan_is_that_of_a_float64_oracle(llama, words, side, batch_size):
    tokenizer = copy.deepcopy(words)
    tokenizer.padding_side = side
    states = oracle(llama, words, TEXTS, max_length=8)
    scanned = sh.scan(llama, tokenizer, TEXTS, max_length=8, batch_size=batch_size)
    assert scanned.num_samples == len(TEXTS)
    for metric in ("angular", "cosine"):
        mean, stderr = _reference.mean_and_stderr(states, metric)
        np.testing.assert_allclose(scanned.mean(metric), mean, atol=2e-7, rtol=0)
        np.testing.assert_allclose(scanned.stderr(metric), stderr, atol=2e-7, rtol=0)
    angular = _reference.mean_and_stderr(states, "angular")[0]
    for n in range(1, 6):
        assert scanned.best_block(n).start == _reference.best_start(angular, n)


def test_a_scan_of_no_texts_is_refused(llama, words):
    with pytest.raises(sh.TextsError, match="no texts"):
        sh.scan(llama, words, iter([]))


def test_a_scan_of_empty_texts_alone_is_refused(llama, words):
    with pytest.raises(sh.StatesError, match="2 of 2 samples rejected: sample 0: empty text"):
        sh.scan(llama, words, ["", ""])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_layer_that_gives_no_numbers_is_named(llama, words, value):
    with torch.no_grad():
        llama.model.layers[3].mlp.down_proj.weight.fill_(value)
    with pytest.raises(sh.StatesError, match="sample 0: state 4 "):
        sh.scan(llama, words, TEXTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_text_without_usable_states_is_counted_and_named(llama, words, value):
    texts = [text.replace("w96", "w1") for text in TEXTS]
    clean = sh.scan(llama, words, texts)
    with torch.no_grad():
        llama.model.embed_tokens.weight[96] = value
    with pytest.warns(
        sh.RejectedSamplesWarning, match="1 of 24 samples rejected: sample 5: state 0"
    ):
        scanned = sh.scan(llama, words, [*texts[:5], "w1 w96", *texts[5:]])
    assert scanned.num_rejected == 1
    assert [rejection.sample for rejection in scanned.rejections] == [5]
    assert np.array_equal(scanned.mean(), clean.mean())


def test_rejections_of_both_kinds_are_counted_together(llama, words):
    with torch.no_grad():
        llama.model.embed_tokens.weight[96] = torch.nan
    with pytest.warns(sh.RejectedSamplesWarning, match="3 of 6 samples rejected"):
        scanned = sh.scan(llama, words, ["w96", "", "w1", "w2 w3", "   ", "w4"], batch_size=2)
    assert (scanned.num_samples, scanned.num_rejected) == (3, 3)
    assert [rejection.sample for rejection in scanned.rejections] == [0, 1, 4]


def test_a_pad_token_that_the_model_does_not_know_does_no_harm(llama, words):
    tokenizer = copy.deepcopy(words)
    tokenizer.add_special_tokens({"pad_token": "<another pad>"})
    assert tokenizer.pad_token_id >= llama.config.vocab_size
    expected = sh.scan(llama, words, TEXTS)
    assert np.array_equal(sh.scan(llama, tokenizer, TEXTS).mean(), expected.mean())


MANY = TEXTS * 5
WITH_REJECTED = [*MANY[:40], "", *MANY[40:70], "w5 w96", *MANY[70:], "w96"]


def interrupted(texts, at):
    yield from texts[:at]
    raise KeyboardInterrupt


def bits(scanned):
    sums = {metric: scanned._accumulator.to_words(metric).tobytes() for metric in scanned.metrics}
    return sums, scanned.num_samples, scanned.num_rejected, scanned.rejections, scanned.texts


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(pipeline, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)


@pytest.mark.usefixtures("hurried")
@pytest.mark.filterwarnings("ignore::shallower.RejectedSamplesWarning")
@pytest.mark.parametrize(("at", "batch_size"), [(1, 2), (33, 2), (64, 2), (64, 5), (100, 2)])
def test_a_resumed_scan_has_the_bits_of_an_uninterrupted_one(
    llama, words, tmp_path, at, batch_size
):
    with torch.no_grad():
        llama.model.embed_tokens.weight[96] = torch.nan
    checkpoint = tmp_path / "partial"
    whole = sh.scan(llama, words, WITH_REJECTED, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        sh.scan(llama, words, interrupted(WITH_REJECTED, at), batch_size=2, checkpoint=checkpoint)
    assert checkpoint.exists() == (at > 32)
    resumed = sh.scan(llama, words, WITH_REJECTED, batch_size=batch_size, checkpoint=checkpoint)
    assert bits(resumed)[1:] == bits(whole)[1:]
    assert bits(resumed) == bits(whole) or batch_size != 2
    np.testing.assert_allclose(resumed.mean(), whole.mean(), atol=1e-7)


@pytest.mark.usefixtures("hurried")
def test_a_resumed_scan_does_not_run_again_what_is_done(llama, words, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sh.scan(llama, words, interrupted(MANY, 70), batch_size=2, checkpoint=tmp_path / "partial")
    runs = []
    llama.model.register_forward_hook(lambda *_: runs.append(1))
    sh.scan(llama, words, MANY, batch_size=2, checkpoint=tmp_path / "partial")
    assert len(runs) == -(-(len(MANY) - 64) // 2)


@pytest.mark.filterwarnings("ignore::shallower.RejectedSamplesWarning")
def test_a_scan_that_is_done_counts_its_rejections_once(llama, words, tmp_path):
    texts = [*TEXTS, "", "w1"]
    for _ in range(2):
        scanned = sh.scan(llama, words, texts, checkpoint=tmp_path / "partial")
        assert (scanned.num_samples, scanned.num_rejected) == (24, 1)
        assert len(scanned.rejections) == 1


@pytest.mark.filterwarnings("ignore::shallower.RejectedSamplesWarning")
def test_a_finished_scan_as_checkpoint_counts_its_rejections_once(llama, words, tmp_path):
    texts = [*TEXTS, "", "w1"]
    done = sh.scan(llama, words, texts)
    done.save(tmp_path / "done")
    again = sh.scan(llama, words, texts, checkpoint=tmp_path / "done")
    assert (again.num_samples, again.num_rejected) == (24, 1)
    assert again.rejections == done.rejections


def other_texts(llama, words, checkpoint):
    sh.scan(llama, words, ["w1", *TEXTS[1:]], checkpoint=checkpoint)


def fewer_texts(llama, words, checkpoint):
    sh.scan(llama, words, TEXTS[:-1], checkpoint=checkpoint)


def another_limit(llama, words, checkpoint):
    sh.scan(llama, words, TEXTS, max_length=255, checkpoint=checkpoint)


def other_metrics(llama, words, checkpoint):
    sh.scan(llama, words, TEXTS, metrics=("angular",), checkpoint=checkpoint)


def another_depth(_llama, words, checkpoint):
    sh.scan(tiny_llama(5), words, TEXTS, checkpoint=checkpoint)


def other_norms(llama, words, checkpoint):
    with torch.no_grad():
        llama.model.layers[1].input_layernorm.weight[0] = 2
    sh.scan(llama, words, TEXTS, checkpoint=checkpoint)


@pytest.mark.parametrize(
    "another",
    [other_texts, fewer_texts, another_limit, other_metrics, another_depth, other_norms],
)
def test_a_checkpoint_of_another_scan_is_refused_and_kept(llama, words, tmp_path, another):
    checkpoint = tmp_path / "partial"
    sh.scan(llama, words, TEXTS, checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(sh.ScanError, match="delete it"):
        another(llama, words, checkpoint)
    assert checkpoint.read_bytes() == before


def test_a_checkpoint_of_merged_scans_is_refused(llama, words, tmp_path):
    parts = [sh.scan(llama, words, TEXTS[:9]), sh.scan(llama, words, TEXTS[9:])]
    sh.Scan.merge(parts).save(tmp_path / "merged")
    with pytest.raises(sh.ScanError, match="delete it"):
        sh.scan(llama, words, TEXTS, checkpoint=tmp_path / "merged")


def test_a_damaged_checkpoint_is_refused(llama, words, tmp_path):
    checkpoint = tmp_path / "partial"
    sh.scan(llama, words, TEXTS, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    with pytest.raises(sh.ScanError, match="truncated"):
        sh.scan(llama, words, TEXTS, checkpoint=checkpoint)


def test_a_checkpoint_of_the_first_texts_goes_on_to_more(llama, words, tmp_path):
    checkpoint = tmp_path / "partial"
    sh.scan(llama, words, TEXTS[:16], batch_size=1, checkpoint=checkpoint)
    more = sh.scan(llama, words, TEXTS, batch_size=1, checkpoint=checkpoint)
    whole = sh.scan(llama, words, TEXTS, batch_size=1)
    assert bits(more) == bits(whole)
