"""A model that has learned something."""

import pytest
import torch

from tests.conftest import tiny_llama
from tests.healing.cuts import documents


@pytest.fixture(scope="session")
def trained(words):
    """A tiny model that was trained a little, so that a patch has something to gain."""
    model = tiny_llama(6, seed=3)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = [text for text in documents(400, 0) if text.count(" ") >= 15]
    rows = torch.tensor([words(text)["input_ids"][:16] for text in texts])
    for step in range(60):
        batch = rows[torch.arange(8 * step, 8 * step + 8) % len(rows)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


@pytest.fixture
def learned(trained):
    """A copy of it."""
    copied = tiny_llama(6)
    copied.load_state_dict(trained.state_dict())
    return copied
