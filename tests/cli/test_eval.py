"""``shallower eval``: losses, perplexity and tasks, before and after a cut."""

import pytest

import shallower as sh
from tests.cli.documents import documents
from tests.evaluation.task_folders import CHOICE, SAID, choices, write_rows, write_tasks


@pytest.fixture
def tasks(tmp_path):
    folder = write_tasks(tmp_path / "task files", CHOICE)
    write_rows(folder / "pick.jsonl", choices(20))
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
        "--tasks", "pick", "--tasks-dir", tasks, "--max-items", "15", "--drop", "1:3",
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
        (cut, _) = sh.evaluate_tasks(model, tokenizer, ["pick"], tasks_dir=tasks, max_items=15)
        again = sh.evaluate_perplexity(model, tokenizer, long.read_text(), context=16)
    assert norm["cut"] == cut.to_json()
    assert found["perplexity"]["cut"] == again.to_json()
    assert norm["difference"]["mean"] == pytest.approx(norm["cut"]["mean"] - norm["base"]["mean"])
    told = shallower(*command)
    assert told.err.count("measured before") == 1
    for part in ("bits a byte", "stride 16", "without [1, 3)", "paired by window", "acc_norm"):
        assert part in told.out
    (tasks / "pick.jsonl").write_text((tasks / "pick.jsonl").read_text().replace("w1 ", "w2 "))
    assert "4 of 6 results were measured before" in shallower(*command).err


def test_tasks_alone_need_no_texts(shallower, tiny, tasks):
    pytest.importorskip("lm_eval")
    done = shallower("eval", tiny, "--tasks", "pick", "--tasks-dir", tasks, "--num-shots", "1")
    assert done.status == 0, done.err
    dry = shallower("eval", tiny, "--tasks", "pick", "--tasks-dir", tasks, "--dry-run", "--json")
    assert dry.json["tasks"] == "pick"


def test_mistakes_are_told_in_a_sentence(shallower, tiny, tasks, long, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")

    def error(*options):
        return shallower("eval", tiny, *options).error

    assert error() == "name what to measure: --texts, --perplexity or --tasks"
    assert "no folder" in error("--tasks", "pick", "--tasks-dir", tmp_path / "nowhere")
    assert "cannot read a text" in error("--perplexity", tmp_path / "nowhere.txt")
    assert "fills no window of 9999" in error("--perplexity", long, "--context", "9999")
    (tmp_path / "data").mkdir()
    data = ("--data", tmp_path / "data")
    assert "no boolq/val.jsonl" in error("--tasks", "boolq", *data)
    (tasks / "bad.yaml").write_text("{")
    assert "is no YAML" in error("--tasks", "pick", "--tasks-dir", tasks)
    (tasks / "bad.yaml").unlink()
    monkeypatch.setattr("transformers.LlamaForCausalLM.can_generate", classmethod(lambda _: False))
    write_tasks(tasks, SAID)
    write_rows(tasks / "said.jsonl", [{"context": "w1", "continuation": "w2"}])
    assert "cannot generate" in error("--tasks", "said", "--tasks-dir", tasks)
