"""Texts divided into batches, and what a layer misses of the whole model's states.

First tokens come no farther than 12 norms.
"""

import numpy as np
import pytest
import torch

from shallower.models.layerwise import Layerwise
from shallower.models.residual_writers import find_writers
from shallower.patching.states import (
    FARTHEST,
    Spool,
    divide,
    missing_equations,
    missing_rows,
)
from shallower.texts.batches import TokenBatches
from shallower.values.tokens import Tokens
from tests.conftest import tiny_llama
from tests.documents import TEXTS

LAYER, STOP, MASSIVE = 1, 4, 5000.0


@pytest.fixture(scope="module", params=[MASSIVE, 0.0])
def missing(request, words):
    """The layer's writer, its states, and the plain difference by text, (T, D) in float64."""
    model = tiny_llama(6)
    added = torch.zeros(64, model.config.hidden_size)
    added[0, 3] = request.param
    # The third layer makes the massive activation of the first token, as in real models.
    model.model.layers[2].mlp.register_forward_hook(lambda _m, _a, out: out + added[: out.shape[1]])
    layerwise = Layerwise(model)
    batches = list(TokenBatches(words, TEXTS, Tokens(32, 5), min_tokens=2))
    whole, cut = (Spool(batches, added.shape[1], torch.float32, on_disk=False) for _ in range(2))
    plain, aims = [], []
    with torch.no_grad():
        for index, batch in enumerate(batches):
            states = layerwise.embed(batch)
            cut[index] = layerwise.run(batch, states, range(LAYER))
            whole[index] = layerwise.run(batch, states, range(STOP))
            output = layerwise.run(batch, cut[index], (LAYER,))
            for row, length in enumerate(batch.attention_mask.sum(axis=1)):
                aims.append(whole[index][row, :length].double().numpy())
                plain.append(aims[-1] - output[row, :length].double().numpy())
        writers = find_writers(layerwise, LAYER, batch=batches[0], states=cut[0])
        states = {"whole": whole, "cut": cut}
        arguments = (layerwise, LAYER, (writers.feed_forward,))
        equations = missing_equations(*arguments, **states)
        rows = missing_rows(*arguments, **states)
    return equations, rows, plain, aims


def test_first_tokens_keep_their_direction_and_lose_their_length(missing):
    equations, rows, plain, aims = missing
    expected = []
    for left, aim in zip(plain, aims, strict=True):
        most = FARTHEST * np.linalg.norm(aim[1:], axis=1).mean()
        expected.append(left[0] * min(1.0, most / np.linalg.norm(left[0])))
    for kept in (equations.kept, rows.firsts.parts):
        found = torch.cat([targets for _, targets in kept]).double().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    reached = sum(
        np.square(e + aim[0] - left[0]).sum()
        for e, aim, left in zip(expected, aims, plain, strict=True)
    )
    assert rows.firsts.reached == pytest.approx(reached, rel=1e-4)


def test_other_tokens_miss_what_they_miss(missing):
    equations, rows, plain, aims = missing
    found = torch.cat([targets for _, targets in rows.others.parts]).double().numpy()
    np.testing.assert_allclose(found, np.concatenate([p[1:] for p in plain]), atol=1e-4)
    assert equations.count == len(found)
    reached = sum(np.square(aim[1:]).sum() for aim in aims)
    assert rows.others.reached == pytest.approx(reached, rel=1e-5)


@pytest.mark.parametrize("missing", [MASSIVE], indirect=True)
def test_the_massive_activation_of_the_test_is_out_of_reach(missing):
    _, _, plain, aims = missing
    for left, aim in zip(plain, aims, strict=True):
        assert np.linalg.norm(left[0]) > FARTHEST * np.linalg.norm(aim[1:], axis=1).mean()


def test_texts_are_tokenised_once_into_the_batches_of_their_lengths(words, monkeypatch):
    """As TokenBatches makes them of the texts by length; short ones are left out."""
    calls, call = [], type(words).__call__
    texts = [" ".join(f"w{i * j % 60}" for j in range(1 + i * 7 % 19)) for i in range(700)]
    texts[16::50] = ["", "w1"] * 7
    expected = [
        list(TokenBatches(words, part, Tokens(12, 2), min_tokens=2))
        for held in (False, True)
        for part in [
            sorted(
                (text for i, text in enumerate(texts) if (i % 8 == 7) is held),
                key=lambda text: (min(12, len(text.split())), text),
            )
        ]
    ]
    monkeypatch.setattr(type(words), "__call__", lambda *a, **k: calls.append(a) or call(*a, **k))
    found = divide(words, texts, tokens=Tokens(12, 2), num_tokens=10**6)
    assert len(calls) == len(texts)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert all(
                np.array_equal(getattr(one, name), getattr(other, name))
                for name in ("input_ids", "attention_mask", "samples")
            )
