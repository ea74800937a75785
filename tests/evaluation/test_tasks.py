"""Scores on tasks of lm-eval: those of plain float64 logits, item by item."""

import copy
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

import shallower as sh
from shallower.errors import ModelError, TextsError
from shallower.evaluation.tasks import draw_items, evaluate_tasks
from tests.conftest import mostly_slow, tiny_llama
from tests.evaluation.answering import log_softmax, plain_logits
from tests.evaluation.task_folders import (
    CHOICE,
    LAST,
    PARTS,
    SAID,
    choices,
    sentence,
    write_rows,
    write_tasks,
)

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def sharp():
    """A model that is far from uniform, so that a wrong token shows."""
    model = tiny_llama(5, initializer_range=0.3)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def plain_likelihood(model, tokenizer, context, continuation):
    """The log-likelihood of a continuation, and whether it is the greedy one."""
    given = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + " " + continuation)["input_ids"]
    cut = max(0, len(ids) - 1 - model.config.max_position_embeddings)
    ids, given = ids[cut:], given - cut
    logs = log_softmax(plain_logits(model, ids[:-1]))[given - 1 :]
    expected = ids[given:]
    chosen = logs[range(len(expected)), expected]
    return chosen.sum(), bool((logs.argmax(axis=1) == expected).all())


def plain_choice(model, tokenizer, row):
    """Right or not, by log-likelihood and by that of a character."""
    logs = np.array(
        [plain_likelihood(model, tokenizer, row["query"], c)[0] for c in row["choices"]]
    )
    lengths = np.array([len(choice) for choice in row["choices"]])
    return [float(np.argmax(one) == row["answer"]) for one in (logs, logs / lengths)]


@pytest.fixture
def pick(tmp_path):
    folder = write_tasks(tmp_path / "tasks", CHOICE)
    rows = choices()
    rows[3]["choices"][1] = rows[3]["choices"][2]  # asked once, answered twice
    rows[4]["choices"] = ["w1", "w2", "w3", "w4"]
    return folder, write_rows(folder / "pick.jsonl", rows)


@pytest.mark.parametrize("batch_size", mostly_slow(["auto", 3], [3]))
def test_a_choice_is_that_of_plain_float64_logits(sharp, words, pick, batch_size):
    folder, rows = pick
    norm, acc = evaluate_tasks(sharp, words, ["pick"], tasks_dir=folder, batch_size=batch_size)
    expected = np.array([plain_choice(sharp, words, row) for row in rows])
    assert (norm.task, norm.metric, acc.metric) == ("pick", "acc_norm", "acc")
    assert norm.items == acc.items == tuple(str(i) for i in range(len(rows)))
    np.testing.assert_array_equal(acc.by_item.sums, expected[:, 0])
    np.testing.assert_array_equal(norm.by_item.sums, expected[:, 1])
    assert (acc.chance, acc.num_shots) == (0.25, 0)
    assert 0 < acc.mean < 1


@pytest.mark.parametrize(("right", "chance"), [(54, 0.5), (75, 0.75)], ids=["luck", "bias"])
def test_chance_is_that_of_the_same_answer_to_all(sharp, words, tmp_path, right, chance):
    """As yes to BoolQ, where that is right more often than by luck; also of items not drawn."""
    folder = write_tasks(tmp_path / "tasks", CHOICE)
    rows = [{**row, "answer": int(i < right)} for i, row in enumerate(choices(100, options=2))]
    write_rows(folder / "pick.jsonl", rows)
    found = evaluate_tasks(sharp, words, ["pick"], tasks_dir=folder, max_items=8)
    assert [one.chance for one in found] == [chance, chance]


@pytest.mark.slow
def test_scores_are_those_of_lm_evals_own_adapter(sharp, words, pick, capfd):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder, _ = pick
    data = {"validation": str(folder / "pick.jsonl")}
    write_tasks(folder / "theirs", {**CHOICE, "dataset_kwargs": {"data_files": data}})
    found = simple_evaluate(
        HFLM(pretrained=sharp, tokenizer=copy.deepcopy(words), batch_size=4),
        tasks=["pick"],
        task_manager=TaskManager(include_path=folder / "theirs", include_defaults=False),
        bootstrap_iters=0,
    )
    ours = evaluate_tasks(sharp, words, ["pick"], tasks_dir=folder, num_shots=0)
    for one in ours:
        theirs = [float(item[one.metric]) for item in found["samples"]["pick"]]
        assert one.by_item.sums.tolist() == theirs


def test_the_last_word_behind_a_context_that_is_too_long(sharp, words, tmp_path):
    rng = np.random.default_rng(1)
    rows = [{"context": sentence(rng, *size)} for size in [(1, 9)] * 12 + [(126, 160)] * 6]
    for index, row in enumerate(rows):
        row["continuation"] = sentence(rng, 1, 4)
        if index % 2:  # what the model would say itself
            ids = words(row["context"])["input_ids"][-128:]
            row["continuation"] = words.decode(plain_logits(sharp, ids)[-1].argmax())
    rows = [row for row in rows if "<" not in row["continuation"]]
    folder = write_tasks(tmp_path, LAST)
    write_rows(folder / "last.jsonl", rows)
    with pytest.warns(UserWarning, match="^6 requests of tasks would not fit the 128 tokens that"):
        (acc,) = evaluate_tasks(sharp, words, ["last"], tasks_dir=folder)
    expected = [
        float(plain_likelihood(sharp, words, row["context"], row["continuation"])[1])
        for row in rows
    ]
    assert (acc.metric, acc.chance) == ("acc", None)
    assert acc.by_item.sums.tolist() == expected
    assert 0 < acc.mean < 1


@pytest.fixture
def said(sharp, words, tmp_path):
    """Contexts, and for every other one what the model says greedily: 5 tokens, or up to w3."""
    rng = np.random.default_rng(2)
    rows = [{"context": sentence(rng, 2, 12)} for _ in range(8)]
    for index, row in enumerate(rows):
        ids = words(row["context"])["input_ids"]
        new = []
        while len(new) < 5:
            token = int(plain_logits(sharp, ids + new)[-1].argmax())
            if token in (2, 99):  # the ends of the model's own config and of the tokenizer
                break
            new.append(token)
        text = words.decode(new, skip_special_tokens=True).split("w3")[0]
        row["continuation"] = "w1 w1" if index % 2 else text
    folder = write_tasks(tmp_path, SAID)
    write_rows(folder / "said.jsonl", rows)
    return folder


def test_greedy_answers_are_those_of_plain_argmax(sharp, words, said):
    (match,) = evaluate_tasks(sharp, words, ["said"], tasks_dir=said)
    assert (match.metric, match.chance) == ("exact_match", None)
    assert match.by_item.sums.tolist() == [1.0, 0.0] * 4


def test_sampled_answers_have_the_same_bits_for_a_seed(sharp, words, said):
    state = torch.random.get_rng_state()
    greedy, one, four = evaluate_tasks(sharp, words, ["said"], tasks_dir=said, pass_at=4)
    again = evaluate_tasks(sharp, words, ["said"], tasks_dir=said, pass_at=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [scores.metric for scores in (greedy, one, four)] == ["exact_match", "pass@1", "pass@4"]
    for first, second in zip((greedy, one, four), again, strict=True):
        np.testing.assert_array_equal(first.by_item.sums, second.by_item.sums)
    assert set(one.by_item.sums) <= {0, 0.25, 0.5, 0.75, 1}
    np.testing.assert_array_equal(four.by_item.sums, one.by_item.sums > 0)
    assert four.mean >= one.mean > 0


def test_a_group_is_drawn_evenly_from_its_parts(sharp, words, tmp_path):
    rows = choices(30)
    for index, row in enumerate(rows):
        row["subject"] = "abc"[(index % 10) // 4]  # 12, 12 and 6
    folder = write_tasks(tmp_path, PARTS)
    write_rows(folder / "parts.jsonl", rows)
    _, acc = evaluate_tasks(sharp, words, ["parts"], tasks_dir=folder)
    assert len(acc.items) == 30
    assert acc.items[0] == "parts_a/0"
    by_subject = {subject: [r for r in rows if r["subject"] == subject] for subject in "abc"}
    for item, score in zip(acc.items, acc.by_item.sums, strict=True):
        subject, index = item.removeprefix("parts_").split("/")
        assert score == plain_choice(sharp, words, by_subject[subject][int(index)])[0]
    _, acc = evaluate_tasks(sharp, words, ["parts"], tasks_dir=folder, max_items=2, seed=1)
    assert len({item.split("/")[0] for item in acc.items}) == 2
    (one, _) = evaluate_tasks(sharp, words, ["parts_b"], tasks_dir=folder)
    assert (one.task, len(one.items)) == ("parts_b", 12)


@given(
    st.dictionaries(st.text("ab", min_size=1, max_size=4), st.integers(0, 20), min_size=1),
    st.integers(1, 60),
    st.integers(0, 3),
)
def test_items_are_drawn_evenly_and_fewer_are_among_more(sizes, most, seed):
    drawn = draw_items(sizes, most, seed)
    assert sum(map(len, drawn.values())) == min(most, sum(sizes.values()))
    largest = max(map(len, drawn.values()))
    for name, items in drawn.items():
        assert items == sorted(set(items))
        assert all(0 <= item < sizes[name] for item in items)
        assert len(items) >= min(sizes[name], largest - 1)
        assert set(items) <= set(draw_items(sizes, most + 7, seed)[name])


def test_examples_come_before_each_item(sharp, words, pick):
    folder, _ = pick
    norm, acc = evaluate_tasks(sharp, words, ["pick"], tasks_dir=folder, num_shots=2, max_items=9)
    again = evaluate_tasks(sharp, words, ["pick"], tasks_dir=folder, num_shots=2, max_items=9)
    assert (acc.num_shots, acc.items) == (2, again[1].items)
    np.testing.assert_array_equal(norm.by_item.sums, again[0].by_item.sums)
    none = evaluate_tasks(sharp, words, ["pick"], tasks_dir=folder, max_items=9)
    with pytest.raises(TextsError, match="with 2 examples"):
        acc.minus(none[1])


@pytest.mark.slow
def test_the_paired_error_of_two_cuts_is_that_of_a_bootstrap(sharp, words, tmp_path):
    folder = write_tasks(tmp_path, CHOICE)
    write_rows(folder / "pick.jsonl", choices(150, seed=3, options=2))
    found = []
    for layers in ([1], [3]):
        with sh.without_layers(sharp, layers):
            found.append(evaluate_tasks(sharp, words, ["pick"], tasks_dir=folder)[1])
    lost = found[1].minus(found[0])
    differences = found[1].by_item.sums - found[0].by_item.sums
    assert 0.1 < np.mean(differences != 0) < 0.9
    rng = np.random.default_rng(0)
    means = differences[rng.integers(0, 150, (4000, 150))].mean(axis=1)
    assert lost.mean == pytest.approx(differences.mean(), abs=1e-12)
    assert lost.stderr == pytest.approx(means.std(), rel=0.1)


def test_nothing_is_said_and_nothing_is_left_changed(sharp, words, pick, capfd):
    from tqdm import tqdm

    folder, _ = pick
    logger, before = logging.getLogger("lm_eval"), dict(vars(words))
    level, started = logger.level, vars(tqdm)["__init__"]
    capfd.readouterr()
    evaluate_tasks(sharp, words, ["pick"], tasks_dir=folder, max_items=3)
    # lm_eval's own bar of the items has no switch; a command turns it off for its whole process.
    bar, ours = r"(\r *\d+%\|.*?\])+\n", "tasks 0/12\ntasks done, 0:00:00\n"
    said = capfd.readouterr()
    assert (said.out, re.sub(bar, "", said.err)) == ("", ours)
    assert (logger.level, vars(tqdm)["__init__"]) == (level, started)
    assert vars(words) == before


# Bad input.
def refused(sharp, words, names, **options):
    with pytest.raises(TextsError) as raised:
        evaluate_tasks(sharp, words, names, **options)
    return str(raised.value)


def test_a_task_that_is_not_there(sharp, words, pick, monkeypatch):
    from lm_eval.tasks import manager

    folder, _ = pick
    some = Path(manager.__file__).parent / "super_glue"  # all of lm-eval's take seconds to read
    monkeypatch.setattr(manager, "__file__", str(some / "manager.py"))
    monkeypatch.delenv("SHALLOWER_DATA", raising=False)
    said = refused(sharp, words, ["pick", "no_such_task"], tasks_dir=folder)
    assert "there is no task no_such_task" in said
    assert "--data" in said
    assert "twice" in refused(sharp, words, ["pick", "pick"], tasks_dir=folder)
    assert "at least one" in refused(sharp, words, [" "], tasks_dir=folder)
    assert "no folder" in refused(sharp, words, ["pick"], tasks_dir=folder / "nowhere")
    assert "at least 1" in refused(sharp, words, ["pick"], tasks_dir=folder, max_items=0)
    hub = refused(sharp, words, ["boolq"])  # lm-eval's own, whose data is on a hub out of reach
    assert "task boolq cannot be loaded" in hub
    assert "--data" in hub


def test_the_hub_of_a_task_is_not_waited_for(sharp, words, pick, monkeypatch):
    folder, _ = pick
    write_tasks(folder, {**CHOICE, "dataset_path": "some/one"})
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)  # between tries of huggingface_hub
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("shallower.texts.hub.getproxies", dict)
    said = refused(sharp, words, ["pick"], tasks_dir=folder)
    assert said.startswith("task pick cannot be loaded: http://127.0.0.1:9 cannot be reached: ")
    assert waited == []


def test_a_task_file_that_is_no_yaml(sharp, words, pick):
    folder, _ = pick
    for text in ("task: [1, 2\n", f"task: {'[' * 1500}\n"):
        (folder / "bad.yaml").write_text(text)
        assert f"the task file {folder / 'bad.yaml'} is no YAML" in refused(
            sharp, words, ["pick"], tasks_dir=folder
        )
    (folder / "bad.yaml").write_text("just words\n")
    assert "is no task" in refused(sharp, words, ["pick"], tasks_dir=folder)
    (folder / "bad.yaml").write_text("include: gone.yaml\ntask: more\n")
    assert "bad.yaml includes gone.yaml, which is not there" in refused(
        sharp, words, ["more"], tasks_dir=folder
    )


def test_a_task_file_whose_function_fails(sharp, words, pick):
    folder, _ = pick
    of_one = "return row['choices'][9 if row['choices'][0] == 'w1' else 0]"
    (folder / "own.py").write_text(f"def question(row):\n    {of_one}\n")
    task = {**CHOICE, "doc_to_text": "QUESTION"}
    file = write_tasks(folder, task) / "pick.yaml"
    file.write_text(file.read_text().replace("QUESTION", "!function own.question"))
    with pytest.raises(TextsError, match="lm-eval cannot run pick: IndexError: list index out of"):
        evaluate_tasks(sharp, words, ["pick"], tasks_dir=folder)


def test_data_that_is_missing_or_broken(sharp, words, pick, tmp_path):
    folder, _ = pick
    (folder / "pick.jsonl").write_text("{]\n")
    assert "line 1" in refused(sharp, words, ["pick"], tasks_dir=folder)
    (folder / "pick.jsonl").write_text('{"query": "w1"}\n')
    assert "task pick cannot be loaded" in refused(sharp, words, ["pick"], tasks_dir=folder)
    (folder / "pick.jsonl").unlink()
    said = refused(sharp, words, ["pick"], tasks_dir=folder)
    assert "no pick.jsonl in" in said
    empty = tmp_path / "empty"
    empty.mkdir()
    said = refused(sharp, words, ["boolq"], data=empty)
    assert f"no boolq/val.jsonl in {empty}" in said


def test_a_measure_that_is_no_mean_over_items(sharp, words, tmp_path):
    folder = write_tasks(tmp_path, {**LAST, "metric_list": LAST["metric_list"][:1]})
    write_rows(folder / "last.jsonl", [{"context": "w1 w2", "continuation": "w3"}])
    assert "no measure that is a mean" in refused(sharp, words, ["last"], tasks_dir=folder)


def test_a_model_that_cannot_generate(sharp, words, said, monkeypatch):
    monkeypatch.setattr(type(sharp), "can_generate", classmethod(lambda _: False))
    with pytest.raises(ModelError, match="cannot generate text"):
        evaluate_tasks(sharp, words, ["said"], tasks_dir=said)


def test_without_lm_eval_the_extra_is_named(sharp, words, pick, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(sh.MissingExtraError, match=r"pip install 'shallower\[tasks\]'"):
        evaluate_tasks(sharp, words, ["pick"], tasks_dir=pick[0])
