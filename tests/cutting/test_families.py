"""Every family: cut, saved, reloaded by stock transformers, and compared with a forward that skips.

The oracle runs the uncut model and lets the dropped layers pass on what they were given."""

import copy
import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import shallower as sh
from shallower.cutting.checkpoint import prepare
from shallower.models.architecture import find_layers, text_config
from tests.commands import in_this_process
from tests.conftest import mostly_slow
from tests.families import (
    DROP_SETS,
    FAST,
    IS_OLDER,
    MIXTURES,
    NUM_LAYERS,
    REFUSED,
    SCALES,
    UNTESTED,
    VARIANTS,
    families,
    random_model,
)
from tests.families_page import DOCUMENT, table

CACHE_DIFFERS = {"cpmant", "xlstm"}
"""Whose generation with a cache differs from that without, uncut."""


def passing_on(module, args, kwargs, output):
    """What a layer gives that does nothing: what it was given."""
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    if isinstance(output, torch.Tensor):
        return given[names[0]]
    kept = [given[names[0]], *output[1:]]
    if "prev_router_hidden_states" in given:  # Zaya's second stream
        kept[1] = given["prev_router_hidden_states"]
    return type(output)(kept)


def skipping(model, dropped, tokens):
    skipped = copy.deepcopy(model)
    for index in dropped:
        layer = find_layers(skipped).modules[index]
        layer.register_forward_hook(passing_on, with_kwargs=True)
        if hasattr(layer, "is_block_boundary"):  # Inkling 2: no block starts with what is not there
            layer.is_block_boundary = False
    return logits(skipped, tokens)


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def generation(model, tokens, use_cache):
    mask = torch.ones_like(tokens)
    return model.generate(
        tokens, attention_mask=mask, do_sample=False, max_new_tokens=3, min_new_tokens=3,
        use_cache=use_cache, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


def check_generation(model, tokens):
    cached, plain = generation(model, tokens, True), generation(model, tokens, False)
    assert torch.equal(cached.sequences, plain.sequences)
    scale = max(float(step.abs().max()) for step in plain.logits)
    torch.testing.assert_close(cached.logits, plain.logits, rtol=0, atol=5e-3 * scale)


def reload(model, path):
    sh.save_model(model, None, path)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    except ValueError as error:
        if "Unrecognized configuration" not in str(error):
            raise
        loaded = type(model).from_pretrained(path, output_loading_info=True)
    found, info = loaded
    assert not any(info.values())
    return found.eval()


def check_lists(config, kept):
    """No list is of the old number of layers, unless it never was per layer."""
    before = small_layer_lists(config)
    assert all(length == kept for length in before.values()), before


def small_layer_lists(config):
    names = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")
    lists = {name: vars(config).get(name) for name in names}
    return {name: len(value) for name, value in lists.items() if isinstance(value, list)}


def check_family(name, tmp_path, drop_sets=DROP_SETS):
    model = random_model(name)
    assert len(find_layers(model)) == NUM_LAYERS
    tokens = torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(2))
    whole = logits(model, tokens)
    assert torch.isfinite(whole).all()
    for title, dropped in ((title, DROP_SETS[title]) for title in drop_sets):
        cut = copy.deepcopy(model)
        config = cut.config.to_json_string()
        reason = REFUSED.get(name, {}).get(title)
        if reason:
            with pytest.raises(sh.ModelError, match=reason):
                sh.drop_layers(cut, dropped)
            assert cut.config.to_json_string() == config
            assert torch.equal(logits(cut, tokens), whole)
            continue
        wanted = skipping(model, dropped, tokens)
        sh.drop_layers(cut, dropped)
        found = reload(cut, tmp_path / title)
        kept = NUM_LAYERS - len(dropped)
        assert len(find_layers(found)) == kept
        check_lists(text_config(found), kept)
        scale = max(1.0, float(wanted.abs().max()))
        tolerance = SCALES.get(name, 1e-5) * scale
        torch.testing.assert_close(logits(found, tokens), wanted, rtol=0, atol=tolerance)
        assert float((wanted - whole).abs().max()) > 100 * tolerance, "the layers do nothing"
        if name not in CACHE_DIFFERS:
            check_generation(found, tokens[:1])


@pytest.mark.parametrize(
    ("name", "title"),
    [
        *((name, "scattered") for name in FAST),
        ("gemma3n_text", "first"),  # inputs of every layer in one table
        ("kimi_linear", "middle"),  # no attention would be left
        ("qwen3_moe", "scattered"),  # indices of layers
        ("zamba2", "middle"),  # layers that share weights
    ],
)
def test_a_cut_is_the_model_without_its_layers(name, title, tmp_path):
    check_family(name, tmp_path, [title])


@pytest.mark.slow
@pytest.mark.parametrize("name", families())
def test_so_it_is_for_every_family_and_cut(name, tmp_path):
    check_family(name, tmp_path)


@pytest.mark.skipif(IS_OLDER, reason="the lists are of a later transformers")
def test_every_model_type_is_tested_or_named():
    known = set(families()) | set(UNTESTED)
    assert known == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | set(VARIANTS)
    assert set(REFUSED) <= set(families())


@pytest.mark.slow
@pytest.mark.skipif(IS_OLDER, reason="the lists are of a later transformers")
def test_the_document_says_what_is_tested():
    assert DOCUMENT.read_text() == table(), "make families writes it anew"


def test_the_document_names_each_mixture_once():
    (named,) = (line for line in DOCUMENT.read_text().splitlines() if line.startswith("afmoe;"))
    assert named.rstrip(".").split("; ") == MIXTURES  # some have a comma in their names


def test_tables_beside_the_layers_are_cut_in_memory(tmp_path, words):
    model = random_model("gemma3n_text")
    dropped = range(6, 8) if IS_OLDER else range(2)  # others are refused by an older one
    sh.save_model(model, words, tmp_path / "whole")
    with pytest.raises(sh.InMemoryOnlyError, match="embed_tokens_per_layer"):
        prepare(tmp_path / "whole", list(dropped))
    assert not (tmp_path / "cut").exists()
    places = ["--drop", f"{dropped.start}:{dropped.stop}", "--out", str(tmp_path / "cut")]
    done = in_this_process("prune", str(tmp_path / "whole"), *places, "--verify")
    assert done.status == 0, done.err
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert found.config.num_hidden_layers == 6
    assert found.model.embed_tokens_per_layer.weight.shape == (128, 6 * 8)


@pytest.mark.parametrize(
    "name",
    mostly_slow(["gemma4_text", "zamba2", "longcat_flash", "zamba", "rwkv"], ["zamba2", "rwkv"]),
)
def test_layers_left_out_for_a_while_come_back(name):
    model = random_model(name)
    tokens = torch.randint(3, 100, (1, 9))
    before, config = logits(model, tokens), model.config.to_json_string()
    with sh.without_layers(model, [4, 5]):
        assert len(find_layers(model)) == NUM_LAYERS - 2
        assert not torch.equal(logits(model, tokens), before)
    assert model.config.to_json_string() == config
    assert torch.equal(logits(model, tokens), before)
