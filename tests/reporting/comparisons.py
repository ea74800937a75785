"""Comparisons as they might be found: many criteria and sizes, some models; nothing is real."""

import numpy as np

from shallower.values.comparison import ComparedModel, CriteriaComparison, Row
from shallower.values.loss import Loss
from shallower.values.scores import Estimate, Standing

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


def compared(name="SmolLM2-135M", num_layers=30, nats=3.592, vocab_size=49152):
    generator = np.random.default_rng(len(name))
    singles = tuple(nats + 0.02 + 2 * generator.random(num_layers) ** 3)
    return ComparedModel(name, num_layers, Loss(nats, 0.021, 16_384, 64, 0, vocab_size), singles)


def rows_of(model, texts="c4", criteria=COSTS, sizes=SIZES):
    """A row for each criterion and size; some choose alike, some lose more than a guess."""
    generator = np.random.default_rng(num_of(model.name + texts))
    found = []
    for n in sizes:
        share = n / model.num_layers
        best = model.whole.nats + 0.4 * n * (1 + 6 * share**2) * 0.35
        chosen = {}
        for criterion in criteria:
            forwards, skill = COSTS.get(criterion, (100, 1.0))
            if criterion == "cosine":
                continue
            loss = best + skill * n**0.9 * generator.uniform(0.3, 1.0)
            start = int(generator.integers(0 if criterion == "random" else 3, model.num_layers - n))
            dropped = tuple(range(start, start + n))
            if criterion in ("greedy", "evolution", "weights", "taylor", "magnitude"):
                drawn = generator.choice(np.arange(1, model.num_layers), n, replace=False)
                dropped = tuple(sorted(int(layer) for layer in drawn))
            chosen[criterion] = dropped, loss, forwards, generator.random()
        if "cosine" in criteria and "angular" in chosen:
            chosen["cosine"] = chosen["angular"]
        least = min(loss for _, loss, _, _ in chosen.values())
        patches = {
            criterion: model.whole.nats
            + (0.55 * (min(loss, 9) - model.whole.nats) * (0.8 + 0.3 * luck))
            for criterion, (dropped, loss, _, luck) in chosen.items()
            if dropped[0]
        }
        for criterion in criteria:
            if criterion not in chosen:
                continue
            dropped, loss, forwards, luck = chosen[criterion]
            regret = loss - least
            stderr = 0.0 if regret == 0 else 0.01 + 0.05 * regret
            lost = loss - model.whole.nats
            bare = Estimate(loss, 0.03 + 0.01 * loss)
            cut = Standing(bare, Estimate(lost, 0.02 + 0.02 * lost), Estimate(regret, stderr))
            patched = patches.get(criterion)
            if patched is not None:
                more, behind = patched - model.whole.nats, patched - min(patches.values())
                patched = Standing(
                    Estimate(patched, 0.03), Estimate(more, 0.01 + 0.02 * more),
                    Estimate(behind, behind and 0.01 + 0.05 * behind),
                )  # fmt: skip
            searches = criterion in ("greedy", "evolution", "exhaustive")
            found.append(
                Row(
                    model=model.name, texts=texts, criterion=criterion, n=n, dropped=dropped,
                    cut=cut, patched=patched,
                    tau=None if searches or criterion == "random" else tau_of(criterion),
                    layers_share=share, parameters_share=0.79 * share,
                    seconds=0.2 + forwards / 900 * (0.8 + 0.4 * luck),
                    layer_forwards=forwards * (n if criterion == "greedy" else 1),
                    score=bare,
                )
            )  # fmt: skip
    return found


def tau_of(criterion):
    return 0.9 - COSTS.get(criterion, (0, 1.0))[1] * (num_of(criterion) % 7) / 6


def num_of(name):
    return sum(map(ord, name))


def comparison(models=None, **more):
    """Eighteen criteria by five sizes on two models, unless told otherwise."""
    if models is None:
        models = (compared(), compared("Qwen2.5-0.5B", 24, 3.104, 151_936))
    rows = tuple(row for model in models for row in rows_of(model))
    splits = {"fit": 40, "choose": 24, "report": 64}
    return CriteriaComparison(tuple(models), rows, **{"splits": splits, **more})
