"""Comparisons as they might be found: many criteria and sizes, some models; nothing is real."""

from dataclasses import replace

import numpy as np

from shallower.results.comparison import ComparedModel, CriteriaComparison, Row, Start
from shallower.results.loss import Loss
from shallower.results.scores import Estimate, Scores, Standing
from shallower.results.task_scores import TaskScores
from tests.reporting.stories import HOSTILE, VERSIONS, loss
from tests.results.speeches import made

# What a choice costs: layers run, times texts; how far the choices are from the best; a few facts.
COSTS = {
    "angular": (1_260, 0.35), "cosine": (1_260, 0.35), "relative_l2": (1_260, 0.42),
    "cka": (1_260, 0.6), "linear_map": (1_260, 0.2), "reachable": (1_380, 0.15),
    "block_influence": (1_260, 0.3), "magnitude": (1_260, 0.9), "xmerge": (1_260, 0.5),
    "one_shot": (41_760, 0.12), "mask_regression": (96_000, 0.25), "taylor": (3_780, 0.4),
    "weights": (0, 1.5), "greedy": (166_500, 0.02), "exhaustive": (301_000, 0.05),
    "evolution": (540_000, 0.0), "deepest": (0, 0.8), "random": (0, 1.9),
}  # fmt: skip
SIZES = (1, 2, 4, 8, 12)
QUICK = {"patch": "quick", "n": SIZES}
UNPATCHED = "there is no layer before the block"


def compared(name="SmolLM2-135M", num_layers=30, nats=3.592, vocab_size=49152):
    generator = np.random.default_rng(len(name))
    singles = tuple(nats + 0.02 + 2 * generator.random(num_layers) ** 3)
    return ComparedModel(name, num_layers, Loss(nats, 0.021, 16_384, 64, 0, vocab_size), singles)


def standing(loss, difference, regret):
    """How a cut stands; differences are pairs of mean and standard error."""
    return Standing(Estimate(loss, 0.05), Estimate(*difference), Estimate(*regret))


def rows_of(model, texts="c4", criteria=COSTS, sizes=SIZES):
    """A row for each criterion, size and state; some choose alike, some lose more than a guess.

    A cut without the first layer cannot be patched.
    """
    generator = np.random.default_rng(num_of(model.name + texts))
    found = [row for n in sizes for row in _of_size(model, texts, criteria, n, generator)]
    return sorted(found, key=lambda row: row.state)


def _of_size(model, texts, criteria, n, generator):
    chosen = {
        criterion: _choice(model, criterion, n, generator)
        for criterion in criteria if criterion != "cosine"
    }  # fmt: skip
    if "cosine" in criteria:
        chosen["cosine"] = chosen.get("angular") or _choice(model, "cosine", n, generator)
    whole = model.whole.nats
    patched = {
        criterion: whole + 0.55 * (min(loss, 9) - whole) * (0.8 + 0.3 * luck)
        for criterion, (dropped, loss, luck) in chosen.items() if dropped[0]
    }  # fmt: skip
    losses = {"cut": {name: loss for name, (_, loss, _) in chosen.items()}, "patched": patched}
    for state, of in losses.items():
        for criterion in criteria:
            dropped, loss, luck = chosen[criterion]
            forwards = COSTS.get(criterion, (100, 1.0))[0]
            stands = _stands(of[criterion], whole, of.values()) if criterion in of else None
            searches = criterion in ("greedy", "evolution", "exhaustive", "random")
            yield Row(
                model=model.name, texts=texts, criterion=criterion, n=n, state=state,
                dropped=dropped, standing=stands, tau=None if searches else tau_of(criterion),
                layers_share=n / model.num_layers, parameters_share=0.79 * n / model.num_layers,
                layer_forwards=forwards * (n if criterion == "greedy" else 1),
                choice_seconds=0.2 + forwards / 900 * (0.8 + 0.4 * luck), seconds=1.0 + n,
                score=Estimate(loss, 0.03 + 0.01 * loss) if state == "cut" else None,
                failed=None if stands else UNPATCHED,
            )  # fmt: skip


def _choice(model, criterion, n, generator):
    """Which layers go, the loss of the bare cut, and how lucky its patch is."""
    best = model.whole.nats + 0.14 * n * (1 + 6 * (n / model.num_layers) ** 2)
    loss = best + COSTS.get(criterion, (100, 1.0))[1] * n**0.9 * generator.uniform(0.3, 1.0)
    start = int(generator.integers(3, model.num_layers - n))
    start = 0 if (criterion, n) == ("random", 4) else start
    dropped = tuple(range(start, start + n))
    if criterion in ("greedy", "evolution", "weights", "taylor", "magnitude"):
        drawn = generator.choice(np.arange(1, model.num_layers), n, replace=False)
        dropped = tuple(sorted(int(layer) for layer in drawn))
    return dropped, loss, generator.random()


def _stands(loss, whole, all_losses):
    lost, behind = loss - whole, loss - min(all_losses)
    return Standing(
        Estimate(loss, 0.03 + 0.01 * loss), Estimate(lost, 0.01 + 0.02 * lost),
        Estimate(behind, behind and 0.01 + 0.05 * behind),
    )  # fmt: skip


def tau_of(criterion):
    return 0.9 - COSTS.get(criterion, (0, 1.0))[1] * (num_of(criterion) % 7) / 6


def num_of(name):
    return sum(map(ord, name))


def comparison(models=None, **more):
    """Eighteen criteria by five sizes and two states on two models, unless told otherwise."""
    if models is None:
        models = (compared(), compared("Qwen2.5-0.5B", 24, 3.104, 151_936))
    rows = tuple(row for model in models for row in rows_of(model))
    splits = {"fit": 40, "choose": 24, "report": 64}
    more = {"splits": splits, "settings": QUICK, **more}
    return CriteriaComparison(tuple(models), rows, **more)


# A curve: few criteria in all states, with tasks and speech
def scores(task, chance, mean):
    values = (np.random.default_rng(3).random(200) < mean).astype(float)
    items = tuple(map(str, range(200)))
    return TaskScores(task, "acc", items, Scores(values, np.ones(200)), 5, chance)


def curve(model="Llama-3-8B", *, sizes=(4, 8, 12, 16), states=("cut", "patched", "healed")):
    """Two criteria by three states and four sizes, two tasks, speech, and a patch that failed."""
    tasks = scores("mmlu", 0.25, 0.65), scores("boolq", 0.5, 0.5)
    whole = ComparedModel(
        model, 32, loss(0.0, 128_256), dtype="bfloat16", parameters=8_030_261_248, tasks=tasks,
        speech=made(9, 0),
    )  # fmt: skip
    rows = [
        _curve_row(model, criterion, state, n)
        for state in states for criterion in ("angular", "deepest") for n in sizes
    ]  # fmt: skip
    if "patched" in states:
        failed = replace(rows[-1], state="patched", n=20, dropped=tuple(range(11, 31)),
                         standing=None, tasks=(), speech=None,
                         failed=f"no layer could be fitted {HOSTILE}")  # fmt: skip
        rows.append(failed)
    splits = {"fit": 64, "choose": 16, "report": 40}
    settings = {"patch": "full", "patch_tokens": 16_384, "n": sizes}
    return CriteriaComparison(
        (whole,), tuple(rows), splits=splits, max_length=128, versions=VERSIONS, settings=settings
    )


def _curve_row(model, criterion, state, n):
    share = {"cut": 1.0, "patched": 0.45, "healed": 0.2}[state]
    more = share * (0.02 * n + max(0, n - 9) * (0.9 if state == "cut" else 0.3))
    last = 31 if criterion == "deepest" else 28
    best, behind = loss(more, 128_256), loss(1.5 * more, 128_256)
    mine = behind if criterion == "deepest" else best
    stands = Standing.of(mine.by_text, loss(0.0, 128_256).by_text)
    return Row(
        model=model, texts="c4", criterion=criterion, n=n, state=state,
        dropped=tuple(range(last - n, last)),
        standing=replace(stands, regret=Estimate.of(mine.minus(best))), tau=None,
        layers_share=n / 32, parameters_share=0.9 * n / 32, time_share=0.85 * n / 32,
        seconds=3.0 * n, speech=made(9, n),
        tasks=(scores("mmlu", 0.25, 0.62 if n < 11 else 0.25 + 0.02 * len(state)),
               scores("boolq", 0.5, 0.5)),
    )  # fmt: skip


def starts(num_layers):
    """Where the most alike blocks of a scan start, with their spread."""
    return tuple(Start(n, num_layers // 2, 0.8, 0.4) for n in SIZES)
