"""The quick patch against a slow twin in float64, and what it leaves behind: nothing."""

import copy
import itertools
import json
import tempfile

import numpy as np
import pytest
import torch

import shallower as sh
from shallower.models.layerwise import Layerwise
from shallower.models.residual_writers import Writers
from shallower.patching import states
from shallower.patching.quick import HELD, RIDGES, QuickPatch, find_writers
from shallower.texts.batches import TokenBatches
from shallower.values.layers import blocks_of
from shallower.values.tokens import Tokens
from tests.conftest import mostly_slow, tiny_llama
from tests.documents import TEXTS, assert_same, state_of
from tests.examples import sentences
from tests.families import random_model

SCATTERED = (2, 4, 5, 7)


@pytest.fixture(scope="module")
def model():
    """A random Llama of eight layers that write as much as they read. Tests leave it as it is."""
    model = tiny_llama(8)
    with torch.no_grad():
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.mul_(20)
    return model


def batches_of(words, texts, batch_size=8):
    return list(TokenBatches(words, texts, Tokens(32, batch_size), min_tokens=2))


def plan_of(layers, num_layers=8):
    return sh.Plan.of(num_layers, layers)


def texts_in_order(batches):
    """(1, T) token ids of every text, without padding, in the order of the batches."""
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            yield torch.from_numpy(ids[mask.astype(bool)])[None]


def states_behind(model, layer, ids):
    """(T, D), the output of a layer."""
    taken = []
    hook = model.model.layers[layer].register_forward_hook(
        lambda _module, _args, out: taken.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.inference_mode():
        model(input_ids=ids)
    hook.remove()
    return taken[0].reshape(ids.shape[1], -1)


def rows_of(whole, cut, batches, layer, target):
    """Inputs of a down-projection of a cut model, what is missing behind the layer, and the aims.

    By text: three lists of (T, F), (T, D) and (T, D), float64.
    """
    inputs, left, aims = [], [], []
    down = cut.model.layers[layer].mlp.down_proj
    hook = down.register_forward_hook(lambda _, args, out: inputs.append(args[0][0]))
    for ids in texts_in_order(batches):
        aim, found = states_behind(whole, target - 1, ids), states_behind(cut, layer, ids)
        left.append((aim - found).double().numpy())
        aims.append(aim.double().numpy())
    hook.remove()
    return [x.double().numpy() for x in inputs], left, aims


def no_farther(rows, aims):
    """What is missing, at first tokens at most FARTHEST times as long as the others' mean aim."""
    shares = [
        min(1.0, states.FARTHEST * norms[1:].mean() / np.linalg.norm(r[0]))
        for r, norms in zip(rows, (np.linalg.norm(a, axis=1) for a in aims), strict=True)
    ]
    return [np.vstack([s * r[:1], r[1:]]) for s, r in zip(shares, rows, strict=True)]


def mean_square(inputs):
    """The mean over inputs of their squares' sums; first tokens are left out."""
    return np.square(np.concatenate([x[1:] for x in inputs])).sum(axis=0).mean()


def ridge_map(inputs, targets, penalty):
    """(D, F): the map by its definition."""
    x, r = np.concatenate(inputs), np.concatenate(targets)
    return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ r).T


def slow_twin(model, batches, dropped):
    """The matrices of a patched model by layer, and their ridges, block after block."""
    cut, gone, found, ridges = copy.deepcopy(model), [], {}, []
    for block in blocks_of(dropped):
        place = block.start - 1 - len(gone)  # of the layer in the cut so far
        rows = rows_of(model, cut, batches, place, block.stop)
        (fit_x, fit_r, fit_aims), (held_x, held_r, held_aims) = (
            [[v for i, v in enumerate(part) if (i % HELD == 1) == held] for part in rows]
            for held in (False, True)
        )
        fit_r, held_r = no_farther(fit_r, fit_aims), no_farther(held_r, held_aims)
        errors = {}
        for ridge in RIDGES:
            solved = ridge_map(fit_x, fit_r, ridge * mean_square(fit_x))
            errors[ridge] = sum(
                np.square(b[1:] - a[1:] @ solved.T).sum()
                for a, b in zip(held_x, held_r, strict=True)
            )
        ridges.append(min(errors, key=errors.get))
        weight = cut.model.layers[place].mlp.down_proj.weight
        change = ridge_map(fit_x + held_x, fit_r + held_r, ridges[-1] * mean_square(fit_x))
        solved = weight.detach().double().numpy() + change
        with torch.no_grad():
            weight.copy_(torch.from_numpy(solved))
        found[block.start - 1] = solved
        sh.drop_layers(cut, [range(block.start - len(gone), block.stop - len(gone))])
        gone += block.layers
    return found, tuple(ridges)


@pytest.mark.parametrize(
    ("dropped", "farthest"),
    mostly_slow(
        itertools.product([(3, 4), SCATTERED, (1,)], [states.FARTHEST, 0.5]),
        quick=[(SCATTERED, 0.5)],
    ),
)
def test_matrices_are_those_of_the_slow_twin(model, words, dropped, farthest, monkeypatch):
    """Within 1e-3 of matrices of about 1; texts of 3 to 20 words, so that there is padding."""
    monkeypatch.setattr(states, "FARTHEST", farthest)
    batches = batches_of(words, TEXTS + sentences(16))
    expected, ridges = slow_twin(model, batches, dropped)
    quick = QuickPatch(Layerwise(model), batches)
    with quick.patched(plan_of(dropped)) as fits:
        assert fits == dict(zip(expected, ridges, strict=True))
        for layer, matrix in expected.items():
            found = model.model.layers[layer].mlp.down_proj.weight.detach().double().numpy()
            assert np.abs(found - matrix).max() < 1e-3


@pytest.mark.slow
def test_a_first_token_that_is_out_of_reach_costs_the_others_little(learned, words):
    """The dropped layer makes the first token's massive activation; the others' error is kept."""
    model = copy.deepcopy(learned)
    massive = torch.zeros(32, model.config.hidden_size)
    massive[0, 0] = 2000.0
    model.model.layers[3].mlp.register_forward_hook(
        lambda _module, _args, out: out + massive[: out.shape[1]]
    )
    batches = batches_of(words, sentences(64, seed=5))
    held_out = sentences(64, seed=6)

    def loss(farthest):
        with pytest.MonkeyPatch.context() as patching:
            patching.setattr(states, "FARTHEST", farthest)
            with (
                QuickPatch(Layerwise(model), batches).patched(plan_of((3,))),
                sh.without_layers(model, [3]),
            ):
                return sh.evaluate_loss(model, words, held_out).nats

    assert loss(states.FARTHEST) < loss(float("inf"))


def test_the_ridges_of_the_test_differ(model, words):
    """So that a ridge that is not chosen would be noticed."""
    batches = batches_of(words, sentences(64, seed=3))
    quick = QuickPatch(Layerwise(model), batches)
    with quick.patched(plan_of((3, 4))) as many:
        assert many[2] < RIDGES[0]


@pytest.mark.parametrize(
    ("dtype", "dropped"),
    mostly_slow(
        itertools.product([torch.float32, torch.bfloat16], [(3, 4), SCATTERED]),
        [(torch.float32, SCATTERED), (torch.bfloat16, (3, 4))],
    ),
)
def test_the_model_is_as_before_whatever_happens(words, dtype, dropped):
    model = tiny_llama(8).to(dtype)
    before = state_of(model)
    quick = QuickPatch(Layerwise(model), batches_of(words, TEXTS))
    with quick.patched(plan_of(dropped)) as fits:
        names = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in fits}
        now = model.state_dict()
        assert {n for n in now if not torch.equal(now[n], before["weights"][n])} == names
    assert_same(before, state_of(model))
    with pytest.raises(KeyboardInterrupt), quick.patched(plan_of(dropped)):
        raise KeyboardInterrupt
    assert_same(before, state_of(model))


def test_the_same_plan_gives_the_same_patch_whatever_came_between(model, words):
    quick = QuickPatch(Layerwise(model), batches_of(words, TEXTS))
    with quick.patched(plan_of(SCATTERED)):
        first = copy.deepcopy(model.state_dict())
    with quick.patched(plan_of((1, 2, 3, 6))):
        pass
    with quick.patched(plan_of(SCATTERED)):
        assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())


def test_a_second_block_that_cannot_be_patched_leaves_nothing(words, model, monkeypatch):
    before = state_of(model)

    def find(model, layer, **more):
        return Writers(None, None) if layer == 3 else find_writers(model, layer, **more)

    monkeypatch.setattr("shallower.patching.quick.find_writers", find)
    quick = QuickPatch(Layerwise(model), batches_of(words, TEXTS))
    for _ in range(2):
        with (
            pytest.raises(sh.PatchError, match="layer 3, before the block, does not write"),
            quick.patched(plan_of(SCATTERED)),
        ):
            raise AssertionError
        assert_same(before, state_of(model))


def test_states_in_a_file_are_the_same(model, words, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    batches = batches_of(words, TEXTS)
    made = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: made.append(a) or from_file(*a, **k))
    kept = QuickPatch(Layerwise(model), batches)
    with kept.patched(plan_of(SCATTERED)):
        first = copy.deepcopy(model.state_dict())
    assert not made
    with QuickPatch(Layerwise(model), batches, room=0).patched(plan_of(SCATTERED)):
        assert len(made) == 2 * (9 + 1)
        assert not list(tmp_path.iterdir())
        assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())


def test_transposed_weights_too(words):
    model = random_model("gpt2")
    quick = QuickPatch(Layerwise(model), batches_of(words, TEXTS))
    before = model.transformer.h[2].mlp.c_proj.weight.detach().clone()
    with quick.patched(plan_of((3, 4), len(model.transformer.h))) as fits:
        assert [*fits] == [2]
        assert not torch.equal(model.transformer.h[2].mlp.c_proj.weight, before)
    assert torch.equal(model.transformer.h[2].mlp.c_proj.weight, before)


def test_what_cannot_be_patched_is_refused(model, words):
    quick = QuickPatch(Layerwise(model), batches_of(words, TEXTS))
    with pytest.raises(sh.PatchError, match=r"no layer before the block \[0, 2\)"):
        quick.patched(plan_of((0, 1, 5))).__enter__()
    with pytest.raises(sh.PlanError, match="for 9 layers, the model has 8"):
        quick.patched(plan_of((3,), 9)).__enter__()
    with pytest.raises(sh.TextsError, match="1 text, too few"):
        QuickPatch(Layerwise(model), batches_of(words, TEXTS[:1]))


def test_states_that_are_not_finite_are_refused(model, words):
    model = copy.deepcopy(model)
    quick = QuickPatch(Layerwise(model), batches_of(words, TEXTS))
    with quick.patched(plan_of((3, 4))):
        pass  # the layer is known to write by a plain map
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(torch.inf)
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(sh.PatchError, match="not finite"),
        quick.patched(plan_of((3, 4))),
    ):
        raise AssertionError
    after = model.state_dict()
    assert all(torch.equal(after[k].nan_to_num(), before[k].nan_to_num()) for k in before)


def test_too_little_memory_is_named(model, words, monkeypatch):
    def fail(*_args, **_more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    quick = QuickPatch(Layerwise(model), batches_of(words, TEXTS))
    monkeypatch.setattr("shallower.patching.quick.missing_equations", fail)
    with pytest.raises(sh.PatchError, match="lower batch_size"):
        quick.patched(plan_of((3, 4))).__enter__()


@pytest.mark.slow
def test_a_real_model_gets_most_of_what_a_bad_cut_lost_back(smol, data):
    """SmolLM2 less [11, 19): above 6 nats a token on C4, below 4.8 after the patch; whole 3.6."""
    model, tokenizer = smol
    lines = {}
    for name in ("c4.jsonl", "c4_eval.jsonl"):
        written = (data / "text" / name).read_text(encoding="utf-8").splitlines()[:17]
        lines[name] = [json.loads(line)["text"] for line in written]
    batches = list(TokenBatches(tokenizer, lines["c4.jsonl"], Tokens(256, 8), min_tokens=2))

    def loss():
        with sh.without_layers(model, [range(11, 19)]):
            texts = lines["c4_eval.jsonl"][:12]
            return sh.evaluate_loss(model, tokenizer, texts, max_length=256).nats

    cut = loss()
    with QuickPatch(Layerwise(model), batches).patched(plan_of(range(11, 19), 30)):
        patched = loss()
    assert cut > 5.5
    assert patched < 4.8
    assert loss() == cut
