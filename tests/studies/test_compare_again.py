"""Comparisons that were cached, in part or whole, and what makes them others."""

from dataclasses import asdict, replace

import pytest
import torch

import shallower as sh
from shallower.judgement.criteria import is_built_in
from shallower.judgement.trials import Trials
from tests.conftest import tiny_llama
from tests.documents import documents
from tests.studies.conftest import Killed
from tests.studies.test_compare import FEW, HELD_OUT, TEXTS, Odd

UNTIMED = {"seconds": 0, "choice_seconds": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def test_a_comparison_is_measured_once(model, words, tmp_path, tried):
    asked = {"n": [1, 2], "criteria": FEW, "out": tmp_path / "out"}
    first = sh.compare(model, words, TEXTS, HELD_OUT, **asked)
    assert tried
    tried.clear()
    again = sh.compare(model, words, TEXTS, HELD_OUT, **asked)
    assert again.to_json() == first.to_json()
    assert tried == []
    sh.compare(model, words, TEXTS, HELD_OUT, **asked, cache=False, overwrite=True)
    assert tried


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was_cut_short(model, words, tried, monkeypatch):
    asked = {"n": [1, 2, 3], "criteria": ["greedy", "exhaustive", "evolution", "one_shot"]}
    whole = sh.compare(model, words, TEXTS, HELD_OUT, **asked, cache=False)
    total = len(tried)
    measure, left = Trials.measure_states, [0]

    def until_killed(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return measure(self, *arguments)

    monkeypatch.setattr(Trials, "measure_states", until_killed)
    tried.clear()
    for trials in (3, total // 8, total // 4, total // 3):
        left[0] = trials
        with pytest.raises(Killed):
            sh.compare(model, words, TEXTS, HELD_OUT, **asked)
    left[0] = 10**6
    done = sh.compare(model, words, TEXTS, HELD_OUT, **asked)
    assert len(tried) == total

    def table(comparison):
        return [asdict(row) | UNTIMED for row in comparison.rows]

    assert table(done) == table(whole)


class Even(Odd):
    def costs(self, subject):
        values = [layer % 2 for layer in range(subject.num_layers)]
        return sh.Costs.of_layers(values, metric=self.name)


def test_a_criterion_from_outside_is_measured_anew(model, words, monkeypatch):
    for criterion, dropped in ((Odd(), (1,)), (Even(), (0,))):
        monkeypatch.setitem(sh.criteria, "odd", criterion)
        row, _ = sh.compare(model, words, TEXTS, HELD_OUT, n=[1], criteria=["odd"]).rows
        assert row.dropped == dropped


def test_all_criteria_are_those_of_the_table_as_it_is(model, words, monkeypatch):
    for name in [*sh.criteria]:
        if name not in FEW:
            monkeypatch.delitem(sh.criteria, name)
    sh.compare(model, words, TEXTS, HELD_OUT, n=[1])
    monkeypatch.setitem(sh.criteria, "odd", Odd())
    rows = sh.compare(model, words, TEXTS, HELD_OUT, n=[1]).rows
    assert [row.criterion for row in rows] == [*FEW, "odd"] * 2


def test_a_changed_criterion_is_not_that_of_the_table(monkeypatch):
    greedy = sh.criteria["greedy"]
    assert is_built_in(greedy)
    assert not is_built_in(type(greedy)())
    monkeypatch.setattr(greedy, "alpha", 0.9, raising=False)
    assert not is_built_in(greedy)


def test_the_order_and_the_names_of_texts_count(model, words):
    texts = {"one": TEXTS, "two": documents(24, seed=5)}
    asked = {"n": [2], "criteria": ["angular"]}
    for named in (texts, dict(reversed(texts.items()))):
        rows = sh.compare(model, words, named, HELD_OUT, **asked).rows
        assert [row.texts for row in rows] == [name for name in named for _ in ("cut", "patched")]


def test_costs_are_measured_once_for_all_sizes(model, words, monkeypatch):
    asked = {"criteria": ["taylor", "angular"]}
    one = sh.compare(model, words, TEXTS, HELD_OUT, n=[1, 2], **asked, cache=False)
    sh.compare(model, words, TEXTS, HELD_OUT, n=[1], **asked)
    for name in asked["criteria"]:
        monkeypatch.setattr(type(sh.criteria[name]), "costs", lambda *_: pytest.fail("again"))
    two = sh.compare(model, words, TEXTS, HELD_OUT, n=[1, 2], **asked)
    for first, second in zip(one.rows, two.rows, strict=True):
        assert asdict(first) | UNTIMED == asdict(second) | UNTIMED


def test_another_size_of_forward_is_no_damage(model, words, monkeypatch):
    from shallower.studies import measuring

    asked = {"n": [1], "criteria": ["exhaustive"]}
    sh.compare(model, words, TEXTS, HELD_OUT, **asked)
    fitted = measuring.fitting_tokens
    monkeypatch.setattr(
        measuring, "fitting_tokens", lambda *given: replace(fitted(*given), batch_size=2)
    )
    monkeypatch.setattr("shallower.store.store.Store.find", lambda *_: None)
    assert sh.compare(model, words, TEXTS, HELD_OUT, **asked).rows


def test_a_patch_without_memory_is_tried_again(model, words, monkeypatch):
    from shallower.patching.quick import QuickPatch

    asked = {"n": [1], "criteria": ["deepest"]}
    with monkeypatch.context() as patched:

        def no_memory(*_):
            raise torch.OutOfMemoryError("no memory")

        patched.setattr(QuickPatch, "_solve", no_memory)
        row = sh.compare(model, words, TEXTS, HELD_OUT, **asked).rows[1]
    assert row.standing is None
    assert "memory" in row.failed
    row = sh.compare(model, words, TEXTS, HELD_OUT, **asked).rows[1]
    assert row.standing is not None
    assert row.failed is None
