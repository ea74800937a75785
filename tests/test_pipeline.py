"""The stages joined: nothing is lost on the way, and the model is as it was."""

import copy
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BioGptForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

import shallower as sh
from conftest import WORDS, tiny_llama
from shallower import Block, LayersError, ModelError, Scan, ScanError, TextsError, pipeline
from shallower.pipeline import continue_text, logits_difference


def documents(count, seed=0):
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(3, 20))) for _ in range(count)]


TEXTS = documents(24)
HELD_OUT = documents(8, seed=1)
PROBE = torch.arange(16).reshape(2, 8)


def state_of(model):
    """All that a cut could leave changed."""
    layers = model.model.layers
    with torch.inference_mode():
        logits = model(input_ids=PROBE, use_cache=True).logits
    return {
        "layers": [id(layer) for layer in layers],
        "places": [layer.self_attn.layer_idx for layer in layers],
        "modes": [module.training for module in model.modules()],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "config": copy.deepcopy(model.config.to_dict()),
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "logits": logits,
    }


def assert_same(before, after):
    for name in ("layers", "places", "modes", "hooks", "config"):
        assert after[name] == before[name], name
    assert after["weights"].keys() == before["weights"].keys()
    assert all(
        torch.equal(after["weights"][key], before["weights"][key]) for key in after["weights"]
    )
    assert torch.equal(after["logits"], before["logits"])


class Unread:
    """Texts that must not be looked at."""

    def __iter__(self):
        raise AssertionError("the texts were read")


def once(texts):
    """Texts that can be read only once."""
    yield from texts


def broken_after(texts, count):
    yield from texts[:count]
    raise OSError("the disk went away")


@pytest.fixture
def scanned(llama, words):
    return sh.scan(llama, words, TEXTS)


@pytest.fixture
def checkpoint(llama, words, tmp_path):
    """The model without layers 1 and 2, saved."""
    with sh.without_layers(llama, [1, 2]):
        sh.save_model(llama, words, tmp_path / "cut", sh.Plan(6, (Block(1, 3),)))
    return tmp_path / "cut"


# Comparing cuts.


def test_a_comparison_measures_the_best_and_the_deepest_block_of_every_size(llama, words, scanned):
    comparison = sh.compare_cuts(llama, words, scanned, HELD_OUT, [1, 3])
    assert comparison.base == sh.evaluate_loss(llama, words, HELD_OUT)
    assert [(cut.strategy, cut.block) for cut in comparison.cuts] == [
        ("similarity", scanned.best_block(1)),
        ("deepest", Block(4, 5)),
        ("similarity", scanned.best_block(3)),
        ("deepest", Block(2, 5)),
    ]
    for cut in comparison.cuts:
        with sh.without_layers(llama, [cut.block]):
            assert cut.loss == sh.evaluate_loss(llama, words, HELD_OUT)
        where = cut.block.start, cut.block.stop
        assert cut.block.score == scanned.mean()[where]
        assert cut.block.stderr == scanned.stderr()[where]


def test_a_comparison_by_cosine_scores_by_one_minus_cosine(llama, words):
    scanned = sh.scan(llama, words, TEXTS, metrics=("cosine",))
    comparison = sh.compare_cuts(llama, words, scanned, HELD_OUT, [2])
    for cut in comparison.cuts:
        expected = 1 - scanned.mean("cosine")[cut.block.start, cut.block.stop]
        assert cut.block.score == expected


def test_a_block_that_is_best_and_deepest_has_two_rows_of_one_loss(words):
    llama = tiny_llama(num_layers=2)
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight.zero_()
        llama.model.layers[0].self_attn.o_proj.weight.zero_()
    scanned = sh.scan(llama, words, TEXTS)
    best, deepest = sh.compare_cuts(llama, words, scanned, HELD_OUT, [1]).cuts
    assert best.block == deepest.block == Block(0, 1)
    assert best.block.score == deepest.block.score == 0
    assert best.loss == deepest.loss
    assert {best.strategy, deepest.strategy} == {"similarity", "deepest"}


def test_held_out_texts_may_be_an_iterator(llama, words, scanned):
    expected = sh.compare_cuts(llama, words, scanned, HELD_OUT, [1, 2])
    assert sh.compare_cuts(llama, words, scanned, once(HELD_OUT), [1, 2]) == expected


def test_a_comparison_leaves_the_model_as_it_was(llama, words, scanned):
    llama.train()
    before = state_of(llama)
    sh.compare_cuts(llama, words, scanned, HELD_OUT, [1, 2, 5])
    assert_same(before, state_of(llama))


def test_a_failing_comparison_leaves_the_model_as_it_was(llama, words, scanned):
    before = state_of(llama)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt

    handle = llama.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        sh.compare_cuts(llama, words, scanned, HELD_OUT, [2])
    handle.remove()
    assert_same(before, state_of(llama))


@pytest.mark.parametrize("sizes", [[0], [6], [1, 99], [-1], []])
def test_sizes_that_the_model_cannot_lose_are_refused_before_any_work(
    llama, words, scanned, sizes, tmp_path
):
    with pytest.raises(LayersError):
        sh.compare_cuts(llama, words, scanned, Unread(), sizes)
    with pytest.raises(LayersError):
        sh.run(llama, words, Unread(), Unread(), tmp_path / "out", sizes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
@pytest.mark.parametrize("texts", [[], [""], ["w1"]])
def test_a_comparison_needs_a_text_of_two_tokens(llama, words, scanned, texts):
    with pytest.raises(TextsError):
        sh.compare_cuts(llama, words, scanned, texts, [1])


def test_a_scan_of_another_depth_is_refused(words, scanned):
    with pytest.raises(sh.ShallowerError):
        sh.compare_cuts(tiny_llama(num_layers=8), words, scanned, HELD_OUT, [1])


# An interrupted scan.


def interrupted(model, tokenizer, path, texts, count, monkeypatch, **options):
    """Scan until the texts break, saving after every window."""
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "SECONDS_BETWEEN_CHECKPOINTS", -1)
        with pytest.raises(OSError, match="the disk went away"):
            sh.scan(model, tokenizer, broken_after(texts, count), checkpoint=path, **options)


@pytest.mark.parametrize("count", [16, 20, 40])
def test_a_resumed_scan_has_the_same_bytes(llama, words, tmp_path, monkeypatch, count):
    texts = documents(56)
    sh.scan(llama, words, texts, batch_size=1).save(tmp_path / "whole")
    interrupted(llama, words, tmp_path / "partial", texts, count, monkeypatch, batch_size=1)
    assert Scan.load(tmp_path / "partial").num_samples == count // 16 * 16
    resumed = sh.scan(llama, words, texts, batch_size=1, checkpoint=tmp_path / "partial")
    resumed.save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
def test_a_resumed_scan_has_the_same_rejections(llama, words, tmp_path, monkeypatch):
    texts = documents(48)
    texts[3] = texts[20] = texts[40] = ""
    whole = sh.scan(llama, words, texts, batch_size=1)
    interrupted(llama, words, tmp_path / "partial", texts, 33, monkeypatch, batch_size=1)
    resumed = sh.scan(llama, words, texts, batch_size=1, checkpoint=tmp_path / "partial")
    assert [rejection.sample for rejection in whole.rejections] == [3, 20, 40]
    assert resumed.rejections == whole.rejections
    assert resumed.num_rejected == whole.num_rejected == 3
    whole.save(tmp_path / "whole")
    resumed.save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_finished_scan_resumes_to_itself(llama, words, tmp_path):
    whole = sh.scan(llama, words, TEXTS, checkpoint=tmp_path / "partial")
    again = sh.scan(llama, words, TEXTS, checkpoint=tmp_path / "partial")
    assert again.num_samples == whole.num_samples == len(TEXTS)
    assert (again.mean() == whole.mean()).all()


def test_a_scan_does_not_go_on_from_another_one(llama, words, tmp_path):
    sh.scan(llama, words, TEXTS, checkpoint=tmp_path / "partial")
    before = (tmp_path / "partial").read_bytes()
    others = [
        (llama, words, HELD_OUT, {}),
        (llama, words, TEXTS[:-1], {}),
        (llama, words, ["w1", *TEXTS[1:]], {}),
        (llama, words, TEXTS, {"max_length": 5}),
        (llama, words, TEXTS, {"metrics": ("cosine",)}),
        (tiny_llama(num_layers=5), words, TEXTS, {}),
        (copy.deepcopy(llama).bfloat16(), words, TEXTS, {}),
    ]
    for model, tokenizer, texts, options in others:
        with pytest.raises(ScanError, match=r"partial.*delete it to start anew"):
            sh.scan(model, tokenizer, texts, checkpoint=tmp_path / "partial", **options)
        assert (tmp_path / "partial").read_bytes() == before


def test_a_damaged_checkpoint_is_refused(llama, words, tmp_path):
    sh.scan(llama, words, TEXTS, checkpoint=tmp_path / "partial")
    (tmp_path / "partial").write_bytes((tmp_path / "partial").read_bytes()[:500])
    with pytest.raises(ScanError, match="partial"):
        sh.scan(llama, words, TEXTS, checkpoint=tmp_path / "partial")


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_scan_that_finds_nothing_leaves_no_checkpoint(llama, words, tmp_path, texts):
    with pytest.raises((TextsError, sh.StatesError)):
        sh.scan(llama, words, texts, checkpoint=tmp_path / "partial")
    assert list(tmp_path.iterdir()) == []


# The whole way.


def test_a_run_leaves_what_the_stages_give(llama, words, tmp_path):
    before = state_of(llama)
    done = sh.run(llama, words, once(TEXTS), once(HELD_OUT), tmp_path / "out", [2, 1])
    assert_same(before, state_of(llama))

    scanned = sh.scan(llama, words, TEXTS)
    assert (done.scan.mean() == scanned.mean()).all()
    assert done.plan == scanned.plan(2)
    assert done.comparison == sh.compare_cuts(llama, words, scanned, HELD_OUT, [2, 1])
    assert done.difference <= 1e-5
    assert done.out == tmp_path / "out"

    assert {path.name for path in done.out.iterdir()} == {
        "scan.safetensors",
        "shallower_plan.json",
        "results.json",
        "checkpoint",
    }
    assert (Scan.load(done.out / "scan.safetensors").mean() == scanned.mean()).all()
    assert sh.Plan.load(done.out / "shallower_plan.json") == done.plan
    assert sh.Plan.load(done.out / "checkpoint" / "shallower_plan.json") == done.plan
    results = json.loads((done.out / "results.json").read_text(), parse_constant=pytest.fail)
    assert results == done.to_json()
    assert results["num_samples"] == len(TEXTS)
    assert len(results["cuts"]) == 4

    reloaded = AutoModelForCausalLM.from_pretrained(done.out / "checkpoint", dtype=torch.float32)
    assert len(reloaded.model.layers) == 4
    kept = [llama.model.layers[index] for index in done.plan.survivors]
    for layer, original in zip(reloaded.model.layers, kept, strict=True):
        for name, weight in original.state_dict().items():
            assert torch.equal(layer.state_dict()[name], weight)


def test_a_run_continues_the_prompt_with_and_without_the_layers(llama, words, tmp_path):
    done = sh.run(llama, words, TEXTS, HELD_OUT, tmp_path / "out", [3], prompt="w5 w7 w11")
    assert done.before == continue_text(llama, words, "w5 w7 w11")
    with sh.without_layers(llama, done.plan.blocks):
        assert done.after == continue_text(llama, words, "w5 w7 w11")
    assert done.before.startswith("w5 w7 w11 ")


def test_an_interrupted_run_goes_on_where_its_scan_was(llama, words, tmp_path, monkeypatch):
    texts = documents(200)
    monkeypatch.setattr(pipeline, "SECONDS_BETWEEN_CHECKPOINTS", -1)
    with pytest.raises(OSError, match="the disk went away"):
        sh.run(llama, words, broken_after(texts, 150), HELD_OUT, tmp_path / "out", [1])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {pipeline.PARTIAL_FILE}

    forwards = []
    handle = llama.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    sh.scan(llama, words, texts, checkpoint=tmp_path / "out" / pipeline.PARTIAL_FILE)
    handle.remove()
    assert len(forwards) == (200 - 128) // 8

    done = sh.run(llama, words, texts, HELD_OUT, tmp_path / "out", [1])
    assert done.scan.num_samples == 200
    assert not (tmp_path / "out" / pipeline.PARTIAL_FILE).exists()


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_run_without_texts_leaves_nothing(llama, words, tmp_path, texts):
    with pytest.raises((TextsError, sh.StatesError)):
        sh.run(llama, words, texts, HELD_OUT, tmp_path / "out", [1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("eval_texts", [[], ["w1", ""]])
def test_a_run_without_held_out_texts_is_refused_before_the_scan(
    llama, words, tmp_path, eval_texts
):
    with pytest.raises(TextsError):
        sh.run(llama, words, Unread(), eval_texts, tmp_path / "out", [1])
    assert not (tmp_path / "out").exists()


def test_a_second_run_needs_overwrite_before_any_work(llama, words, tmp_path):
    sh.run(llama, words, TEXTS, HELD_OUT, tmp_path / "out", [1])
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(sh.OutputError, match="exists already"):
        sh.run(llama, words, Unread(), HELD_OUT, tmp_path / "out", [2])
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    done = sh.run(llama, words, TEXTS, HELD_OUT, tmp_path / "out", [2], overwrite=True)
    assert json.loads((done.out / "results.json").read_text()) == done.to_json()
    assert len(sh.Plan.load(done.out / "checkpoint" / "shallower_plan.json").dropped) == 2


# Checking a saved cut.


def test_a_faithful_checkpoint_passes(llama, words, checkpoint):
    before = state_of(llama)
    assert sh.verify_checkpoint(llama, words, checkpoint, [Block(1, 3)], "w1 w2 w3") <= 1e-5
    assert_same(before, state_of(llama))


def test_a_long_text_is_cut_to_what_fits(llama, words, checkpoint):
    text = "w1 w2 w3 " * 1000
    assert sh.verify_checkpoint(llama, words, checkpoint, [Block(1, 3)], text) <= 1e-5


def test_other_layers_than_those_dropped_do_not_pass(llama, words, checkpoint):
    with pytest.raises(ModelError, match="logits are off by"):
        sh.verify_checkpoint(llama, words, checkpoint, [Block(2, 4)], "w1 w2 w3")


@pytest.fixture
def tamper(checkpoint):
    """Change the saved weights."""

    def tampered(change):
        weights = load_file(checkpoint / "model.safetensors")
        change(weights)
        save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})

    return tampered


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("factor", [1.01, float("nan"), float("inf")])
def test_a_tampered_checkpoint_does_not_pass(llama, words, checkpoint, tamper, factor):
    tamper(lambda weights: weights[NORM].mul_(factor))
    with pytest.raises(ModelError, match=r"cut is not the model.*logits are off by"):
        sh.verify_checkpoint(llama, words, checkpoint, [Block(1, 3)], "w1 w2 w3")


def test_a_checkpoint_that_lacks_a_weight_does_not_pass(llama, words, checkpoint, tamper):
    tamper(lambda weights: weights.pop(NORM))
    with pytest.raises(ModelError, match=f"lacks the weights.*{NORM}"):
        sh.verify_checkpoint(llama, words, checkpoint, [Block(1, 3)], "w1 w2 w3")


def test_a_checkpoint_with_a_weight_of_another_shape_does_not_pass(
    llama, words, checkpoint, tamper
):
    tamper(lambda weights: weights.update({NORM: torch.ones(31)}))
    with pytest.raises(ModelError, match="cut"):
        sh.verify_checkpoint(llama, words, checkpoint, [Block(1, 3)], "w1 w2 w3")


def test_a_checkpoint_that_cannot_be_read_does_not_pass(llama, words, checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cut"):
        sh.verify_checkpoint(llama, words, checkpoint, [Block(1, 3)], "w1 w2 w3")
    shutil.rmtree(checkpoint)
    with pytest.raises(ModelError, match="cut"):
        sh.verify_checkpoint(llama, words, checkpoint, [Block(1, 3)], "w1 w2 w3")


def test_the_difference_of_logits_is_the_greatest_one(llama, checkpoint):
    changed = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        changed.lm_head.weight[7] *= 2
        expected = changed(input_ids=PROBE).logits
    changed.save_pretrained(checkpoint)
    with torch.inference_mode(), sh.without_layers(llama, [Block(1, 3)]):
        faithful = llama(input_ids=PROBE).logits
    got = logits_difference(llama, checkpoint, [Block(1, 3)], PROBE)
    assert got == pytest.approx(float((expected - faithful).abs().max()), abs=1e-6)
    assert got > 1e-3


# Continuing a text.


def test_a_continuation_is_greedy(llama, words):
    ids = words("w3 w1 w4", return_tensors="pt")["input_ids"]
    for _ in range(5):
        with torch.inference_mode():
            following = llama(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
    expected = words.decode(ids[0], skip_special_tokens=True)
    assert continue_text(llama, words, "w3 w1 w4", num_tokens=5) == expected


def test_a_continuation_is_greedy_whatever_the_model_prefers(llama, words):
    expected = continue_text(llama, words, "w3 w1 w4")
    llama.generation_config.update(do_sample=True, temperature=5.0, top_k=3)
    assert {continue_text(llama, words, "w3 w1 w4") for _ in range(3)} == {expected}


# Positions.


SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LEARNED = {
    "gpt2": GPT2LMHeadModel(GPT2Config(**SMALL, n_positions=9)),
    "opt": OPTForCausalLM(
        OPTConfig(**SMALL, max_position_embeddings=9, ffn_dim=48, word_embed_proj_dim=32)
    ),
    "biogpt": BioGptForCausalLM(
        BioGptConfig(**SMALL, max_position_embeddings=9, intermediate_size=48)
    ),
}


@pytest.mark.parametrize("family", LEARNED)
def test_a_text_longer_than_the_learned_positions_is_refused_before_the_forward(words, family):
    model = LEARNED[family].eval()
    longest, longer = ["w1 " * 9, "w2 w3"], ["w1 " * 10, "w2 w3"]
    for measure in (sh.scan, sh.evaluate_loss):
        measure(model, words, longest)
        measure(model, words, longer, max_length=9)
        with pytest.raises(TextsError, match=r"10 tokens, .*9 positions: choose a max_length"):
            measure(model, words, longer)


def test_a_text_may_be_longer_than_computed_positions(words):
    model = tiny_llama()
    assert model.config.max_position_embeddings == 128
    text = [" ".join(random.Random(1).choices(WORDS, k=140))]
    assert sh.scan(model, words, text).num_samples == 1
    assert sh.evaluate_loss(model, words, text).num_tokens == 139
