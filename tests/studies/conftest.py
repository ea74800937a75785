"""A model that has learned something."""

import copy

import pytest
import torch

from shallower.judgement.trials import Trials
from shallower.studies import dry_run, speaking
from tests.conftest import tiny_llama
from tests.healing.cuts import documents

FEW_WORDS = 8
"""Tokens of an answer at most, in place of 64."""


@pytest.fixture(autouse=True, scope="package")
def short_answers():
    """The models of a study speak in few tokens: each takes a forward."""
    with pytest.MonkeyPatch.context() as patched:
        answer_shortly(patched)
        yield


def answer_shortly(patched):
    """Let the models of studies answer prompts with few tokens."""
    for module in (dry_run, speaking):
        patched.setattr(module, "SPEECH_TOKENS", FEW_WORDS)


@pytest.fixture(scope="session")
def trained(words):
    """A tiny model of four layers, trained a little, so that a patch has something to gain."""
    model = tiny_llama(4, seed=3)
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
    return copy.deepcopy(trained)


class Killed(BaseException):
    """Ends a study as a kill would, where nothing catches it."""


@pytest.fixture
def tried(monkeypatch):
    """The judge and the cut of every trial from now on, each as often as it is made."""
    made, note = [], Trials._note

    def noted(self, key, *found):
        made.append((self.judge.name, *key))
        note(self, key, *found)

    monkeypatch.setattr(Trials, "_note", noted)
    return made
