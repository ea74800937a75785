"""`draft.py` on tiny models: a draft that is its parent, and one that is not."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import draft
import shallower as sh
from shallower.values.draft import speedup


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def bench():
    prompts = [torch.arange(start, start + 8)[None] for start in (3, 20, 40)]
    return draft.Bench(model(), prompts, 24, eos=2, dtype="float32")


def test_a_draft_that_is_its_parent_is_accepted(bench):
    row = bench.row("itself", model(), 1)
    assert row["acceptance"] == row["acceptance_drafting"] == row["accepted_of_proposed"] == 1
    assert row["different"] == []
    assert row["num_timed"] == 3


def test_a_cut_in_miniature(bench):
    cut = model()
    sh.drop_layers(cut, [4])
    row = bench.row("cut", cut, 1)
    assert row["num_layers"] == 5
    assert 0 <= row["acceptance"] < 1
    assert row["expected"] == speedup(row["acceptance"], row["cost"], row["length"])
    assert row["accepted_of_proposed"] <= row["acceptance_drafting"] < 1
    assert row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1]
    assert draft.line(row).startswith("cut, 5 layers: α ")


def test_what_is_accepted_is_counted(bench):
    """A draft that says the whole model's text, but for every third token."""
    cut = model()
    cut.generation_config.num_assistant_tokens = 4
    cut.generation_config.num_assistant_tokens_schedule = "constant"
    cut.generation_config.assistant_confidence_threshold = 0.0

    def every_third(module, args, kwargs, output):
        if output.cache.get_seq_length() % 3 == 0:
            output.logits = -output.logits
        return output

    with torch.no_grad():
        hook = cut.register_forward_hook(every_third, with_kwargs=True)
        different, accepted, share = bench.check(cut, 4)
        hook.remove()
    assert different == []
    assert accepted == pytest.approx(2 / 3, abs=0.06)
    assert share <= 0.5


def test_a_text_that_is_no_tie_is_found(bench, monkeypatch):
    wrong = [text.clone() for text in bench.texts]
    wrong[1][5] = (wrong[1][5] + 1) % 64
    monkeypatch.setattr(bench, "texts", wrong)
    with pytest.raises(AssertionError, match="token 5 is another with a draft"):
        bench.check(model(), 2)
