"""A real model on real tasks, against prompts written by hand and plain float64 arithmetic.

``SHALLOWER_TASK_ITEMS`` asks for another number of items of each task; ``-s`` shows the means.
"""

import json
import math
import os
from collections import Counter

import numpy as np
import pytest

import shallower as sh
from tests.evaluation.answering import log_softmax, plain_logits

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval")

ITEMS = int(os.environ.get("SHALLOWER_TASK_ITEMS", "24"))
CLOSE = 1e-3
"""Nats within which two options count as a tie, of which either may be chosen."""


def rows_of(path):
    with path.open(encoding="utf-8", newline="\n") as file:  # lines hold separators of other kinds
        return [json.loads(line) for line in file]


def likelihood(smol, prompt, answer):
    """The log-likelihood of an answer behind a prompt, and whether it is the greedy one."""
    model, tokenizer = smol
    given, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    assert ids[: len(given)] == given
    logs = log_softmax(plain_logits(model, ids[:-1]))[len(given) - 1 :]
    expected = ids[len(given) :]
    found = logs[range(len(expected)), expected].sum()
    return found, bool((logs.argmax(axis=1) == expected).all())


def compare(scores, right):
    """Item by item the same, but for ties, which ``right`` gives as None; and the means."""
    count, ties = len(scores.items), sum(one is None for one in right)
    assert len(right) == count <= ITEMS
    for item, score, expected in zip(scores.items, scores.by_item.sums, right, strict=True):
        assert expected is None or score == expected, item
    assert ties <= max(1, count // 50)
    mean = np.mean([0.5 if one is None else one for one in right])
    print(f"{scores}: by hand {mean:.4f}, {count} items, {ties} ties")
    assert abs(scores.mean - mean) <= scores.stderr


def chosen(values, answer):
    """Whether the right option is the likeliest; None where two are too close to tell."""
    best, second = np.argsort(values)[::-1][:2]
    return None if values[best] - values[second] < CLOSE else float(best == answer)


def scored(smol, data, name, seed=7):
    return sh.evaluate_tasks(*smol, [name], data=data, max_items=ITEMS, seed=seed)


def test_boolq(smol, data):
    (acc,) = scored(smol, data, "boolq")
    rows = rows_of(data / "boolq" / "val.jsonl")
    right = []
    for item in acc.items:
        row = rows[int(item)]
        prompt = row["passage"] + "\nQuestion: " + row["question"] + "?\nAnswer:"
        values = np.array([likelihood(smol, prompt, answer)[0] for answer in (" no", " yes")])
        right.append(chosen(values, int(row["answer"])))
    compare(acc, right)


def test_hellaswag(smol, data):
    norm, acc = scored(smol, data, "hellaswag")
    rows = rows_of(data / "hellaswag" / "val_1000.jsonl")
    right, right_by_length = [], []
    for item in acc.items:
        row = rows[int(item)]
        values = [likelihood(smol, row["query"], " " + ending)[0] for ending in row["choices"]]
        lengths = [len(ending) for ending in row["choices"]]
        right.append(chosen(np.array(values), row["answer"]))
        right_by_length.append(chosen(np.array(values) / lengths, row["answer"]))
    compare(acc, right)
    assert [norm.metric, acc.metric] == ["acc_norm", "acc"]
    same = [e in (None, s) for s, e in zip(norm.by_item.sums, right_by_length, strict=True)]
    assert all(same)


def test_lambada(smol, data):
    (acc,) = scored(smol, data, "lambada")
    rows = rows_of(data / "lambada" / "test.jsonl")
    words = [(rows[int(i)]["context"], " " + rows[int(i)]["continuation"]) for i in acc.items]
    compare(acc, [float(likelihood(smol, *pair)[1]) for pair in words])
    assert acc.mean > 0.1


def asked(row):
    lines = [row["question"].strip()]
    lines += [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
    return "\n".join([*lines, "Answer:"])


def chance_in(rows):
    """That of a guess, or of one letter that is right far more often."""
    share = max(Counter(row["answer"] for row in rows).values()) / len(rows)
    return share if share > 0.25 + 4 * math.sqrt(0.25 * 0.75 / len(rows)) else 0.25


def test_mmlu(smol, data):
    (acc,) = scored(smol, data, "mmlu")
    assert (acc.task, acc.num_shots) == ("mmlu", 5)
    test, dev = (rows_of(data / "mmlu" / f"{split}.jsonl") for split in ("test", "dev"))
    right, chances = [], []
    for item in acc.items:
        subject, index = item.removeprefix("mmlu_").split("/")
        rows = [one for one in test if one["subject"] == subject]
        chances.append(chance_in(rows))
        row = rows[int(index)]
        shots = [one for one in dev if one["subject"] == subject]
        assert len(shots) == 5
        about = f"about {subject.replace('_', ' ')}.\n\n"
        prompt = "The following are multiple choice questions (with answers) " + about
        prompt += "".join(f"{asked(one)} {'ABCD'[one['answer']]}\n\n" for one in shots)
        given = smol[1](prompt + asked(row))["input_ids"]
        logs = log_softmax(plain_logits(smol[0], given))[-1]
        letters = [smol[1](" " + letter)["input_ids"] for letter in "ABCD"]
        assert all(len(one) == 1 for one in letters)
        right.append(chosen(np.array([logs[one[0]] for one in letters]), row["answer"]))
    compare(acc, right)
    assert acc.chance == pytest.approx(np.mean(chances))
    assert len({item.split("/")[0] for item in acc.items}) == min(ITEMS, 57)
