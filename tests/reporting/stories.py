"""Runs as they might be found, some of their words hostile; nothing is real."""

import json
from dataclasses import replace

import numpy as np

from shallower import Block, Loss, ModelIdentity, Plan, Scan, analyse_states
from shallower.reporting.results import Run
from shallower.reporting.story import PromptSample
from shallower.results.recommendation import Recommended
from shallower.results.scores import Scores
from shallower.results.verification import Candidate, Verified
from shallower.settings.target import Target
from shallower.values.identity import TextsIdentity
from tests.results.speeches import made

HOSTILE = '<script>window.struck = true</script>"\'&<img src=x onerror="window.struck=1">'
"""What nobody should call a model."""

VERSIONS = {"shallower": "0.1.0", "torch": "2.15.0", "lm_eval": "0.4.9"}
TOKENS = np.random.default_rng(7).integers(60, 127, 40).astype(float)
_BASE = TOKENS * (3.2 + 0.5 * np.random.default_rng(8).standard_normal(40))


def loss(more=0.0, vocab_size=49152):
    """A loss that is so many nats more than that of the whole model, with noise by text."""
    noise = np.random.default_rng(round(1000 * abs(more))).standard_normal(40)
    scores = Scores(_BASE + TOKENS * more * (1 + 0.2 * noise), TOKENS)
    return Loss(scores.mean, scores.stderr, int(TOKENS.sum()), 40, 0, vocab_size, scores)


def scan(num_layers=30, name="SmolLM2-135M"):
    """A scan of random states that keeps its samples."""
    states = np.random.default_rng(0).standard_normal((24, num_layers + 1, 16)).cumsum(axis=1)
    found = analyse_states(states, keep_samples=True)
    model = ModelIdentity(name, "llama", num_layers, "float32", "0" * 64)
    return Scan(replace(found.contents, model=model, texts=(TextsIdentity(24, 128, "1" * 64),)))


def plan(num_layers, *blocks):
    return Plan(num_layers, tuple(Block(*block) for block in blocks), versions=VERSIONS)


def verified(num_layers):
    plans = [
        plan(num_layers, (12, 16)),
        plan(num_layers, (13, 17)),
        plan(num_layers, (4, 6), (9, 11)),
    ]
    others = [(0.0, 0.0), (0.013, 0.02), (0.4, 0.03)]
    candidates = tuple(
        Candidate(one, ("angular", HOSTILE), 3.4 + more, 0.03,
                  loss(0.2 + more).minus(loss(0.2)), error == 0.03)
        for one, (more, error) in zip(plans, others, strict=True)
    )  # fmt: skip
    return Verified(4, "patch", "loss", "nats a token", candidates, 16, 29, 2880, 12.5, {})


def made_run(folder, num_layers=30, *, name="SmolLM2-135M", prompt="A plan is", patched=0.2):
    """A run that has ended, in a folder."""
    best = Recommended(
        verified(num_layers), "4 layers less, as requested", loss(), loss(0.5),
        loss(patched), None, loss(0.7).minus(loss(0.5)), 4 / num_layers, 3.2 / num_layers,
        out_of_domain={"whole": loss(), "cut": loss(0.6), "patched": loss(0.35)},
    )  # fmt: skip
    told = PromptSample(
        prompt, {"whole": f"{prompt} good.\n\nAnd more.", "cut": "a a a", "patched": "fine"}
    )
    speech = {name: made(9, seed) for seed, name in enumerate(("whole", "cut", "patched"))}
    scanned = scan(num_layers, name)
    splits = {"fit": 24, "choose": 16, "report": 40}
    done = Run(
        folder, Target(n=4), scanned, loss(), splits, best, (told,), speech, 0.0,
        command="shallower run SmolLM2-135M --texts c4.jsonl --n 4 --out runs/smol",
        marks={"job": None, "ended": "yes"},
    )  # fmt: skip
    scanned.save(folder / "scan.safetensors")
    done.save()
    return done


def write(folder, name, value, **more):
    """A value as its JSON file in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({**value.to_json(), **more}, allow_nan=False))
    return folder
