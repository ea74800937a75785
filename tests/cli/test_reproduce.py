"""Results that are made again from their records, and compared."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

import shallower as sh
from shallower.cutting import metadata
from shallower.models import loading
from shallower.reporting.results import state_results
from shallower.store import again, records
from shallower.store.store import store_folder
from tests.cli.results import CALLS, QUICK, edited, record_in
from tests.cli.results import given as given
from tests.cli.results import made as made
from tests.cli.results import place as place
from tests.conftest import mostly_slow
from tests.cutting import embedders
from tests.hub import hub as hub


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", mostly_slow(CALLS, QUICK))
def test_a_result_is_made_again_to_the_byte(shallower, made, name):
    result, told = made(name)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    done = shallower("reproduce", result, *told)
    assert done.status == 0, done.out + done.err
    first, last = done.out.splitlines()
    assert first.startswith("promised: the same bytes: ")
    assert last.startswith("the same: ")
    assert {path: path.read_bytes() for path in before} == before
    assert list((store_folder() / "reproduce").iterdir()) == []
    path, record = record_in(result)
    assert str(Path.cwd()) not in path.read_text()
    assert len(record["files"]) >= 2
    assert shallower("reproduce", path, *told, "--json").json["differences"] == []


def test_a_dry_run_compares_what_is_read_and_makes_nothing(shallower, made, monkeypatch):
    result, told = made("prune")
    monkeypatch.setattr(again, "working_folder", lambda *_: pytest.fail("it was made"))
    done = shallower("reproduce", result, *told, "--dry-run")
    assert (done.status, done.out.splitlines()[1].split(": ")[0]) == (0, "promised")
    assert shallower("reproduce", result, *told, "--dry-run", "--json").json["dry_run"] is True
    Path("tiny/config.json").write_text("{}")
    assert shallower("reproduce", result, *told, "--dry-run").status == 1


CHANGES = {
    "the source": ("tiny/config.json", "--model tiny: config.json has other bytes"),
    "the weights": ("tiny/model.safetensors", "--model tiny: model.safetensors has other bytes"),
    "the result": ("made/model.safetensors", "result: model.safetensors has other bytes"),
    "the plan": ("made/shallower_plan.json", "result: shallower_plan.json has other bytes"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_byte_that_changed_is_named_before_anything_heavy(shallower, made, monkeypatch, name):
    result, told = made("prune")
    file, line = CHANGES[name]
    content = bytearray(Path(file).read_bytes())
    content[-1] = ord("\n") if content[-1] == ord(" ") else ord(" ")
    Path(file).write_bytes(content)
    monkeypatch.setattr(again, "working_folder", lambda *_: pytest.fail("it was made"))
    done = shallower("reproduce", result, *told)
    assert (done.status, done.out.splitlines()[1:]) == (1, [line])


def test_other_texts_are_named(shallower, made, monkeypatch):
    result, told = made("patch")
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    lines = Path("counting.jsonl").read_text().splitlines()
    Path("counting.jsonl").write_text("\n".join([*lines[1:], lines[0]]))
    done = shallower("reproduce", result, *told)
    said = "--texts counting.jsonl: texts has other bytes"
    assert (done.status, done.out.splitlines()[1:]) == (1, [said])
    Path("counting.jsonl").write_text("\n".join(lines[1:]))
    done = shallower("reproduce", result, *told)
    said = "--texts counting.jsonl: 159 texts were read, expected 160 (counting.jsonl)"
    assert (done.status, done.out.splitlines()[1:]) == (1, [said])


def test_a_file_that_is_not_made_again_is_named(shallower, made):
    result, told = made("prune")
    edited(result, lambda record: record["files"].update(more="0" * 64))
    done = shallower("reproduce", result, *told)
    assert (done.status, done.out.splitlines()[1:]) == (1, ["result: more is missing"])
    path, _ = record_in(result)  # alone, under any name
    path = path.rename("kept.json")
    done = shallower("reproduce", path, *told)
    _, line, kept = done.out.splitlines()
    assert (done.status, line) == (1, "made again: more is missing")
    (left,) = (store_folder() / "reproduce").glob("*/made")
    assert kept == f"what was made again stays in {left} until the next call"
    assert (left / "made" / "model.safetensors").is_file()


def record_of(**fields):
    mappings = ("settings", "read", "plans", "files", "said", "figures", "versions")
    empty = {name: {} for name in mappings}
    own = {"command": "prune", "call": "", "out": "cut", "machine": {"cpu": "another"}}
    return records.Record(**{**empty, **own, **fields})


def test_a_cut_that_is_quantised_is_not_promised_anywhere():
    assert not again.promise_of(record_of(settings={"dtype": "nf4"})).bytes
    assert not again.promise_of(record_of(settings={"dtype": "auto"})).bytes
    assert again.promise_of(record_of(settings={"dtype": "float16"})).bytes


@pytest.mark.parametrize(
    ("fields", "does"),
    [
        ({}, "copies"),
        ({"settings": {"dtype": "float16"}}, "converts"),
        ({"read": {"model": records.Read("a.gguf", None, {"": "0"})}}, "dequantises"),
        ({"read": {"model": records.Read("a.gguf", None, {"": "0"})}, "out": "b.gguf"}, "copies"),
    ],
)
def test_a_promise_says_what_a_cut_does_with_weights(fields, does):
    promised = again.promise_of(record_of(**fields)).why
    assert promised == f"the same bytes: a cut {does} them, on any machine"


@pytest.mark.parametrize("name", ["prune", "patch"])
def test_by_other_versions_all_is_compared_but_their_names(shallower, made, monkeypatch, name):
    result, told = made(name)
    written = {**again.versions(), "numpy": "1.0"}
    monkeypatch.setattr(again, "versions", lambda: written)
    promised, done = shallower("reproduce", result, *told).out.splitlines()
    assert "numpy" in promised
    assert done.startswith("the same: ")
    # A card of another version of this package has other words.
    edited(result, lambda record: record["files"].update({"README.md": "0" * 64}))
    edited(result, lambda record: record["said"].update({"README.md": "0" * 64}))
    alone = record_in(result)[0].rename("alone.json")
    done = shallower("reproduce", alone, *told)
    assert done.status == 1
    assert "could not be compared: README.md (" in done.out
    assert "differences" not in done.out
    assert "README.md" in shallower("reproduce", alone, *told, "--json").json["not_compared"]


@pytest.mark.parametrize("name", ["prune", "prune into a GGUF file"])
def test_the_source_may_be_a_copy_by_another_name(shallower, made, name):
    result, told = made(name)
    source = Path(told[0].partition("=")[2])
    source.rename(source.with_stem("twin"))
    done = shallower("reproduce", result, "--model", source.with_stem("twin"))
    assert done.status == 0, done.out
    assert done.out.splitlines()[1].startswith("the same: ")


def test_a_link_in_a_result_is_named(shallower, made):
    result, told = made("prune")
    Path("elsewhere").mkdir()
    (Path(result) / "more").symlink_to(Path("elsewhere").resolve())
    (Path(result) / "gone").symlink_to("nowhere")
    done = shallower("reproduce", result, *told)
    said = [f"result: {name} is a link to no file" for name in ("gone", "more")]
    assert (done.status, done.out.splitlines()[1:]) == (1, said)


def test_a_result_that_another_process_makes_again_has_a_folder_of_its_own(
    shallower, made, monkeypatch
):
    result, told = made("prune")
    record, home = records.Record.load(record_in(result)[0]), store_folder()
    with again.working_folder(record) as folder:
        call = [sys.executable, "-m", "shallower", "reproduce", result, *told]
        more = {"env": {**os.environ, "SHALLOWER_CACHE": str(home)}, "text": True}
        others = [subprocess.Popen(call, stdout=subprocess.PIPE, **more) for _ in range(2)]
        said = [other.communicate()[0].splitlines()[-1] for other in others]
        assert said == ["the same: 10 files"] * 2
        assert list(folder.parent.glob("*-[0-9]")) == []
        assert folder.is_dir()


def test_what_a_hub_or_git_adds_is_no_difference(shallower, made):
    result, told = made("prune")
    for name in (".gitattributes", ".cache/huggingface/x.metadata"):
        (Path(result) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(result) / name).write_text("x")
    assert shallower("reproduce", result, *told, "--dry-run").status == 0
    (Path(result) / "added.txt").write_text("x")
    done = shallower("reproduce", result, *told, "--dry-run")
    assert "result: added.txt is new" in done.out


def test_figures_on_the_card_of_a_source_change_nothing_of_it(shallower, place):
    (place / "tiny" / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    assert shallower(*CALLS["prune"][0].split()).status == 0
    loss = metadata.loss_results(sh.Loss(2.5, 0.1, 6, 3, 0, 99), None, "mine.jsonl")
    state_results(place / "tiny" / "README.md", loss)
    again = ["reproduce", "made", "--model", "tiny", "--dry-run"]
    assert shallower(*again).status == 0
    (place / "tiny" / "README.md").write_text("---\nlicense: mit\n---\n# Other\n")
    assert "--model tiny: README.md has other bytes" in shallower(*again).out


def test_a_file_of_somebody_else_is_not_in_the_record(shallower, place):
    call = CALLS["prune"][0].split()
    assert shallower(*call).status == 0
    record = (place / "made" / "shallower_record.json").read_bytes()
    (place / "made" / "notes.txt").write_text("mine")
    (place / "made" / "shallower_record.json").unlink()
    assert shallower(*call).status == 0  # it is there, and its record is written
    assert (place / "made" / "shallower_record.json").read_bytes() == record


def test_the_modules_of_an_embedder_are_read(shallower, folder, words):
    embedders.write(folder / "embedder", words)
    assert shallower("prune", "embedder", "--drop", "2", "--out", "made").status == 0
    again = ["reproduce", "made", "--model", "embedder"]
    assert shallower(*again).status == 0
    Path("embedder/1_Pooling/config.json").write_text("{}")
    done = shallower(*again)
    assert done.out.splitlines()[1:] == ["--model embedder: 1_Pooling/config.json has other bytes"]


def test_a_merge_is_of_its_cut(shallower, made):
    result, told = made("merge")
    assert "name it (--model)" in shallower("reproduce", result, told[0]).error
    with Path("cut/config.json").open("a") as file:
        file.write(" ")
    done = shallower("reproduce", result, *told)
    assert done.out.splitlines()[1:] == ["--model cut: config.json has other bytes"]


def test_what_has_no_losses_of_its_own_is_compared_by_bytes_elsewhere(shallower, made, monkeypatch):
    result, told = made("merge")
    monkeypatch.setattr(again, "here", lambda: {**records.here(), "threads": "64"})
    promised, done = shallower("reproduce", result, *told).out.splitlines()
    assert promised == (
        "promised: nothing for sure, so all bytes are compared: not with the same threads"
    )
    num = len(record_in(result)[1]["files"])
    assert done == f"the same: {num} files"
    edited(result, lambda record: record["files"].update({"model.safetensors": "0" * 64}))
    path = record_in(result)[0].rename("alone.json")
    done = shallower("reproduce", path, *told)
    said = "made again: model.safetensors has other bytes"
    assert (done.status, done.out.splitlines()[1]) == (1, said)


def test_an_option_that_the_record_does_not_read_is_refused(shallower, made):
    result, told = made("prune")
    said = "by its record made was made without --texts: leave it out"
    assert shallower("reproduce", result, *told, "--texts", "counting.jsonl").error == said


def test_a_result_on_the_hub_is_compared(shallower, made, hub):
    result, told = made("prune")
    hub.put("me/cut", Path(result))
    hub.repos["me/cut"][".gitattributes"] = b"x"
    done = shallower("reproduce", "me/cut", *told)
    assert done.status == 0, done.err
    for name in ("model.safetensors", "config.json"):
        content = hub.repos["me/cut"][name]
        other = f"me/other-{name}"
        hub.repos[other] = {**hub.repos["me/cut"], name: content[:-1] + b"~"}
        done = shallower("reproduce", other, *told)
        assert done.out.splitlines()[1:] == [f"result: {name} has other bytes"]


def test_all_small_files_of_a_hub_model_are_compared(shallower, place, hub, monkeypatch):
    """Also those that the cache has not, or has of an earlier commit."""
    hub.put("me/tiny", place / "tiny")
    assert shallower("prune", "me/tiny", "--drop", "2:4", "--out", "made").status == 0
    again = ["reproduce", "made", "--dry-run"]
    assert shallower(*again).status == 0
    hub.repos["me/tiny"]["tokenizer_config.json"] += b" "
    shutil.rmtree(constants.HF_HUB_CACHE)
    said = "--model me/tiny: tokenizer_config.json has other bytes"
    assert said in shallower(*again).out


def test_code_that_comes_with_a_model_is_run_for_who_allows_it_alone(shallower, place):
    assert shallower(*CALLS["prune"][0].split(), "--trust-remote-code").status == 0
    again = ["reproduce", "made", "--model", "tiny"]
    assert shallower(*again).error.endswith("allow it (--trust-remote-code)")
    assert shallower(*again, "--trust-remote-code").status == 0


def test_what_is_not_at_hand_is_asked_for_by_its_hash(shallower, made):
    result, told = made("patch")
    _, record = record_in(result)
    sha = record["read"]["texts"]["files"]["texts"][:16]
    error = shallower("reproduce", result, told[0], told[2]).error
    assert error == (
        f"the record does not say where counting.jsonl lies, 160 texts, of SHA-256 {sha}: name it "
        f"(--texts)"
    )
    assert "name it (--model)" in shallower("reproduce", result, *told[1:]).error
    # A folder here is not read because a record calls it a repository.
    edited(result, lambda record: record["read"]["model"].update(commit="c"))
    said = "the record reads trained from the hub, and it is also here: say which, by a path"
    assert shallower("reproduce", result, *told[1:]).error.startswith(said)


@pytest.mark.filterwarnings("ignore:the store")
def test_what_cannot_be_read_or_written_is_said_in_a_sentence(shallower, made, monkeypatch):
    result, told = made("prune")
    error = shallower("reproduce", result, "--model", "tinny").err
    assert "error: no model can be read at tinny: it is not here, and the hub does not" in error
    Path("file").write_text("x")
    monkeypatch.setenv("SHALLOWER_CACHE", str(Path("file").resolve()))
    error = shallower("reproduce", result, *told).err
    assert "error: cannot write" in error
    assert "name another folder by SHALLOWER_CACHE" in error


def test_what_was_broken_off_goes_on(shallower, made, monkeypatch):
    """The work of a call that ends half-way is there for the next one, which then removes it."""
    result, told = made("patch")
    compared = records.record_of
    monkeypatch.setattr("shallower.store.records.record_of", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shallower("reproduce", result, *told)
    (left,) = (store_folder() / "reproduce").iterdir()
    assert (left / "made" / "made" / "model.safetensors").is_file()
    monkeypatch.setattr("shallower.store.records.record_of", compared)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert shallower("reproduce", result, *told).status == 0
    assert not left.exists()
