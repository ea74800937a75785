"""Cuts judged from states that they share, against models that are really cut."""

import json
from collections import Counter
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shallower as sh
from shallower import CacheError, LayersError
from shallower.judgement.judges.judge import Judge, KLJudge, LossJudge
from shallower.judgement.trials import Trials
from shallower.memory import budget
from shallower.models.layerwise import Layerwise
from shallower.texts.batches import Batch
from tests.conftest import mostly_slow, tiny_llama

NUM_LAYERS = 6
SIZES = (3, 2, 4)
"""Texts of the batches."""


def batches(sizes=SIZES, length=9, seed=0):
    """Random ids, padded on the right, numbered through."""
    source, found, start = np.random.default_rng(seed), [], 0
    for size in sizes:
        lengths = source.integers(2, length + 1, size)
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        ids = source.integers(0, 100, mask.shape) * mask
        found.append(Batch(ids, mask, np.arange(start, start + size)))
        start += size
    return found


def plain_sums(model, some, dropped):
    """The nats of every text, by a model that is really cut, in float64."""
    found = []
    with sh.without_layers(model, sorted(dropped)) if dropped else _nothing():
        for batch in some:
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
                text = torch.from_numpy(ids[: mask.sum()])
                with torch.inference_mode():
                    logits = model(input_ids=text[None], use_cache=False).logits[0].double()
                odds = logits.log_softmax(dim=-1)[:-1].numpy()
                found.append(-odds[np.arange(len(odds)), text[1:].numpy()].sum())
    return np.array(found)


@cache
def sums_of_cut(dropped):
    """The nats of every text of the batches, by the model that is really cut."""
    return plain_sums(tiny_llama(NUM_LAYERS), batches(), dropped)


@contextmanager
def _nothing():
    yield


class Counted:
    """How many layers really run, times texts."""

    def __init__(self, model):
        self.runs = 0
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(self._count)

    def _count(self, _module, _args, output):
        self.runs += len(output[0])


class Memory(list):
    """A journal that goes through JSON."""

    def read(self):
        return [json.loads(line) for line in self]

    def append(self, record):
        super().append(json.dumps(record))


@pytest.fixture(scope="module")
def model():
    return tiny_llama(NUM_LAYERS)


def make(model, some=None, *, judge=LossJudge, **options):
    some = batches() if some is None else some
    return Trials(Layerwise(model), judge(some), **options)


cuts = st.sets(st.integers(0, NUM_LAYERS - 1), max_size=NUM_LAYERS - 1)
MEMORY = {"ample": None, "some": 12_000, "a path": 6_000, "hardly": 2_000, "none": 0}


@settings(max_examples=settings.default.max_examples // 4)
@given(st.lists(cuts, min_size=1, max_size=8), st.sampled_from(sorted(MEMORY)))
def test_cuts_are_judged_as_models_that_are_cut(tried, memory):
    trials = make(tiny_llama(NUM_LAYERS), memory=MEMORY[memory])
    for dropped in tried:
        found = trials.scores(dropped)
        expected = sums_of_cut(frozenset(dropped))
        np.testing.assert_allclose(found.sums, expected, rtol=1e-5)
        assert found.complete


@pytest.mark.parametrize("judge", mostly_slow([LossJudge, KLJudge], [KLJudge]))
def test_counts_do_not_depend_on_memory(model, monkeypatch, judge):
    stores = [{}, {"memory": 0}, {"memory": 6_000}, {"memory": 9_000}]
    charged = [run_all(make(model, judge=judge, **options))[1] for options in stores]
    monkeypatch.setattr(budget, "available_bytes", lambda _device: 4_000)
    charged.append(run_all(make(model, judge=judge))[1])
    assert charged == [charged[0]] * 5


@settings(max_examples=settings.default.max_examples // 4)
@given(st.lists(cuts, min_size=1, max_size=12))
def test_with_room_for_all_states_no_layer_runs_twice_on_the_same(tried):
    model = tiny_llama(NUM_LAYERS)
    trials = make(model)
    with trials.counted() as count:
        for dropped in tried:
            trials.scores(dropped)
    paths = {trials.path(dropped) for dropped in tried}
    # Final states are not kept: a path that ends early may be the beginning of a longer one.
    ran = {path[:depth] for path in paths for depth in range(1, len(path) + 1)}
    assert count.layer_forwards <= sum(SIZES) * (len(ran) + len(paths))
    assert count.layer_forwards >= sum(SIZES) * len(ran)


def test_bits_do_not_depend_on_memory(model):
    tried = [(), (2,), (2, 4), (0,), (5,), (1, 2, 3), (4,), ()]
    found = []
    for memory in MEMORY.values():
        trials = make(model, memory=memory)
        found.append(np.array([trials.scores(cut).sums for cut in tried]))
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_some_looks_judge_the_first_items(model):
    trials = make(model)
    whole = trials.scores((1,))
    some = trials.scores((1,), looks=2)
    assert not some.complete
    assert len(some) == 5
    assert np.array_equal(some.sums[:5], whole.sums[:5])
    assert len(trials.scores((1,), looks=99)) == 9
    assert len(trials.scores((1,), looks=0)) == 0


def test_what_is_judged_again_is_counted_and_not_run_again():
    model = tiny_llama(NUM_LAYERS)
    trials = make(model)
    counted, works = Counted(model), []
    for _ in range(3):
        with trials.counted() as count:
            for cut in [(2,), (2, 3), (1,), (2,)]:
                trials.scores(cut)
        works.append(count.layer_forwards)
        assert counted.runs == works[0]
    assert works[0] == works[1] == works[2]


def test_layers_that_are_not_there_are_refused(model):
    trials = make(model)
    with pytest.raises(LayersError, match="no layer 6: its 6 layers are"):
        trials.scores((1, 6))


class Preparing(LossJudge):
    """A judge that gets the whole model first."""

    def prepare(self, model, index, states):
        self.given = [*getattr(self, "given", []), (index, states.clone())]


def test_a_judge_gets_the_whole_model_once_a_batch_before_any_cut():
    model, some = tiny_llama(NUM_LAYERS), batches()
    trials = make(model, some, judge=Preparing)
    counted = Counted(model)
    with trials.counted() as count:
        trials.scores((2,), looks=1)
        assert [index for index, _ in trials.judge.given] == [0]
        trials.scores((2,))
        trials.scores((4,))
    assert [index for index, _ in trials.judge.given] == [0, 1, 2]
    assert count.layer_forwards == counted.runs == sum(SIZES) * (6 + 3 + 1)
    layerwise = Layerwise(model)
    for index, states in trials.judge.given:
        expected = layerwise.run(some[index], layerwise.embed(some[index]), range(NUM_LAYERS))
        assert torch.equal(states, expected)
    assert type(trials.judge).prepare is not Judge.prepare


# The journal.
TRIED = [(), (2,), (2, 3), (1,), (5,), (0, 4)]


def run_all(trials, looks=None):
    with trials.counted() as count:
        found = [trials.scores(cut, looks=looks).sums for cut in TRIED]
    return np.array(found), count.layer_forwards


@pytest.mark.parametrize(
    ("judge", "memory"),
    mostly_slow(
        [(LossJudge, None), (LossJudge, 6_000), (Preparing, None), (Preparing, 6_000)],
        quick=[(Preparing, 6_000)],
    ),
)
def test_a_process_goes_on_from_any_record(judge, memory):
    model = tiny_llama(NUM_LAYERS)
    journal = Memory()
    expected = run_all(make(model, judge=judge, journal=journal, memory=memory))
    assert len(journal) == len(TRIED) * len(SIZES)
    counted = Counted(model)
    for kept in range(0, len(journal) + 1, 3):
        rest = Memory(journal[:kept])
        trials = make(model, judge=judge, journal=rest, memory=memory)
        before = counted.runs
        found = run_all(trials)
        assert np.array_equal(found[0], expected[0])
        assert found[1] == expected[1]
        assert Counter(map(key_of, rest)) == Counter(map(key_of, journal))
        runs = counted.runs - before
    assert runs == 0  # with all records there is nothing left to do


def key_of(line):
    record = json.loads(line)
    return tuple(record["dropped"]), record["look"]


GOOD = {"dropped": [1, 3], "look": 1, "sums": [2.5, 3.5], "seconds": 50.0}


def test_a_record_is_believed(model):
    journal = Memory([json.dumps(GOOD)])
    trials = make(model, journal=journal)
    assert trials.scores((3, 1)).sums[3:5].tolist() == [2.5, 3.5]


def test_what_is_recalled_takes_as_long_as_it_did_and_once(model):
    trials = make(model, journal=Memory([json.dumps(GOOD)]))
    started = trials.clock()
    trials.scores((2,))
    assert trials.clock() - started < 50
    for _ in range(2):
        trials.scores((3, 1))
        assert 50 <= trials.clock() - started < 100


def test_a_new_record_says_how_long_it_took(model):
    journal = Memory()
    trials = make(model, journal=journal)
    started = trials.clock()
    trials.scores((3, 1))
    took = sum(json.loads(line)["seconds"] for line in journal)
    assert 0 < took <= trials.clock() - started


@pytest.mark.parametrize(
    "change",
    [
        {"dropped": [3, 1]}, {"dropped": [1, 1]}, {"dropped": [1, 6]}, {"dropped": [-1]},
        {"dropped": [True]}, {"dropped": "1"}, {"look": 3}, {"look": -1}, {"look": 1.0},
        {"look": True}, {"sums": [2.5]}, {"sums": [2.5, float("nan")]}, {"sums": [2.5, None]},
        {"sums": [2.5, float("inf")]}, {"sums": {}}, {"seconds": -1.0}, {"seconds": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_record_is_named(model, change):
    journal = Memory([json.dumps(GOOD), json.dumps({**GOOD, **change})])
    with pytest.raises(CacheError, match="record 1 of the trials"):
        make(model, journal=journal)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_record_without_an_entry_is_named(model, name):
    journal = Memory([json.dumps({key: GOOD[key] for key in GOOD if key != name})])
    with pytest.raises(CacheError, match=f"record 0 .*{name}"):
        make(model, journal=journal)
    with pytest.raises(CacheError, match="record 0"):
        make(model, journal=Memory(["[]"]))
