"""A cut in other tools: what the page tells of them, and what the cards print.

The page's own Python is run by test_examples.
"""

import re

import pytest
import torch
import yaml
from gguf import GGUFReader, GGUFValueType
from transformers import AutoModel

import shallower as sh
from tests.conftest import ROOT, tiny_llama
from tests.cutting import embedders, gguf_files
from tests.cutting.card_tools import blocks_of_code
from tests.examples import code_blocks, commands

PAGE = (ROOT / "docs" / "how-to" / "elsewhere.md").read_text(encoding="utf-8")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def blocks(language):
    return [code for kind, _, code in code_blocks(PAGE) if kind == language]


def written():
    """What the commands of the page write, by what they read."""
    found = [words for block in blocks("sh") for words in commands(block, "shallower")]
    return {words[1]: words[words.index("--out") + 1] for words in found}


def model_file(folder):
    extra = [("tokenizer.chat_template", TEMPLATE, GGUFValueType.STRING, None)]
    return gguf_files.write(folder / "model.gguf", num_layers=30, extra=extra)


def test_the_page_has_the_lines_of_the_cards(tmp_path, words):
    tiny_llama(num_layers=30).save_pretrained(tmp_path / "source")
    words.save_pretrained(tmp_path / "source")
    sh.prune(tmp_path / "source", [range(12, 20)], tmp_path / "cut")
    sh.prune(model_file(tmp_path), [range(12, 20)], tmp_path / "cut.gguf")
    for name in ("cut/README.md", "cut.README.md"):
        card = (tmp_path / name).read_text(encoding="utf-8")
        *_, serve, _ = blocks_of_code(card, "sh")
        assert serve in blocks("text")
        title = re.search(r"the page \*(.+)\* adds TRL", card)
        assert f"# {title[1]}\n" in PAGE


@pytest.mark.parametrize("as_gguf", [False, True])
def test_the_file_of_the_modelfile_is_written_with_its_chat_template(tmp_path, as_gguf):
    (modelfile,) = [block for block in blocks("text") if block.startswith("FROM ")]
    named = modelfile.splitlines()[0].removeprefix("FROM ")
    assert named == f"./{written()['model.gguf']}"
    out = tmp_path / ("cut" if as_gguf else named)
    sh.prune(model_file(tmp_path), [range(12, 20)], out, as_gguf=as_gguf)
    fields = GGUFReader((out if as_gguf else tmp_path) / named).fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert fields["llama.block_count"].contents() == 22


def config_of_axolotl():
    (config,) = blocks("yaml")
    return yaml.safe_load(config)


def test_axolotl_is_told_the_folder_that_the_page_cuts():
    config = config_of_axolotl()
    assert config["base_model"] == f"./{written()['HuggingFaceTB/SmolLM2-135M']}"
    assert f"`{config['datasets'][0]['path']}`" in PAGE


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}], ids=["on-disk", "in-memory"])
def test_a_cut_embedder_gives_the_vectors_of_its_source_without_the_layers(
    tmp_path, words, options
):
    from sentence_transformers import SentenceTransformer

    source = embedders.write(tmp_path / "embedder", words)
    sh.prune(source, [range(2, 4)], tmp_path / "cut", **options)
    cut = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    ids = torch.tensor([words("w1 w2 w3 w9 w8")["input_ids"]])  # the prompt goes before the query
    whole = AutoModel.from_pretrained(source, **options)
    with torch.no_grad(), sh.without_layers(whole, [range(2, 4)]):
        state = whole(input_ids=ids, use_cache=False).last_hidden_state[0, -1].float()
    got = torch.tensor(cut.encode("w3 w9 w8", prompt_name="query"))
    tolerance = 1e-2 if options else 1e-5
    assert torch.allclose(got, state / state.norm(), atol=tolerance)
    mean = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    mean[1].pooling_mode = "mean"
    assert not torch.allclose(torch.tensor(mean.encode("w1 w2 w3 w9 w8")), got, atol=0.05)
