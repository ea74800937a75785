"""What a page says of making it again ends in the numbers that it prints."""

import json
import re
import shlex
from pathlib import Path

import pytest

import shallower as sh
from shallower.cli.output import called, remember_call
from shallower.reporting.report import read_story
from shallower.reporting.results import Run
from shallower.reporting.words import out_of
from tests import examples
from tests.conftest import mostly_slow, write_jsonl
from tests.cutting.card_tools import blocks_of_code, cut_by, one_line

LOSSES = ("whole", "cut", "patched")
MODEL, TEXTS, EVAL_TEXTS = "kleines Modell", "Texte --für alle.jsonl", "andere Texte.jsonl"
"""Names that a shell does not take as they are."""


@pytest.fixture(scope="module")
def places(tmp_path_factory, words):
    """A folder with a model that has learned something, texts and held-out texts."""
    folder = tmp_path_factory.mktemp("noch einmal für alle")
    sh.save_model(examples.learned_llama(words, 3), words, folder / MODEL)
    write_jsonl(folder / TEXTS, examples.sentences(60, seed=1))
    write_jsonl(folder / EVAL_TEXTS, examples.sentences(20, seed=2))
    return folder


@pytest.fixture
def elsewhere(places, tmp_path, monkeypatch, shallower):
    """Another folder, in which the same names are there."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for place in places.iterdir():
        (folder / place.name).symlink_to(place)
    monkeypatch.chdir(folder)
    return folder


def commands_of(folder):
    sections = {one.title: one for one in read_story(folder, drawn=False).sections}
    return list(map(one_line, sections["Make it again"].commands))


def carry_out(commands, shallower, **places):
    """Carry commands out; the losses that those of ``eval`` print, by the words behind it."""
    found = {}
    for command in commands:
        if command.startswith("shallower eval "):
            _, _, model, *_ = words = shlex.split(command)
            losses = shallower(*(places.get(word, word) for word in words[1:]), "--json")
            assert losses.status == 0, losses.err
            found[model] = losses.json
        else:
            cut_by(command, shallower, **places)
    return found


def assert_found(done, found, model, folder):
    best = done.recommended
    wanted = {model: ("base", best.whole), f"{folder}/checkpoint": ("base", best.patched)}
    for name, (side, loss) in wanted.items():
        assert found[name][side]["nats"] == pytest.approx(loss.nats, abs=1e-6)
        assert found[name][side]["num_tokens"] == loss.num_tokens
    assert found[model]["cut"]["nats"] == pytest.approx(best.cut.nats, abs=1e-6)


@pytest.mark.parametrize("dtype", mostly_slow(["float32", "bfloat16"], "float32"))
def test_the_page_and_the_card_of_a_run_end_in_their_numbers(
    places, elsewhere, tmp_path, shallower, dtype
):
    done = shallower(
        "run", places / MODEL, "--texts", places / TEXTS, "--eval-texts",
        places / EVAL_TEXTS, "--out", "../runs/erster Lauf", "--n", "1", "--top", "1",
        "--max-texts", "30", "--max-eval-texts", "12", "--max-length", "10", "--dtype", dtype,
        "--no-cache", "--no-speech", "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    first = Run.load(tmp_path / "runs" / "erster Lauf")
    commands = commands_of(tmp_path / "runs" / "erster Lauf")
    named = shlex.join(["--texts", TEXTS, "--eval-texts", EVAL_TEXTS])
    assert commands[0].startswith(f"shallower run 'kleines Modell' {named} ")
    assert "--json" not in commands[0]
    assert str(tmp_path) not in " ".join(commands)
    found = carry_out(commands, shallower, CUT="cut")
    again = Run.load(elsewhere / "erster Lauf")
    assert_found(first, found, MODEL, "erster Lauf")
    for name in LOSSES:
        assert getattr(again.recommended, name) == getattr(first.recommended, name)
    assert (elsewhere / "erster Lauf" / "report.html").is_file()
    assert sh.Plan.load("cut/shallower_plan.json").dropped == first.recommended.plan.dropped
    card = (tmp_path / "runs" / "erster Lauf" / "checkpoint" / "README.md").read_text()
    assert one_line(blocks_of_code(card, "sh")[0]) == commands[0]
    assert f"| held-out loss | {first.whole} → {first.recommended.patched} nats" in card
    assert (elsewhere / "erster Lauf" / "checkpoint" / "README.md").read_text() == card


@pytest.mark.slow
def test_texts_that_are_no_file_of_their_own_are_measured_by_the_run_alone(
    places, tmp_path, shallower
):
    done = shallower(
        "run", places / MODEL, "--texts", places / TEXTS, "--out", tmp_path / "erster Lauf",
        "--n", "1", "--top", "1", "--plan-only", "--no-speech",
    )  # fmt: skip
    assert done.status == 0, done.err
    names = [command.split()[1] for command in commands_of(tmp_path / "erster Lauf")]
    assert names == ["run", "prune", "report"]


@pytest.mark.slow
def test_the_pages_of_a_curve_and_a_comparison_end_in_their_numbers(elsewhere, tmp_path, shallower):
    texts = ["--texts", TEXTS, "--eval-texts", EVAL_TEXTS, "--no-cache"]
    texts += ["--dtype", "float32", "--max-length", "12"]
    for command, options, name in (
        ("curve", ["--n", "1,2", "--criteria", "deepest", "--patch", "quick"], "comparison.json"),
        ("compare", ["--n", "1,2", "--criteria", "deepest,angular"], "comparison.json"),
    ):
        done = shallower(command, MODEL, *texts, *options, "--out", tmp_path / f"die {command}")
        assert done.status == 0, done.err
        carry_out(commands_of(tmp_path / f"die {command}"), shallower)
        first, again = (
            json.loads((folder / f"die {command}" / name).read_text())
            for folder in (tmp_path, elsewhere)
        )
        for values in (first, again):
            for row in values["rows"]:
                row |= {"seconds": 0, "choice_seconds": 0}
            values.pop("job")
        assert again == first


def test_what_is_printed_besides_names_places_for_a_shell(elsewhere, tmp_path, shallower):
    done = shallower("prune", MODEL, "--drop", "1", "--out", "mein Schnitt für alle")
    (line,) = re.findall("^to upload it: (.*)$", done.out, re.MULTILINE)
    assert Path(shlex.split(line)[-1], "config.json").is_file()
    (elsewhere / "meine Läufe").mkdir()
    (elsewhere / "meine Läufe" / "adapter_config.json").write_text("{}")
    done = shallower("scan", "meine Läufe", "--texts", TEXTS, "--out", "out")
    assert "which shallower merge 'meine Läufe' --out MERGED makes a model of" in done.error


def test_a_place_that_is_the_current_folder_is_printed_by_its_name(places, monkeypatch):
    monkeypatch.chdir(places / MODEL)
    remember_call("run", [".", "--texts", f"../{TEXTS}", "--out", "."])
    assert shlex.split(called()) == [
        "shallower", "run", MODEL, "--texts", TEXTS, "--out", MODEL,
    ]  # fmt: skip


@pytest.mark.usefixtures("folder")
def test_a_place_below_the_current_folder_is_printed_as_it_was_typed():
    words = ["models/smol", "--texts", "data/c4.jsonl", "--out", "runs/smol"]
    remember_call("run", [*words, "--eval-texts=../held_out.jsonl"])
    expected = ["shallower", "run", *words, "--eval-texts=held_out.jsonl"]
    assert shlex.split(called()) == expected
    assert out_of(called(), "made") == "runs/smol"
    assert out_of("shallower run smol --out=runs/smol", "made") == "runs/smol"
    assert out_of("", "made") == "made"
