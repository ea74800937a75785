"""``shallower eval``: losses, perplexity and tasks, before and after a cut."""

import json
import shutil
import weakref

import pytest
from huggingface_hub import ModelCard

import shallower as sh
from tests.documents import documents
from tests.evaluation.task_folders import CHOICE, choices, write_rows, write_tasks


@pytest.fixture
def tasks(tmp_path):
    folder = write_tasks(tmp_path / "task files", CHOICE)
    write_rows(folder / "pick.jsonl", choices(8))
    return folder


@pytest.fixture
def long(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n".join(documents(6)))
    return path


def test_all_measures_of_a_model_and_of_a_cut(shallower, tiny, texts, tasks, long):
    pytest.importorskip("lm_eval")
    command = [
        "eval", tiny, "--texts", texts / "held_out.jsonl", "--perplexity", long, "--context", "16",
        "--tasks", "pick", "--tasks-dir", tasks, "--max-items", "5", "--drop", "1:3",
    ]  # fmt: skip
    first = shallower(*command, "--json")
    assert first.status == 0, first.err
    assert "lm_eval" not in first.err
    found = first.json
    assert {"base", "cut", "difference", "perplexity", "tasks", "dtype", "drop"} == set(found)
    assert found["base"]["bits_per_byte"] > 0
    window = found["perplexity"]["base"]
    assert (window["context"], window["stride"], window["bos"]) == (16, 16, False)
    norm, acc = found["tasks"]
    assert [(one["task"], one["metric"]) for one in (norm, acc)] == [
        ("pick", "acc_norm"), ("pick", "acc"),
    ]  # fmt: skip
    model, tokenizer = sh.load_model(tiny)
    with sh.without_layers(model, [1, 2]):
        (cut, _) = sh.evaluate_tasks(model, tokenizer, ["pick"], tasks_dir=tasks, max_items=5)
        again = sh.evaluate_perplexity(model, tokenizer, long.read_text(), context=16)
    assert norm["cut"] == cut.to_json()
    assert found["perplexity"]["cut"] == again.to_json()
    assert norm["difference"]["mean"] == pytest.approx(norm["cut"]["mean"] - norm["base"]["mean"])
    told = shallower(*command)
    assert told.err.count("cached, measured") == 1
    for part in ("bits a byte", "stride 16", "without [1, 3)", "paired by window", "acc_norm"):
        assert part in told.out
    (tasks / "pick.jsonl").write_text((tasks / "pick.jsonl").read_text().replace("w1 ", "w2 "))
    assert "4 of 6 results were cached" in shallower(*command).err


def test_a_measure_is_named(shallower, tiny):
    error = shallower("eval", tiny).error
    assert error == "name what to measure: --texts, --perplexity, --tasks or --speech"


def test_a_model_is_paired_with_another_one(shallower, tiny, texts, folder, words):
    """What a patched or healed checkpoint loses more than its source, by text."""
    assert shallower("prune", tiny, "--drop", "1:3", "--out", "cut").status == 0
    options = ("--texts", texts / "held_out.jsonl")
    done = shallower("eval", "cut", "--against", tiny, *options)
    assert done.status == 0, done.err
    cut_in_memory = shallower("eval", tiny, "--drop", "1:3", *options, "--json").json
    found = shallower("eval", "cut", "--against", tiny, *options, "--json").json
    assert found["against"] == cut_in_memory["base"]
    assert found["model"] == cut_in_memory["cut"]
    assert found["difference"] == cut_in_memory["difference"]
    lines = done.out.splitlines()
    assert lines[0].startswith(f"{tiny}: ")
    assert lines[2].startswith("cut: ")
    assert lines[4].startswith("difference: ")
    alone = shallower("eval", "cut", *options)
    assert alone.out.startswith("cut: ")  # which has not all layers


def test_what_cannot_be_paired_is_refused(shallower, tiny, texts, folder, words):
    options = ("--texts", texts / "held_out.jsonl")
    error = shallower("eval", tiny, "--against", tiny, "--drop", "1", *options).error
    assert error == "--against compares two checkpoints: name no cut beside it (as --drop)"


@pytest.fixture
def renamed(folder, tiny):
    """The tiny model with a tokenizer of as many tokens a text, of which two are exchanged."""
    other = folder / "other"
    shutil.copytree(tiny, other)
    settings = json.loads((other / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    return other


@pytest.mark.parametrize("measure", ["loss", "perplexity"])
def test_another_tokenizer_is_noticed_by_its_ids(shallower, tiny, texts, renamed, long, measure):
    """Before a model is loaded; equal numbers of tokens are no proof."""
    options = {
        "loss": ("--texts", texts / "held_out.jsonl"),
        "perplexity": ("--perplexity", long, "--context", "16"),
    }[measure]
    alone = [shallower("eval", one, *options, "--json").json for one in (tiny, renamed)]
    first, second = (one["base"] if measure == "loss" else one[measure]["base"] for one in alone)
    assert first["num_tokens"] == second["num_tokens"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("shallower.models.loading.load_weights", lambda *_, **__: 1 / 0)
        error = shallower("eval", renamed, "--against", tiny, *options).error
    assert f"{renamed} and {tiny} have different tokenizers" in error
    assert "--tasks" in error
    # known losses are no way around it
    assert "different tokenizers" in shallower("eval", renamed, "--against", tiny, *options).error


def test_tasks_are_paired_by_item_whatever_the_tokenizer(shallower, tiny, renamed, tasks):
    pytest.importorskip("lm_eval")
    options = ("--tasks", "pick", "--tasks-dir", tasks, "--max-items", "4", "--json")
    assert shallower("eval", renamed, "--against", tiny, *options).json["tasks"][0]["difference"]


def test_a_pair_that_was_checked_loads_no_tokenizer_again(shallower, tiny, texts, folder):
    assert shallower("prune", tiny, "--drop", "1:3", "--out", "cut").status == 0
    options = ("cut", "--against", tiny, "--texts", texts / "held_out.jsonl")
    assert shallower("eval", *options).status == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("shallower.models.loading.load_tokenizer", lambda *_: 1 / 0)
        assert shallower("eval", *options).status == 0


@pytest.mark.slow
def test_memory_of_a_pair_is_that_of_the_larger(shallower, tiny, texts, folder):
    """Both orders; the two are loaded one after the other."""
    assert shallower("prune", tiny, "--drop", "1:4", "--out", "cut").status == 0
    options = ("--texts", texts / "held_out.jsonl", "--dry-run", "--json")
    alone = {one: shallower("eval", one, *options).json["memory"]["parts"] for one in ("cut", tiny)}
    assert alone["cut"] != alone[tiny]
    for first, second in (("cut", tiny), (tiny, "cut")):
        found = shallower("eval", first, "--against", second, *options).json
        assert found["memory"]["parts"] == alone[tiny]
        assert found["loaded"] == f"one after the other; {tiny} needs more memory"


def test_two_models_are_never_in_memory_together(shallower, tiny, texts, folder, monkeypatch):
    from shallower.models import loading

    assert shallower("prune", tiny, "--drop", "1:3", "--out", "cut").status == 0
    made, plain = [], loading.load_weights

    def noted(*arguments, **options):
        assert not any(one() is not None for one in made)
        model = plain(*arguments, **options)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load_weights", noted)
    options = ("--texts", texts / "held_out.jsonl", "--no-cache")
    assert shallower("eval", "cut", "--against", tiny, *options).status == 0
    assert len(made) == 2


def test_a_folder_without_a_model_is_told_the_way_out(shallower, texts, folder):
    options = ("--texts", texts / "held_out.jsonl")
    for name, told in (
        ("adapter_config.json", "it holds adapters, which shallower merge"),
        ("model.q8.gguf", "name the GGUF file in it"),
        ("notes.txt", "expected a checkpoint of transformers"),
    ):
        place = folder / f"with {name}"
        place.mkdir()
        (place / name).write_text("{}")
        assert told in shallower("eval", place, *options).error


def test_results_are_put_on_the_card(shallower, tiny, texts, tasks, long, tmp_path):
    pytest.importorskip("lm_eval")
    cut, card = tmp_path / "cut", tmp_path / "cut" / "README.md"
    assert shallower("prune", tiny, "--drop", "1:3", "--out", cut).status == 0
    record = json.loads((cut / "shallower_record.json").read_text())
    command = [
        "eval", cut, "--texts", texts / "held_out.jsonl", "--perplexity", long, "--context", "16",
        "--tasks", "pick", "--tasks-dir", tasks, "--card",
    ]  # fmt: skip
    plain = card.read_text()
    assert shallower(*command, "--dry-run").status == 0
    assert card.read_text() == plain
    told = shallower(*command)
    assert told.status == 0, told.err
    assert f"wrote {card}" in told.out
    again = shallower(*command, "--json")
    assert "cached, measured on" in again.err  # what was put on the card is none of the model
    found = again.json
    results = {one.metric_type: one for one in ModelCard(card.read_text()).data.eval_results}
    assert results["loss"].metric_value == pytest.approx(found["base"]["nats"], abs=1e-6)
    assert results["loss"].dataset_type == "held_out.jsonl"
    perplexity = found["perplexity"]["base"]
    assert results["perplexity"].metric_value == pytest.approx(perplexity["perplexity"], abs=1e-6)
    assert results["perplexity"].dataset_type == "long.txt"
    for task in found["tasks"]:
        assert results[task["metric"]].metric_value == pytest.approx(task["base"]["mean"], abs=1e-6)
        assert results[task["metric"]].metric_args["stderr"] > 0
        assert results[task["metric"]].dataset_type == "pick"
    assert str(tmp_path) not in card.read_text()
    # Beside the whole model the loss has a paired difference. The record has no such results.
    both = shallower(*command[:4], "--against", tiny, "--card", "--json").json
    results = {one.metric_type: one for one in ModelCard(card.read_text()).data.eval_results}
    more = both["difference"]["mean"]
    assert results["loss_increase"].metric_value == pytest.approx(more, abs=1e-6)
    assert "perplexity" in results
    assert json.loads((cut / "shallower_record.json").read_text()) == record
    again = shallower("reproduce", cut, "--model", tiny)
    assert again.status == 1
    assert again.out.splitlines()[1].startswith(
        "the same but for 2 files that could not be compared: .shallower.json ("
    ), again.err
    other = ("prune", tiny, "--drop", "1:2", "--out", cut, "--overwrite")
    assert shallower(*other, "--dry-run").status == 0
    card.write_text(card.read_text().replace("not healed", "healed"))
    again = shallower("reproduce", cut, "--model", tiny)
    assert (again.status, "README.md has other bytes" in again.out) == (1, True)
    assert "wrote README.md (as it is now) there" in shallower(*other).error


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--drop", "1:3"], "name no cut"),
        (["--shard", "0/2"], "leave out --shard"),
        ([], "there is no card"),
    ],
)
def test_results_of_something_else_are_not_put_on_a_card(shallower, tiny, texts, more, why):
    told = shallower("eval", tiny, "--texts", texts / "held_out.jsonl", "--card", *more)
    assert (told.status, why in told.err) == (2, True), told.err
