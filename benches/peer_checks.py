"""The operators of other tools against NumPy in float64, on a tiny random model."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peer_operators import GHOSTED_RIDGE, SHARES, collect, hadamard
from shallower.models.layerwise import Layerwise
from shallower.texts.batches import padded

START, STOP, WIDTH = 2, 4, 24


def tiny(seed=0):
    """A random Llama in float64 whose layers write much, and batches of unlike lengths."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(30)
            layer.self_attn.o_proj.weight.mul_(10)
    rng = np.random.default_rng(seed)
    texts = [rng.integers(61, size=rng.integers(4, 20)).tolist() for _ in range(24)]
    batches = [padded(list(enumerate(texts))[part : part + 6]) for part in range(0, 24, 6)]
    return model, texts, batches


def by_text(model, texts):
    """x, y and m of every text by itself, (T, D) each."""
    found, written = [], []
    down = model.model.layers[START - 1].mlp.down_proj
    hook = down.register_forward_hook(lambda _m, _a, out: written.append(out[0].numpy()))
    with torch.no_grad():
        for ids in texts:
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            found.append([states[START][0].numpy(), states[STOP][0].numpy(), written[-1]])
    hook.remove()
    return found


def ridge_by_rows(inputs, targets, ridge):
    """By an SVD of the rows, not by their sums."""
    u, s, v = np.linalg.svd(inputs, full_matrices=False)
    return (v.T * (s / (s**2 + ridge))) @ (u.T @ targets)


def check():
    """Assert that every operator is that of its formula."""
    model, texts, batches = tiny()
    sums, found = collect(Layerwise(model), batches, START, STOP), by_text(model, texts)
    x, y, m = (np.concatenate(parts) for parts in zip(*found, strict=True))
    inner = [np.concatenate([part[1:] for part in parts]) for parts in zip(*found, strict=True)]
    assert sums.tokens == len(x)
    same(sums.ghosted(), np.eye(WIDTH) + ridge_by_rows(x, y - x, GHOSTED_RIDGE))
    left_out = ridge_by_rows(inner[0], inner[1] - inner[0], GHOSTED_RIDGE)
    same(sums.ghosted(first=False), np.eye(WIDTH) + left_out)
    same(sums.replaceme(), np.linalg.lstsq(m, y - x + m, rcond=None)[0])
    turn = hadamard(WIDTH).numpy()
    assert set(np.unique(np.abs(turn * WIDTH**0.5)).round(12)) == {1.0}
    ratios = [np.abs(b @ turn).mean(0) / np.abs(a @ turn).mean(0) for a, b, _ in found]
    same(sums.linear_patch(), turn @ np.diag(np.mean(ratios, axis=0)) @ turn.T)
    norms = [np.linalg.norm(states, axis=1).sum() for states in (x, y)]
    same(sums.prune_comp(), norms[1] / norms[0])
    check_chosen(sums, inner)


def check_chosen(sums, inner):
    """The ridge that is chosen errs least on the rows that it is chosen on."""
    other, texts, batches = tiny(seed=1)
    held = collect(Layerwise(other), batches, START, STOP)
    a, b, _ = (
        np.concatenate([p[1:] for p in parts]) for parts in zip(*by_text(other, texts), strict=True)
    )
    scale = np.square(inner[0]).sum(0).mean()
    maps = [ridge_by_rows(inner[0], inner[1] - inner[0], share * scale) for share in SHARES]
    errors = [np.square(b - a - a @ one).sum() for one in maps]
    expected = np.eye(WIDTH) + maps[int(np.argmin(errors))]
    same(sums.ghosted(first=False, held=held), expected)


def same(found, expected):
    assert np.abs(np.asarray(found) - expected).max() < 1e-8 * np.abs(expected).max()
