"""Criteria compared: every figure against a plain measurement, and what is not done twice."""

import csv
import json
import math
from contextlib import ExitStack
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import shallower as sh
from shallower.errors import CriterionError, LayersError, ModelError, OutputError, TextsError
from shallower.models.layerwise import Layerwise
from shallower.patching.quick import QuickPatch
from shallower.results.comparison import CriteriaComparison, scan_place
from shallower.scanning.scan import Scan
from shallower.texts.batches import TokenBatches
from shallower.texts.splits import three_splits
from shallower.values.tokens import Tokens
from tests.conftest import mostly_slow, tiny_llama
from tests.documents import assert_same, documents, state_of

TEXTS = documents(24)
HELD_OUT = documents(8, seed=1)
FEW = ["angular", "greedy", "deepest"]


class Odd(sh.Criterion):
    """Odd layers first."""

    name = "odd"
    summary = "Odd layers first."
    cost = "Nothing."

    def costs(self, subject):
        values = [(layer + 1) % 2 for layer in range(subject.num_layers)]
        return sh.Costs.of_layers(values, metric=self.name)


def of_state(done, state="cut"):
    """The rows of a state."""
    return [row for row in done.rows if row.state == state]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(5)


@pytest.fixture(scope="module")
def compared(model, words):
    before = state_of(model)
    done = sh.compare(
        model, words, TEXTS, HELD_OUT, n=[1, 3], criteria=[*sh.criteria, Odd()], truth=True,
        cache=False,
    )  # fmt: skip
    assert_same(before, state_of(model))
    return done


# What is reported.
def test_every_criterion_has_a_row_for_every_size(compared):
    assert [(row.state, row.criterion, row.n) for row in compared.rows] == [
        (state, name, n)
        for state in ("cut", "patched")
        for name in [*sh.criteria, "odd"]
        for n in (1, 3)
    ]
    assert compared.skipped == compared.failures == {}
    assert compared.ended


def test_shares_are_of_layers_and_of_parameters(compared, model):
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    total = sum(weight.numel() for weight in model.parameters())
    for row in compared.rows:
        assert row.layers_share == row.n / 5
        assert row.parameters_share == pytest.approx(row.n * layer / total)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("/models/smol/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1.gguf"),
        ("models/a/b/", "b"),
        ("./smol", "smol"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("smol", "smol"),
    ],
)
def test_a_place_is_shown_by_its_last_part(compared, name, title):
    assert replace(compared.models[0], name=name).title == title


def test_tau_compares_with_the_true_losses_of_single_layers(compared, model, words):
    def loss_without(layer):
        with sh.without_layers(model, [layer]):
            return sh.evaluate_loss(model, words, HELD_OUT).nats

    truth = np.array([loss_without(layer) for layer in range(5)])
    assert compared.models[0].single_layers == pytest.approx(truth, rel=1e-6)
    costs = np.array([(layer + 1) % 2 for layer in range(5)])
    signs = [
        np.sign((costs[i] - costs[j]) * (truth[i] - truth[j])) for i in range(5) for j in range(i)
    ]
    pairs, ties = len(signs), sum(costs[i] == costs[j] for i in range(5) for j in range(i))
    expected = sum(signs) / math.sqrt(pairs * (pairs - ties))
    (tau,) = {row.tau for row in compared.rows if row.criterion == "odd"}
    assert tau == pytest.approx(expected)
    assert {row.tau for row in compared.rows if row.criterion == "random"} == {None}


def by_text(model, words, dropped, patch=None):
    """Nats and predicted tokens of every text that reports, one text at a time."""
    with ExitStack() as entered:
        if dropped:
            if patch is not None:
                entered.enter_context(patch.patched(sh.Plan.of(5, dropped)))
            entered.enter_context(sh.without_layers(model, dropped))
        losses = [sh.evaluate_loss(model, words, [text]) for text in HELD_OUT]
    counts = np.array([loss.num_tokens for loss in losses], np.float64)
    return np.array([loss.nats for loss in losses], np.float64) * counts, counts


def paired(first, second, counts):
    """Mean difference and its error, written out as the docstring of evaluate_loss has them."""
    mean = sum(first - second) / sum(counts)
    squares = sum((a - b - mean * n) ** 2 for a, b, n in zip(first, second, counts, strict=True))
    return mean, math.sqrt(squares * len(counts) / (len(counts) - 1)) / sum(counts)


@pytest.mark.parametrize(
    ("state", "n"), mostly_slow(product(["cut", "patched"], [1, 3]), [("cut", 3), ("patched", 3)])
)
def test_regret_is_paired_by_text_in_both_states(compared, model, words, state, n):
    """The slow twin: every cut anew, text by text, in float64."""
    fit = three_splits(TEXTS, HELD_OUT).fit
    quick = QuickPatch(Layerwise(model), list(TokenBatches(words, fit, Tokens(256, 8))))
    patch = quick if state == "patched" else None
    whole, counts = by_text(model, words, ())
    rows = [row for row in of_state(compared, state) if row.n == n and row.standing]
    cuts = {row.dropped for row in rows}
    sums = {dropped: by_text(model, words, dropped, patch)[0] for dropped in cuts}
    best = min(sums, key=lambda dropped: sum(sums[dropped]))
    of_model = compared.models[0].whole
    standings = [(of_model.nats, of_model.stderr, whole)]
    standings += [
        (row.standing.loss.mean, row.standing.loss.stderr, sums[row.dropped]) for row in rows
    ]
    for mean, error, by in standings:
        loss, stderr = paired(by, np.zeros(len(by)), counts)
        assert mean == pytest.approx(loss, rel=1e-6)
        assert error == pytest.approx(stderr, rel=1e-3)
    for row in rows:
        assert len(row.dropped) == row.n
        standing = row.standing
        regret, stderr = paired(sums[row.dropped], sums[best], counts)
        assert standing.regret.mean == pytest.approx(regret, abs=1e-6)
        assert standing.regret.stderr == pytest.approx(stderr, rel=1e-3, abs=1e-7)
        assert standing.tied == (abs(regret) <= 2 * stderr)
        lost, stderr = paired(sums[row.dropped], whole, counts)
        assert standing.difference.mean == pytest.approx(lost, abs=1e-6)
        assert standing.difference.stderr == pytest.approx(stderr, rel=1e-3)
    leaders = [row.dropped for row in rows if row.standing.regret.mean == 0]
    assert leaders.count(best) == sum(row.dropped == best for row in rows)


def test_a_patched_regret_is_over_the_best_of_all_calibration_texts(model, words):
    texts = {"one": TEXTS, "two": documents(24, seed=5)}
    asked = {"n": [2], "criteria": ["deepest"], "cache": False}
    rows = of_state(sh.compare(model, words, texts, HELD_OUT, **asked), "patched")
    losses = [row.standing.loss.mean for row in rows]
    assert len({*losses}) == 2  # the same layers, patched by other texts
    for row, loss in zip(rows, losses, strict=True):
        assert row.standing.regret.mean == pytest.approx(loss - min(losses), abs=1e-9)
        assert (row.standing.regret.stderr == 0) == (loss == min(losses))


def test_work_is_counted_for_each_criterion_by_itself(compared, model, words):
    alone = sh.compare(model, words, TEXTS, HELD_OUT, n=[3], criteria=["greedy"], cache=False)
    (row,) = [row for row in of_state(compared) if (row.criterion, row.n) == ("greedy", 3)]
    assert alone.rows[0].layer_forwards == row.layer_forwards > 0
    free = {"deepest", "random", "odd"}
    assert {row.criterion for row in compared.rows if not row.layer_forwards} == free


def test_other_judges_choose_and_report(model, words, tmp_path):
    items = [
        {"context": text, "options": [f" w{i}", f" w{i + 1}"], "answer": i % 2}
        for i, text in enumerate(TEXTS)
    ]
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    asked = {"n": [2], "criteria": ["one_shot"], "cache": False}
    (row,) = of_state(sh.compare(model, words, TEXTS, HELD_OUT, judge="kl", **asked))
    assert row.score.mean > 0
    assert row.accuracy is None
    done = sh.compare(model, words, TEXTS, HELD_OUT, judge="options", options=file, **asked)
    assert done.models[0].chance == 0.5
    assert done.unit == "nats"
    assert 0 <= done.rows[0].accuracy <= 1


# What is written.
def test_a_comparison_is_written_as_json_and_csv(model, words, tmp_path):
    out = tmp_path / "out"
    done = sh.compare(model, words, TEXTS, HELD_OUT, n=[1, 2], criteria=FEW, out=out)
    assert {path.name for path in out.iterdir()} == {"comparison.json", "comparison.csv"}
    data = json.loads((out / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert CriteriaComparison.from_json(data) == done
    assert data["command"].startswith("shallower compare MODEL --texts TEXTS --eval-texts ")
    assert data["whole"]["loss"] == done.models[0].whole.nats
    with (out / "comparison.csv").open() as file:
        whole, *rows = csv.DictReader(file)
    assert (whole["criterion"], whole["n"], whole["dropped"]) == ("whole", "0", "")
    for row, written in zip(done.rows, rows, strict=True):
        named = {name: written[name] for name in ("criterion", "state", "dropped", "loss")}
        assert named == {
            "criterion": row.criterion, "state": row.state,
            "dropped": " ".join(map(str, row.dropped)),
            "loss": "" if row.standing is None else str(row.standing.loss.mean),
        }  # fmt: skip
    with pytest.raises(OutputError, match="overwrite"):
        sh.compare(model, words, TEXTS, HELD_OUT, n=[1], criteria=FEW, out=out)


def test_without_a_judge_layers_are_compared_in_one_pass(model, words, tmp_path):
    out, calls = tmp_path / "out", []
    hook = model.model.layers[0].register_forward_hook(lambda *a: calls.append(len(a[1][0])))
    asked = {"n": [1, 2], "judge": "none", "out": out}
    done = sh.compare(model, words, {"one": TEXTS, "two": documents(24, seed=5)}, **asked)
    hook.remove()
    assert (done.rows, done.models[0].whole) == ((), None)
    for name, starts in done.models[0].starts.items():
        scanned = Scan.load(out / scan_place(done.models[0].name, name))
        assert scanned.num_samples == done.splits["fit"]
        for start in starts:
            assert start.start == scanned.best_block(start.n).start
            resampled = scanned.bootstrap(1000)[start.n]
            assert start.probability == resampled.probability
            places = np.arange(len(resampled.distribution))
            drawn = np.random.default_rng(0).choice(places, 200_000, p=resampled.distribution)
            assert start.spread == pytest.approx(drawn.std(), abs=0.02)
    probes = 3  # texts by which the parts of the model are found
    assert sum(calls) == 2 * done.splits["fit"] + probes
    again = sh.compare(
        model, words, {"one": TEXTS, "two": documents(24, seed=5)}, **{**asked, "overwrite": True}
    )
    assert again.models == done.models


# Criteria that fail.
class Raises(Odd):
    name = "raises"

    def costs(self, subject):
        raise ValueError("no such thing")


class TooMany(Odd):
    name = "too_many"

    def plans(self, subject):
        return {n: sh.Plan.of(subject.num_layers, range(n + 1)) for n in subject.sizes}


class OfAnother(Odd):
    name = "of_another"

    def costs(self, subject):
        return sh.Costs.of_layers(range(9), metric=self.name)


class NoCosts(Odd):
    name = "no_costs"

    def costs(self, subject):
        return [1.0] * subject.num_layers


def test_a_criterion_that_fails_is_named_and_the_others_go_on(model, words):
    broken = [Raises(), TooMany(), OfAnother(), NoCosts()]
    done = sh.compare(model, words, TEXTS, HELD_OUT, n=[1], criteria=[*broken, Odd()], cache=False)
    assert {row.criterion for row in done.rows} == {"odd"}
    said = {name.split(",")[0]: why for name, why in done.skipped.items()}
    assert said.keys() == {criterion.name for criterion in broken}
    assert said["raises"] == "ValueError: no such thing"
    assert "drops 2 layers: expected 1" in said["too_many"]
    assert all("5 layers" in said[name] for name in ("of_another", "no_costs"))


# Several models.
def test_the_failure_of_one_of_several_models_is_recorded(words, tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    places = [tmp_path / "one", tmp_path / "gone", tmp_path / "two"]
    done = sh.compare(
        [sh.ModelSource(str(place), "float32") for place in places], None, TEXTS, HELD_OUT,
        n=[1], criteria=["deepest"], out=tmp_path / "out",
    )  # fmt: skip
    assert [model.name for model in done.models] == [str(places[0]), str(places[2])]
    assert list(done.failures) == [str(places[1])]
    assert "gone" in done.failures[str(places[1])]
    assert [row.model for row in of_state(done)] == [str(places[0]), str(places[2])]


# Bad input.
@pytest.mark.parametrize(
    ("asked", "error", "named"),
    [
        ({"criteria": ["angular", "angular"]}, CriterionError, "twice: angular"),
        ({"criteria": ["angles"]}, CriterionError, "angles"),
        ({"n": [0]}, LayersError, "expected sizes"),
        ({"judge": "taste"}, CriterionError, "taste"),
        ({"judge": "options"}, CriterionError, "--options"),
        ({"options": "x.jsonl"}, CriterionError, "--judge options"),
        ({"criteria": "angular"}, CriterionError, "sequence of names"),
        ({"criteria": [Odd]}, CriterionError, "is no criterion"),
        ({"n": 2}, LayersError, "as 1,2,4"),
        ({"max_eval_texts": 0}, TextsError, "at least 1"),
        ({"eval_texts": None}, TextsError, "--eval-texts is missing"),
        ({"states": ["mended"]}, sh.PatchError, "'mended': expected some of cut, patched, healed"),
        ({"states": ["healed"], "heal_steps": 1}, sh.RecipeError, "needs a folder"),
        ({"patch": "slow"}, sh.PatchError, "expected quick or full"),
        ({"patch_tokens": 0}, LayersError, "patch_tokens = 0: expected a whole number"),
        ({"heal_steps": 3}, sh.RecipeError, "--heal-steps without --states healed"),
    ],
)
def test_what_cannot_be_compared_is_refused(model, words, asked, error, named):
    given = {"eval_texts": HELD_OUT, "n": [1], "criteria": FEW, **asked}
    with pytest.raises(error, match=named):
        sh.compare(model, words, TEXTS, **given)


def test_texts_of_a_single_token_do_not_count(model, words):
    with pytest.raises(TextsError, match=r"too few calibration texts: 7 of at least two tokens"):
        sh.compare(model, words, [*TEXTS[:11], *[f"w{i}" for i in range(20)]], HELD_OUT, n=[1])
    with pytest.raises(TextsError, match=r"too few test texts: 1 of at least two tokens"):
        sh.compare(model, words, TEXTS, [HELD_OUT[0], "w1", "w2"], n=[1])
    done = sh.compare(model, words, TEXTS, HELD_OUT * 3, n=[1], criteria=["deepest"])
    assert done.splits["report"] == len(HELD_OUT)


@pytest.mark.parametrize("place", ["gone", ["gone"]])
def test_a_place_is_a_model_that_is_loaded(place, words):
    with pytest.raises(ModelError, match="gone"):
        sh.compare(place, None, TEXTS, HELD_OUT)
    with pytest.raises(ModelError, match="not in memory"):
        sh.compare([tiny_llama()], words, TEXTS, HELD_OUT)
    with pytest.raises(TextsError, match="by name"):
        sh.compare(place, None, {"": TEXTS}, HELD_OUT)


def test_numbers_of_numpy_are_sizes(model, words):
    sizes = np.array([2, 1])
    done = sh.compare(model, words, TEXTS, HELD_OUT, n=sizes, criteria=["deepest"])
    assert [row.n for row in of_state(done)] == [1, 2]
