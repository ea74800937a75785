"""Cut and healed models."""

import shutil

import pytest

import shallower as sh
from shallower.studies import demo
from tests.conftest import tiny_llama
from tests.healing.cuts import HELD_OUT, QUICK, TEXTS, save_cut


@pytest.fixture(scope="session")
def both(tmp_path_factory, words):
    """The folders of a tiny model and of the same without layers 2 and 3."""
    return save_cut(tmp_path_factory.mktemp("tiny"), tiny_llama(6), words)


@pytest.fixture(scope="session")
def cut(both):
    return both[1]


@pytest.fixture(scope="session")
def healed(cut, tmp_path_factory):
    """Adapters of a quick healing, and its record."""
    out = tmp_path_factory.mktemp("healed") / "adapters"
    return out, sh.heal(cut, TEXTS, out, recipe=QUICK, eval_texts=HELD_OUT)


@pytest.fixture(scope="session")
def patchable(words, tmp_path_factory):
    """A tiny model that was trained a little, so that a patch has something to gain."""
    import torch

    from shallower.healing.losses import summed_loss
    from shallower.texts.sequences import collate, read_samples

    model = tiny_llama(6, seed=3)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    samples = read_samples(words, TEXTS, max_length=16, packing=True, num_samples=10**6)
    for step in range(60):
        rows = [samples.rows[i % len(samples)] for i in range(8 * step, 8 * step + 8)]
        batch = {name: torch.from_numpy(values) for name, values in collate(rows)}
        loss = summed_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"]) / 120
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return save_cut(tmp_path_factory.mktemp("patchable"), model, words)


@pytest.fixture(scope="session")
def smol_cut(passages, tmp_path_factory):
    """Six layers of SmolLM2-135M in bfloat16, on disk, and texts."""
    model, tokenizer = sh.load_model(demo.model_path(), dtype="bfloat16")
    path = tmp_path_factory.mktemp("smol") / "cut"
    plan = sh.drop_layers(model, [range(3, 27)])
    sh.save_model(model, tokenizer, path, plan=plan)
    yield path, passages[0]
    shutil.rmtree(path)


@pytest.fixture
def no_rehearsal(monkeypatch):
    """Dry runs that plan no memory, which takes a second for every recipe."""
    from shallower.healing import memory

    monkeypatch.setattr(memory, "first_that_runs", lambda _rehearsed: None)
    monkeypatch.setattr(memory, "_LAST", {})
