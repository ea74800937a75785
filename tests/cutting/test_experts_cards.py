"""What lies beside a cut of experts: a card that is true, and no list of another tool."""

import itertools
import re

import pytest

import shallower as sh
from shallower.cutting.exports import EXPORT_FILES, export_files
from shallower.values.experts import DroppedExperts
from tests.conftest import mostly_slow
from tests.cutting.card_tools import (
    blocks_of_code,
    front,
    history,
    tell_no_paths,
    texts_of,
)
from tests.cutting.mixtures import mixture, some_experts


@pytest.fixture
def source(tmp_path, words):
    folder = tmp_path / "of" / "somebody" / "mix"
    sh.save_model(mixture("mixtral"), words, folder)
    return folder


@pytest.mark.parametrize(
    ("layers", "options"),
    mostly_slow(
        itertools.product([(), [2, 3]], [{}, {"dtype": "float16"}]),
        [([2, 3], {"dtype": "float16"})],
    ),
)
def test_a_card_makes_the_cut_again(source, tmp_path, carried_out, layers, options):
    first = tmp_path / "first"
    dropped = {k: some for k, some in some_experts(mixture("mixtral")).items() if k not in layers}
    plan = sh.prune(source, layers, first, experts=dropped, **options)
    beside = {path.name for path in first.iterdir()} & {*EXPORT_FILES, "shallower_plan.json"}
    assert beside == {"README.md", "shallower_plan.json"}
    card = (first / "README.md").read_text()
    tell_no_paths(first, tmp_path, "somebody")
    carried_out(card, first, source, plan=plan)


def test_a_cut_of_experts_of_a_cut_carries_no_list_of_layers(source, tmp_path):
    sh.prune(source, [2], tmp_path / "once")
    left = sh.load_model(tmp_path / "once")[0].config.num_hidden_layers
    experts = dict.fromkeys(range(left), (0, 1))
    sh.prune(tmp_path / "once", [], tmp_path / "twice", experts=experts)
    there = {path.name for path in (tmp_path / "twice").iterdir()}
    assert there & {*EXPORT_FILES} == {"README.md"}
    _, layers, last = history((tmp_path / "twice" / "README.md").read_text())
    assert layers.startswith("cut: without layers [2, 3), ")
    assert "experts" in last


PLAN = sh.Plan(6, (), experts=DroppedExperts(6, {layer: (0, layer) for layer in (1, 2, 4)}))


def test_a_card_says_what_went():
    texts = texts_of(PLAN, dtype="bfloat16")
    assert tuple(texts) == export_files(PLAN) == ("README.md",)
    card = texts["README.md"]
    assert "# a/tiny without 2 of 6 experts a layer\n" in card
    assert "Routed experts were cut out of `a/tiny`; `shallower_plan.json` names each" in card
    assert "| experts removed | 2 of 6 experts of each of the layers [1, 3) [4, 5) |" in card
    assert "| kept | [0, 6), 6 of 6 layers |" in card
    assert front(card)["tags"] == ["shallower", "expert-pruning"]
    assert not any(word in card for word in ("mergekit-yaml", "--prune-layers"))
    assert "--plan shallower_plan.json" in blocks_of_code(card, "sh")[0]


@pytest.mark.parametrize("plan", [PLAN, sh.Plan(6, (sh.Block(1, 3),))], ids=["experts", "layers"])
def test_a_card_beside_a_gguf_file_names_the_files_that_lie_there(plan):
    for options, before in (({}, "cut."), ({"as_gguf": True}, "")):
        card = texts_of(plan, gguf="cut.gguf", options=options)["README.md"]
        named = re.findall(r"[\w.]*(?:shallower_plan\.json|mergekit\.yaml)", card)
        expected = {"shallower_plan.json" if plan.experts else "mergekit.yaml"}
        assert {*named} == {f"{before}{name}" for name in expected}
