"""Reports of folders: recognised by their files, their numbers those of the files."""

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import LlamaConfig

import shallower as sh
from shallower import OutputError
from shallower.cutting.checkpoint_files import count_weights
from shallower.reporting import report as reports
from shallower.reporting.report import read_story, report
from shallower.reporting.results import Run
from shallower.reporting.stories.comparison import comparison_story
from shallower.reporting.stories.run import UNFINISHED, run_story
from shallower.reporting.words import layer_words
from shallower.results.scores import Difference
from tests.reporting.comparisons import comparison, curve
from tests.reporting.stories import loss, made_run, write


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run in its folder, and its page."""
    folder = tmp_path_factory.mktemp("made") / "run"
    done = made_run(folder)
    return done, report(folder)


def told(done, **options):
    return run_story(done, drawn=False, **options)


# What is written.
def test_a_run_gets_a_page_markdown_json_and_figures(made):
    done, page = made
    assert page == done.out / "report.html"
    written = {path.name for path in done.out.iterdir()}
    assert written == {
        "results.json", "scan.safetensors", "report.html", "report.md", "report.json", "figures",
    }  # fmt: skip
    names = {"proposals", "least_distance", "heat_map_rescaled", "heat_map_raw"}
    figures = {path.name for path in (done.out / "figures").iterdir()}
    assert figures == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    text = (done.out / "report.md").read_text()
    assert set(re.findall(r"figures/(\w+)\.png", text)) == names


def test_a_place_that_is_read_only_is_refused(made, tmp_path, monkeypatch):
    def refuse(path, *_args, **_options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for name in ("open", "unlink"):  # as a file system that is mounted so does
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(OutputError, match="read-only file system"):
        report(made[0].out, tmp_path / "page.html")


def test_the_numbers_are_those_of_the_run(made):
    done, page = made
    best = done.recommended
    told = json.loads((done.out / "report.json").read_text(), parse_constant=pytest.fail)
    assert told["sentence"] == best.sentence()
    assert told["dropped"] == {"layers that go": list(best.plan.dropped)}
    facts = {fact["name"]: fact for fact in told["facts"]}
    for name in ("whole", "cut", "patched"):
        fact = facts[f"{name}, nats a token"]
        assert fact["value"] == getattr(best, name).nats
        assert fact["source"].startswith(f"results.json: recommended.losses.{name}; ")
        fact = facts[f"{name} out of domain, nats a token"]
        assert fact["value"] == best.out_of_domain[name].nats
        assert fact["source"].startswith(f"results.json: recommended.out_of_domain.{name}; ")
    assert facts["lost, nats a token"]["value"] == best.difference.mean
    assert all(fact["source"] for fact in told["facts"])
    assert told["data"]["recommended"]["dropped"] == list(best.plan.dropped)
    assert "by_text" not in page.read_text()
    ratio = np.exp(best.difference.mean)
    assert re.search(rf"is {ratio:.2f}\d? times that of the whole model", told["cost"])
    assert done.command.replace(" --", " \\\n    --") in page.read_text()


def test_the_page_is_the_same_each_time_and_can_lie_elsewhere(made, tmp_path):
    done, page = made
    there = sh.report(done.out, tmp_path / "told" / "page.html")
    assert there == tmp_path / "told" / "page.html"
    assert there.read_bytes() == page.read_bytes()
    assert (tmp_path / "told" / "page.md").is_file()
    assert (tmp_path / "told" / "figures" / "proposals.svg").is_file()


def test_without_matplotlib_there_is_a_page_without_figures(made, tmp_path, monkeypatch):
    done, _ = made
    monkeypatch.setattr(reports, "find_spec", lambda _: None)
    with pytest.warns(UserWarning, match=r"no figures: .* pip install 'shallower\[figures\]'"):
        page = report(done.out, tmp_path / "page.html").read_text()
    assert "<svg" not in page
    assert "Proposals that came into the last race" in page
    assert not (tmp_path / "figures").exists()


def test_without_matplotlib_a_page_with_figures_stays(made, tmp_path, monkeypatch):
    """It is refused before a story is made, and nothing is said beside that."""
    done, _ = made
    page = report(done.out, tmp_path / "page.html")
    before = page.read_bytes()
    monkeypatch.setattr(reports, "find_spec", lambda _: None)
    monkeypatch.setattr(reports, "track", None)
    with pytest.raises(OutputError, match=r"has figures, and is not replaced .* 'shallower\[fig"):
        report(done.out, page)
    assert page.read_bytes() == before


# Comparisons.
@pytest.mark.parametrize(("found", "what"), [(comparison, "compare"), (curve, "curve")])
def test_a_comparison_is_read_from_its_file(tmp_path, found, what):
    command = f"shallower {what} X"
    write(tmp_path, "comparison.json", found(), command=command)
    story = read_story(tmp_path, drawn=False)
    assert story.kind == "comparison"
    told = comparison_story(found(), command=command, folder=tmp_path.name, drawn=False)
    assert replace(story, data={}) == replace(told, data={})
    (again,) = (section for section in story.sections if section.title == "Make it again")
    assert again.commands[0] == command


def test_what_has_not_ended_says_so_first(made):
    done, _ = made
    assert UNFINISHED not in told(done).warnings
    assert told(replace(done, marks={})).warnings[0] == UNFINISHED


@pytest.mark.parametrize(
    ("source", "left", "warned"),
    [
        (None, "1 MB", ""),
        (("SmolLM2", 3_000_000), "1 MB, of 3 MB", ""),
        (("smol.q4.gguf", 3_000_000), "1 MB, of 3 MB", "dequantised"),
        (("smol.q4.gguf", 300_000), None, "dequantised"),
        (("SmolLM2", 600_000), None, "another dtype (--dtype)"),
    ],
)
def test_what_is_left_is_a_saving_only_where_it_is_less(tmp_path, source, left, warned):
    done = replace(made_run(tmp_path / "run"), source=source)
    done.save()
    done.checkpoint.mkdir()
    save_file({"weight": np.zeros((500, 500), np.float32)}, done.checkpoint / "model.safetensors")
    story = told(Run.load(tmp_path / "run"))
    assert {fact.name: fact.value for fact in story.savings}.get("weights on disk") == left
    found = [one for one in story.warnings if "what is left has 1 MB" in one]
    assert len(found) == bool(warned)
    if warned:
        assert warned in found[0]
        size = f"{source[0]} has {source[1] / 1e6:,.0f} MB of "
        assert found[0].startswith(size)
    if warned == "dequantised":
        assert f"shallower prune {source[0]} --drop 12:16 --as-gguf" in found[0]


def test_a_small_model_is_named_on_every_page():
    small, found = {"parameters": 134_515_008}, comparison()
    models = tuple(replace(model, **small, dtype="bfloat16") for model in found.models)
    found = replace(found, models=models, max_length=256, versions={"torch": "2.15.0"})
    story = comparison_story(found, drawn=False)
    assert any("the model is small, 135 million" in warning for warning in story.warnings)
    large = comparison_story(curve(), drawn=False)
    assert not any("is small" in warning for warning in large.warnings)
    facts = [fact.value for section in story.sections for fact in section.facts]
    assert {"bfloat16", "2.15.0"} <= {fact for fact in facts if isinstance(fact, str)}
    assert any("at most 256 tokens" in line for line in story.sections[-1].lines)


@pytest.mark.parametrize(("shift", "warned"), [(0.1, False), (0.5, True)])
def test_selection_and_test_texts_are_compared(made, shift, warned):
    done, _ = made
    patched = replace(done.recommended.patched, nats=3.4 + shift, stderr=0.04)
    best = replace(done.recommended, patched=patched)
    warnings = told(replace(done, recommended=best)).warnings
    assert any("differ from the test texts" in one for one in warnings) == warned


def test_an_unstable_choice_by_distance_is_warned_of(made):
    done, _ = made
    share = done.scan.bootstrap(1000, metric="angular")[4].probability
    found = [one for one in told(done).warnings if "l*(4)" in one]
    assert bool(found) == (share < 0.5)
    if found:
        assert f"{100 * share:.0f} % find the same" in found[0]


def test_few_texts_and_small_models_are_warned_of(made, tmp_path):
    done = replace(made[0], out=tmp_path)
    (tmp_path / "checkpoint").mkdir()
    weights = {"a": np.zeros((20, 5), np.float32), "b": np.zeros(7, np.float16)}
    save_file(weights, tmp_path / "checkpoint" / "model.safetensors")
    few = replace(loss(), num_texts=12)
    best = replace(done.recommended, whole=few)
    warnings = told(replace(done, recommended=best)).warnings
    assert any(one.startswith("the model is small") for one in warnings)
    assert any(one.startswith("the losses are of 12 texts") for one in warnings)


# What a cut saves and gains.
def test_weights_are_counted_by_their_headers(tmp_path):
    assert count_weights(tmp_path) is None
    save_file({"a": np.zeros((20, 5), np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"b": np.zeros(7, np.float16)}, tmp_path / "model-2.safetensors")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert count_weights(tmp_path) == (107, size)
    save_file({"packed": np.zeros(7, np.uint8)}, tmp_path / "model-3.safetensors")
    assert count_weights(tmp_path)[0] is None
    (tmp_path / "model-4.safetensors").write_bytes(b"\xff" * 40)
    assert count_weights(tmp_path) is None


def test_gains_that_lie_beside_are_told(made, tmp_path):
    made_run(tmp_path)
    found = sh.gain(LlamaConfig(num_hidden_layers=4), [2], device="a100-80")
    (tmp_path / "gain.json").write_text(json.dumps(found.to_json()))
    story = read_story(tmp_path, drawn=True)
    titles = [table for part in story.sections for table in part.tables]
    (gain,) = (table for table in titles if table.title.startswith("What it gains"))
    assert gain.rows[0] == ("layers", "4", "3", "0.750")
    assert gain.rows[-1][0] == "A100 SXM 80GB, token"


@pytest.mark.parametrize(
    ("layers", "words"), [((3,), "3"), ((3, 12, 13, 14), "3, 12 to 14"), ((0, 1), "0 to 1")]
)
def test_layers_are_said_without_ranges(layers, words):
    assert layer_words(layers) == words


def test_a_loss_that_fell_is_told(made):
    best = replace(made[0].recommended, patched=loss(-0.05))
    story = told(replace(made[0], recommended=best))
    assert re.search(r"is 0\.95\d? times that of the whole model", story.cost)
    assert story.steps[2].share == 0


def test_a_run_with_one_proposal_is_told(made):
    done, _ = made
    alone = replace(done.recommended.verified, candidates=done.recommended.verified.candidates[:1])
    best = replace(done.recommended, verified=alone, patched=None, by_distance=None)
    story = run_story(replace(done, recommended=best, continuations=()))
    assert [step.name for step in story.steps] == ["whole", "cut"]
    assert "proposals" not in [drawing.name for drawing in story.drawings]
    assert isinstance(done.recommended.by_distance, Difference)


# Folders that hold nothing, or what is damaged.
def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"holds no results: expected the folder of a run \(res"):
        report(tmp_path)
    with pytest.raises(OutputError, match="holds no results"):
        report(tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore:the page has no figures")
@pytest.mark.parametrize("name", ["comparison.json", "README.md"])
def test_results_and_words_of_others_are_not_replaced(tmp_path, monkeypatch, name):
    monkeypatch.setattr(reports, "find_spec", lambda _: None)  # without figures
    write(tmp_path, "comparison.json", curve())
    (tmp_path / "README.md").write_text("A card.")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(OutputError, match=rf"{name} is there already, and no page has written it"):
        report(tmp_path, (tmp_path / name).with_suffix(".html"))
    assert (tmp_path / name).read_bytes() == before
    assert not (tmp_path / name).with_suffix(".html").exists()
    assert report(tmp_path) == report(tmp_path)


@pytest.mark.parametrize("name", ["results.json", "comparison.json", "gain.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 1}', b"\xff\xfe", b"[" * 9000])
def test_what_is_damaged_is_named_in_one_sentence(tmp_path, name, content):
    if name == "gain.json":
        made_run(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OutputError, match=re.escape(name)) as raised:
        report(tmp_path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_has_not_ended_is_refused(tmp_path):
    replace(made_run(tmp_path), recommended=None, continuations=()).save()
    assert Run.load(tmp_path).recommended is None
    with pytest.raises(OutputError, match="a run that has not ended: call shallower run again"):
        report(tmp_path)


def test_a_place_that_is_no_page_is_refused(made, tmp_path):
    for place in (tmp_path, tmp_path / "page.md"):
        with pytest.raises(OutputError, match=r"expected the place of a page, as page\.html"):
            report(made[0].out, place)
