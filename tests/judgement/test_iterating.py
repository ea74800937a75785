"""Iteration: what it sees in the cut so far, what it chooses, and that it can be killed."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch

import shallower as sh
from shallower.judgement.iterating import iterate
from shallower.judgement.looking_again import costs_in_a_cut
from shallower.judgement.splits import Splits
from shallower.judgement.verifying import verifier_of
from shallower.models.decoder import Decoder
from shallower.models.layerwise import Layerwise
from shallower.texts.batches import TokenBatches
from shallower.values.layers import blocks_of
from shallower.values.tokens import Tokens
from tests.conftest import tiny_llama
from tests.documents import assert_same, state_of
from tests.examples import sentences
from tests.judgement import twins
from tests.judgement.toy import NUM_LAYERS, toy_model, toy_texts

WRITES, READS, TAKES_BACK = 2, 3, 5
"""A layer that writes a little signal, one that adds by it, and one that takes that back."""


class Killed(Exception):  # noqa: N818 - no error
    pass


class MemoryStore:
    """Results as JSON; after ``writes`` more of them the process dies."""

    def __init__(self):
        self.known, self.journals, self.writes = {}, {}, None

    def _write(self):
        if self.writes is not None:
            self.writes -= 1
            if self.writes < 0:
                raise Killed

    def get(self, kind, inputs):
        found = self.known.get(_key(kind, inputs))
        return None if found is None else json.loads(found)

    def put(self, kind, inputs, value):
        self._write()
        self.known[_key(kind, inputs)] = json.dumps(value)

    def journal(self, kind, inputs):
        return _Journal(self, self.journals.setdefault(_key(kind, inputs), []))


class _Journal:
    def __init__(self, store, lines):
        self.store, self.lines = store, lines

    def read(self):
        return [json.loads(line) for line in self.lines]

    def append(self, record):
        self.store._write()
        self.lines.append(json.dumps(record))


def _key(kind, inputs):
    return json.dumps([kind, inputs], sort_keys=True)


def make_verifier(model, words, texts, store=None, **options):
    fit, choose = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    options = {"top": 2, "after": "none", "progress": False, **options}
    return verifier_of(
        Decoder.of(model), words, Splits(fit, choose, [], 0), store=store or MemoryStore(),
        texts="some", tokens=Tokens(32, 8), **options,
    )  # fmt: skip


@torch.no_grad()
def chained_model():
    """Layers of which three can go, and of those the first alone looks as if it could.

    It writes a little to channel 0, which nothing else writes or reads but two layers, which write
    much to channel 1; the second takes back what the first adds, and neither channel 1 nor channel
    0 is read between them, or by the head.
    """
    model = toy_model(("plain",) * NUM_LAYERS)
    layers = model.model.layers
    model.model.embed_tokens.weight[:, :2] = 0
    for index, layer in enumerate(layers):
        for writer in (layer.o_proj, layer.down_proj):
            writer.weight[:2] = 0
            if index == WRITES:
                writer.weight[2:] = 0
        for reader in (layer.v_proj, layer.up_proj):
            reader.weight[:, :2] = 0
    layers[WRITES].o_proj.weight[0] = 0.01
    for index in (READS, TAKES_BACK):
        for reader in (layers[index].v_proj, layers[index].up_proj):
            reader.weight.zero_()
        layers[index].v_proj.weight[:, 0] = 1
        layers[index].o_proj.weight.zero_()
        layers[index].down_proj.weight.zero_()
        layers[index].o_proj.weight[1] = 20 if index == READS else -20
    return model


def test_it_sees_what_one_cut_cannot(words):
    """Two layers do nothing once a third is gone, and are far from it as long as that is there."""
    model = chained_model()
    texts = toy_texts(model, count=32)
    verifier = make_verifier(model, words, texts)
    costs = costs_in_a_cut(verifier.trials.model, verifier.subject.batches, range(NUM_LAYERS))
    silent = [layer for layer in range(NUM_LAYERS) if layer != WRITES]
    again = costs_in_a_cut(verifier.trials.model, verifier.subject.batches, silent)
    for name in ("angular", "block_influence"):
        one, other = costs[name].blocks.diagonal(1), again[name].blocks.diagonal(1)
        assert np.argmin(one) == WRITES
        assert min(one[READS], one[TAKES_BACK]) > 10 * one[WRITES]
        assert max(other[silent.index(READS)], other[silent.index(TAKES_BACK)]) < 1e-6
    steps = iterate(verifier, 3, step=1)
    assert [step.n for step in steps] == [1, 2, 3]
    assert steps[0].plan.dropped == (WRITES,)
    assert steps[2].plan.dropped == (WRITES, READS, TAKES_BACK)
    assert any(name.endswith(" again") for name in steps[2].candidates[0].proposed_by)
    whole = verifier.trials.scores(()).mean
    assert steps[2].candidates[0].score - whole < 1e-3


def test_costs_in_a_cut_are_those_of_a_model_that_is_cut(words):
    """Within 1e-6 of NumPy in float64, on the states of a copy without the layers."""
    model = tiny_llama(8)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(20)
    batches = list(TokenBatches(words, sentences(12), Tokens(32, 4), min_tokens=2))
    gone = (2, 3, 6)
    found = costs_in_a_cut(Layerwise(model), batches, sh.Plan.of(8, gone).survivors)
    cut = copy.deepcopy(model)
    sh.drop_layers(cut, gone)
    states = twins.hooked_states(cut, cut.model.layers, batches)
    last = np.stack([text[:, -1] for text in states], axis=1)
    for start, stop in [(0, 1), (1, 4), (0, 5), (4, 5)]:
        x, y = last[start], last[stop]
        cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        angles = np.arccos(np.clip(cosines, -1, 1)).mean() / np.pi
        assert found["angular"].blocks[start, stop] == pytest.approx(angles, abs=1e-6)
        moved = (np.linalg.norm(y - x, axis=1) / np.linalg.norm(x, axis=1)).mean()
        assert found["relative_l2"].blocks[start, stop] == pytest.approx(moved, abs=1e-5)
    every = np.concatenate(states, axis=1)
    for layer in range(5):
        x, y = every[layer], every[layer + 1]
        cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        expected = 1 - cosines.mean()
        assert found["block_influence"].blocks[layer, layer + 1] == pytest.approx(
            expected, abs=1e-6
        )
        added = (np.linalg.norm(y - x, axis=1) / np.linalg.norm(y, axis=1)).mean()
        assert found["magnitude"].blocks[layer, layer + 1] == pytest.approx(added, abs=1e-6)


@pytest.fixture(scope="module")
def patchable():
    """A random Llama whose layers write as much as they read. Tests leave it as it is."""
    model = tiny_llama(8)
    with torch.no_grad():
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.mul_(20)
    return model


def texts_of(count=24):
    return sentences(count, seed=5)


@pytest.mark.parametrize("after", ["none", "patch"])
def test_every_step_holds_the_one_before(patchable, words, after):
    before = state_of(patchable)
    steps = iterate(make_verifier(patchable, words, texts_of(), after=after), 5, step=2)
    assert_same(before, state_of(patchable))
    assert [step.n for step in steps] == [2, 4, 5]
    for one, other in pairwise(steps):
        for candidate in other.candidates:
            assert set(one.plan.dropped) < set(candidate.plan.dropped)
    again = {name for step in steps[1:] for c in step.candidates for name in c.proposed_by}
    assert {"angular again", "block_influence again"} & again


def test_the_cut_is_patched_while_it_is_looked_at(patchable, words, monkeypatch):
    verifier = make_verifier(patchable, words, texts_of(), after="patch")
    seen, before = [], patchable.model.layers[:]

    def look(model, batches, survivors):
        weights = [layer.mlp.down_proj.weight.detach().clone() for layer in before]
        seen.append((tuple(survivors), weights))
        return costs_in_a_cut(model, batches, survivors)

    whole = [layer.mlp.down_proj.weight.detach().clone() for layer in before]
    monkeypatch.setattr("shallower.judgement.iterating.costs_in_a_cut", look)
    first = iterate(verifier, 4, step=2)[0]
    [(survivors, weights)] = seen
    assert survivors == first.plan.survivors
    changed = [i for i in range(8) if not torch.equal(weights[i], whole[i])]
    assert changed == [block.start - 1 for block in first.plan.blocks]


def test_a_cut_that_cannot_be_patched_is_looked_at_as_it_is(patchable, words, monkeypatch):
    verifier = make_verifier(patchable, words, texts_of(), after="patch")
    first = verifier.verify(2)
    patched = verifier.patch.patched

    def refuse(plan):
        if plan.dropped == first.plan.dropped:
            raise sh.PatchError("not this one")
        return patched(plan)

    monkeypatch.setattr(verifier.patch, "patched", refuse)
    second = iterate(verifier, 4, step=2)[1]
    assert second.failed["patch before looking again"] == "not this one"


def test_without_states_to_compare_the_verifier_goes_on(patchable, words, monkeypatch):
    verifier = make_verifier(patchable, words, texts_of())

    def look(*_):
        raise sh.StatesError("there is nothing to compare")

    monkeypatch.setattr("shallower.judgement.iterating.costs_in_a_cut", look)
    first, second = iterate(verifier, 4, step=2)
    assert second.failed["looking again"] == "there is nothing to compare"
    assert second.plan == verifier.verify(4, base=first.plan.dropped).plan


def test_no_more_blocks_than_are_allowed(patchable, words):
    steps = iterate(make_verifier(patchable, words, texts_of(), max_blocks=1), 4, step=1)
    for step in steps:
        assert all(len(blocks_of(one.plan.dropped)) == 1 for one in step.candidates)


def test_a_killed_iteration_goes_on_to_the_same_bits(patchable, words):
    """Killed at every fifth of its writes, and once more right after."""

    def bits(steps):
        values = [step.to_json() for step in steps]
        return json.dumps([{**one, "seconds": 0} for one in values], sort_keys=True)

    store = MemoryStore()
    options = {"after": "patch", "top": 1}
    expected = bits(
        iterate(make_verifier(patchable, words, texts_of(), store, **options), 3, step=2)
    )
    store.writes = 0  # all is known
    again = iterate(make_verifier(patchable, words, texts_of(), store, **options), 3, step=2)
    assert bits(again) == expected
    total = len(store.known) + sum(map(len, store.journals.values()))
    killed, deaths = MemoryStore(), 0
    while True:
        killed.writes = max(1, total // 5) if deaths % 2 else 1
        verifier = make_verifier(patchable, words, texts_of(), killed, **options)
        try:
            steps = iterate(verifier, 3, step=2)
        except Killed:
            deaths += 1
            continue
        break
    assert deaths > 5
    assert bits(steps) == expected
    written = len(killed.known) + sum(map(len, killed.journals.values()))
    assert written == total


@pytest.mark.parametrize("step", [0, -1, 4])
def test_a_step_that_cannot_be(patchable, words, step):
    verifier = make_verifier(patchable, words, texts_of())
    with pytest.raises(sh.LayersError, match=rf"^step = {step}: expected 1 to n = 3 layers"):
        iterate(verifier, 3, step=step)


def test_more_layers_than_there_are(patchable, words):
    with pytest.raises(sh.LayersError):
        iterate(make_verifier(patchable, words, texts_of()), 8, step=2)


def test_damaged_proposals_are_refused(patchable, words):
    store = MemoryStore()
    iterate(make_verifier(patchable, words, texts_of(), store), 3, step=2)
    for key in [key for key in store.known if "looked_again" in key]:
        store.known[key] = json.dumps(
            {
                "proposals": [{"dropped": [99], "name": "angular"}],
                "failed": {},
                "layer_forwards": 0,
                "seconds": 0.0,
            }
        )
    store.known = {k: v for k, v in store.known.items() if not k.startswith('["verified"')}
    with pytest.raises(sh.CacheError, match="--no-cache"):
        iterate(make_verifier(patchable, words, texts_of(), store), 3, step=2)
