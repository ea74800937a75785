"""sh.verify: splits, caches and refusals."""

import pytest

import shallower as sh
from shallower.errors import (
    CriterionError,
    LayersError,
    ModelError,
    OutputError,
    PlanError,
    TextsError,
)
from shallower.judgement.trials import Trials
from shallower.patching.quick import QuickPatch
from shallower.runs.cache import Cache
from tests.conftest import tiny_llama
from tests.documents import documents

TEXTS = documents(32, seed=6)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def counted(monkeypatch):
    """Cuts that are judged, and patches that are made, from now on."""
    done = []
    for cls, name in ((Trials, "_measure"), (QuickPatch, "_solve")):
        original = getattr(cls, name)

        def noted(self, *arguments, _original=original, _name=name):
            done.append((_name, str(arguments)))
            return _original(self, *arguments)

        monkeypatch.setattr(cls, name, noted)
    return done


def plain(found):
    return {n: one.to_json() | {"seconds": 0} for n, one in found.items()}


def test_several_sizes_are_verified_as_each_by_itself(model, words, counted):
    both = sh.verify(model, words, TEXTS, n=[2, 1])
    assert [*both] == [1, 2]
    assert counted
    counted.clear()
    assert plain(sh.verify(model, words, TEXTS, n=2)) == {2: plain(both)[2]}
    assert counted == []
    alone = sh.verify(model, words, TEXTS, n=2, cache=False)
    assert plain(alone) == {2: plain(both)[2]}
    assert counted
    for n, one in both.items():
        assert len(one.plan.dropped) == n
        assert (one.after, one.judge, one.num_items) == ("patch", "loss", 16)
        assert one.layer_forwards > 0


def test_as_many_as_half_fit_of_the_texts_that_are_read(model, words):
    found = sh.verify(model, words, iter(TEXTS), n=1, after="none", max_texts=20)
    assert found[1].num_items == 10


def test_after_a_kill_nothing_is_repeated(model, words, counted, monkeypatch):
    expected = plain(sh.verify(model, words, TEXTS, n=2, cache=False))
    total = len(counted)
    counted.clear()

    class Killed(BaseException):
        pass

    put = Cache.put
    monkeypatch.setattr(Cache, "put", lambda *_arguments: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        sh.verify(model, words, TEXTS, n=2)
    monkeypatch.setattr(Cache, "put", put)
    assert plain(sh.verify(model, words, TEXTS, n=2)) == expected
    assert len(counted) == total
    assert len(set(counted)) == total


def test_the_divergence_judges_too(model, words):
    found = sh.verify(model, words, TEXTS, n=2, judge="kl")[2]
    assert found.judge == "kl"
    assert found.candidates[0].score >= 0


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"n": []}, LayersError, "--n"),
        ({"n": 0}, LayersError, "--n"),
        ({"n": 6}, LayersError, "expected 1 <= n <= 5"),
        ({"n": 1, "top": 0}, LayersError, "top, --verify"),
        ({"n": 1, "max_blocks": 0}, LayersError, "max_blocks, --blocks"),
        ({"n": 1, "after": "heal"}, PlanError, "expected none or patch"),
        ({"n": 1, "judge": "options"}, CriterionError, "expected loss or kl"),
        ({"n": 1, "spill": "nowhere"}, OutputError, "no folder nowhere"),
        ({"n": 1, "max_texts": 0}, TextsError, "at least 1"),
        ({"n": 1, "max_texts": 11}, TextsError, "expected at least 8 and 4"),
    ],
)
def test_what_cannot_be_is_refused(model, words, options, error, said):
    with pytest.raises(error, match=said):
        sh.verify(model, words, TEXTS, **options)


def test_texts_of_a_single_token_are_not_enough(model, words):
    texts = [f"w{i}" for i in range(20)]
    with pytest.raises(TextsError, match="two tokens"):
        sh.verify(model, words, texts, n=1)


def test_several_models_are_refused(model, words, tmp_path):
    with pytest.raises(ModelError, match="on one model"):
        sh.verify([tmp_path / "one", tmp_path / "other"], texts=TEXTS, n=1)
    with pytest.raises(ModelError, match="needs its tokenizer"):
        sh.verify(model, texts=TEXTS, n=1)
    with pytest.raises(TextsError, match="iterable of strings"):
        sh.verify(model, words, "a text", n=1)
