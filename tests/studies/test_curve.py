"""A curve: every point against a plain measurement, killed and gone on with, refused."""

import copy
import csv
import json
from dataclasses import replace

import pytest

import shallower as sh
from shallower.judgement.token_states import evenly
from shallower.judgement.verifying import PATCH_TEXTS
from shallower.models.layerwise import Layerwise
from shallower.patching.quick import QuickPatch
from shallower.reporting.stories.curve import curve_story
from shallower.studies.curve_points import CurvePoints
from shallower.studies.measuring import Measuring
from shallower.studies.verified_plans import VERIFYING_TEXTS
from shallower.texts.batches import TokenBatches
from shallower.texts.splits import three_splits
from shallower.values.curve import Curve
from shallower.values.tokens import Tokens
from tests.documents import Unread, assert_same, state_of
from tests.healing.cuts import MANY, QUICK
from tests.healing.cuts import documents as progressions

TEXTS, REPORT = progressions(120, 5), progressions(12, 1)
TOO_LONG = replace(QUICK, max_length=128)
FIT = three_splits(TEXTS, REPORT, num_choosing=sh.CurveSettings().num_choosing).fit
TAKEN = {
    "eval_texts": REPORT, "max_length": 16, "top": 2, "n": [2, 3, 0], "patch_tokens": 512,
    "strategies": ["recommended", "similarity", "deepest"],
}  # fmt: skip


class Odd(sh.Criterion):
    """Odd layers first."""

    name, summary, cost = "odd", "Odd layers first.", "Nothing."

    def costs(self, subject):
        values = [(layer + 1) % 2 for layer in range(subject.num_layers)]
        return sh.Costs.of_layers(values, metric=self.name)


def measured(curve):
    """The points without what a clock says, and the rest."""
    points = tuple(replace(point, seconds=0.0) for point in curve.points)
    return points, [one.loss and one.loss.by_text.sums.tolist() for one in points]


@pytest.fixture(scope="module")
def done(trained, words, tmp_path_factory):
    """The curve of a model that was trained a little, with the folder that it is in."""
    model = copy.deepcopy(trained)
    out = tmp_path_factory.mktemp("curve") / "out"
    before = state_of(model)
    curve = sh.curve(model, words, TEXTS, **TAKEN, out=out, cache=False)
    assert_same(before, state_of(model))
    return curve, out


def told(curve):
    """The lines of all sections of its page."""
    return [line for part in curve_story(curve, drawn=False).sections for line in part.lines]


# The points.
def test_there_is_a_point_for_every_size_strategy_and_state(done):
    curve, _ = done
    assert [(one.n, one.strategy, one.state) for one in curve.points] == [
        (0, "whole", "cut"),
        *(
            (n, strategy, state)
            for n in (2, 3)
            for strategy in TAKEN["strategies"]
            for state in ("cut", "patched")
        ),
    ]
    assert (curve.num_layers, curve.max_length, curve.dtype) == (4, 16, "float32")
    assert curve.splits == {"fit": 80, "choose": 39, "report": 12}
    assert (curve.settings["patch"], curve.settings["patch_tokens"]) == ("full", 512)
    assert "What is patched has a full patch on at most 512 tokens." in told(curve)


def test_a_cut_has_the_loss_of_the_model_without_its_layers(done, learned, words):
    curve, _ = done
    whole = sh.evaluate_loss(learned, words, REPORT, max_length=16)
    assert curve.whole.loss.nats == pytest.approx(whole.nats, abs=1e-6)
    layer = sum(weight.numel() for weight in learned.model.layers[0].parameters())
    total = sum(weight.numel() for weight in learned.parameters())
    for point in curve.points:
        assert len(point.dropped) == point.n
        assert point.parameters_share == pytest.approx(point.n * layer / total)
        if point.n and point.state == "cut":
            with sh.without_layers(learned, point.dropped):
                loss = sh.evaluate_loss(learned, words, REPORT, max_length=16)
            assert point.loss.nats == pytest.approx(loss.nats, abs=1e-6)
            assert point.loss.stderr == pytest.approx(loss.stderr, abs=1e-6)
            assert curve.lost(point).mean == pytest.approx(loss.nats - whole.nats, abs=1e-6)


def test_a_patched_cut_has_the_loss_of_the_patched_model(done, learned, words):
    curve, _ = done
    point = curve.line("similarity", "patched")[1]
    sh.patch(learned, words, point.dropped, texts=FIT, max_length=16, num_tokens=512)
    loss = sh.evaluate_loss(learned, words, REPORT, max_length=16)
    assert point.loss.nats == pytest.approx(loss.nats, abs=1e-6)
    assert point.loss.nats < curve.line("similarity", "cut")[1].loss.nats


def test_what_cannot_be_patched_says_why_and_the_others_go_on(done):
    curve, _ = done
    point = curve.line("deepest", "patched")[-1]
    assert (point.dropped, point.loss) == ((0, 1, 2), None)
    assert point.failed.startswith("there is no layer before the block [0, 3)")
    assert [one.failed for one in curve.points].count(None) == 12


@pytest.mark.slow
def test_the_strategies_are_those_of_the_other_commands(done, learned, words, tmp_path):
    curve, _ = done
    scanned = sh.scan(learned, words, FIT, max_length=16)
    run = sh.run(
        learned, words, TEXTS, eval_texts=REPORT, max_length=16, top=2, n=2, prompts=(),
        out=tmp_path / "run",
    )  # fmt: skip
    for strategy, dropped in (
        ("recommended", run.recommended.plan.dropped),
        ("similarity", tuple(scanned.best_block(2).layers)),
        ("deepest", (1, 2)),
    ):
        assert curve.line(strategy, "cut")[1].dropped == dropped


def test_any_criterion_is_a_strategy_and_failures_of_one_are_told(
    learned, words, tmp_path, monkeypatch
):
    monkeypatch.setitem(sh.criteria, "odd", Odd())
    options = {**TAKEN, "n": [2], "states": ["cut"], "strategies": ["odd", "best_plan"]}
    curve = sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out")
    assert curve.line("odd", "cut")[1].dropped == (1, 3)
    scanned = sh.scan(learned, words, FIT, max_length=16)
    assert curve.line("best_plan", "cut")[1].dropped == scanned.best_plan(2, 3).dropped
    with pytest.raises(sh.OutputError, match=r"curve\.json exists already"):
        sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out")  # who knows its code
    monkeypatch.setattr(Odd, "costs", lambda *_: 1 / 0)
    curve = sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out", overwrite=True)
    point = curve.line("odd", "cut")[1]
    assert (point.dropped, point.loss) == ((), None)
    assert point.failed == "odd cannot choose 2 layers: ZeroDivisionError: division by zero"
    assert curve.line("best_plan", "cut")[1].loss is not None


def test_a_quick_patch_is_that_of_a_verification(learned, words, tmp_path):
    options = {**TAKEN, "n": [2], "states": ["patched"], "strategies": ["deepest"]}
    curve = sh.curve(learned, words, TEXTS, **options, quick_patch=True, out=tmp_path / "out")
    batches = list(TokenBatches(words, FIT[:VERIFYING_TEXTS], Tokens(16, 8), min_tokens=2))
    quick = QuickPatch(Layerwise(learned), evenly(batches, PATCH_TEXTS))
    with quick.patched(sh.Plan.of(4, [1, 2])), sh.without_layers(learned, [1, 2]):
        loss = sh.evaluate_loss(learned, words, REPORT, max_length=16)
    (point,) = curve.points[1:]
    assert point.loss.nats == pytest.approx(loss.nats, abs=1e-6)
    assert (curve.settings["patch"], curve.settings["patch_tokens"]) == ("quick", None)
    assert "What is patched has a quick patch (one matrix a block)." in told(curve)
    cuts = {**options, "states": ["cut"], "out": tmp_path / "cuts"}
    assert not any("patched" in line for line in told(sh.curve(learned, words, TEXTS, **cuts)))


def test_cuts_that_strategies_have_in_common_are_measured_once(
    learned, words, tmp_path, monkeypatch
):
    measure, seen = Measuring._measure, []

    def noted(points, plan, state):
        seen.append((plan and plan.dropped, state))
        return measure(points, plan, state)

    monkeypatch.setattr(Measuring, "_measure", noted)
    options = {**TAKEN, "n": [1], "strategies": ["similarity", "best_plan", "angular"]}
    curve = sh.curve(learned, words, TEXTS, **options, quick_patch=True, out=tmp_path / "out")
    assert len(seen) == len(set(seen)) == 3
    assert len({point.loss.nats for point in curve.points[1:]}) == 2


# What is written.
def test_the_file_holds_the_curve_and_the_table_its_points(done):
    curve, out = done
    assert {path.name for path in out.iterdir()} == {
        "curve.json", "curve.csv", "scan.safetensors",
    }  # fmt: skip
    stored = json.loads((out / "curve.json").read_text(), parse_constant=pytest.fail)
    assert Curve.from_json(stored) == curve
    assert stored.pop("job") is None
    assert stored.pop("command").startswith("shallower curve MODEL --texts TEXTS --eval-texts ")
    assert stored == json.loads(json.dumps(curve.to_json()))
    assert stored["points"][1]["lost"] == curve.lost(curve.points[1]).to_json()
    assert stored["points"][-1]["lost"] is None
    rows = list(csv.DictReader((out / "curve.csv").read_text().splitlines()))
    assert len(rows) == len(curve.points)
    for row, point in zip(rows, curve.points, strict=True):
        assert (int(row["n"]), row["strategy"], row["state"]) == (
            point.n, point.strategy, point.state,
        )  # fmt: skip
        assert row["dropped"] == " ".join(map(str, point.dropped))
        assert row["loss"] == ("" if point.loss is None else str(point.loss.nats))
        assert row["failed"] == (point.failed or "")


def test_a_curve_that_is_known_is_not_measured_again(learned, words, tmp_path, monkeypatch):
    options = {**TAKEN, "n": [2], "strategies": ["similarity"]}
    first = sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out")
    monkeypatch.setattr(CurvePoints, "__init__", lambda *_args, **_options: 1 / 0)
    for folder in ("out", "other"):
        again = sh.curve(learned, words, TEXTS, **options, out=tmp_path / folder)
        assert again == first
        assert Curve.from_json(json.loads((tmp_path / folder / "curve.json").read_text())) == first


def test_points_of_another_curve_are_not_measured_again(learned, words, tmp_path, monkeypatch):
    options = {**TAKEN, "strategies": ["similarity"]}
    first = sh.curve(learned, words, TEXTS, **{**options, "n": [2]}, out=tmp_path / "out")
    measure, seen = Measuring._measure, []

    def noted(points, plan, state):
        seen.append((len(plan.dropped), state))
        return measure(points, plan, state)

    monkeypatch.setattr(Measuring, "_measure", noted)
    more = sh.curve(learned, words, TEXTS, **{**options, "n": [1, 2]}, out=tmp_path / "more")
    assert seen == [(1, "cut"), (1, "patched")]
    assert [one for one in more.points if one.n == 2] == [*first.points[1:]]


# Cut short, and gone on with.
class Killed(BaseException):
    """Ends a curve as a kill would, where nothing catches it."""


# Healed.
@pytest.mark.slow
def test_a_cut_is_healed_from_its_patch_and_nothing_is_left(learned, words, tmp_path):
    texts = progressions(MANY, 5)
    options = {**TAKEN, "n": [2], "strategies": ["similarity"], "heal": QUICK}
    options |= {"states": ["healed", "cut", "patched"], "out": tmp_path / "out"}
    before = state_of(learned)
    curve = sh.curve(learned, words, texts, **options)
    assert_same(before, state_of(learned))
    cut, patched, healed = curve.points[1:]
    assert [one.state for one in (cut, patched, healed)] == ["cut", "patched", "healed"]
    assert healed.loss.nats < patched.loss.nats < cut.loss.nats
    assert not (tmp_path / "out" / ".healing").exists()
    assert curve.settings["heal"]["steps"] == QUICK.steps
    fit = three_splits(texts, REPORT, num_choosing=sh.CurveSettings().num_choosing)
    sh.patch(learned, words, cut.dropped, texts=fit.fit, max_length=16, num_tokens=512)
    plan = sh.Plan.of(4, cut.dropped)
    sh.save_model(learned, words, tmp_path / "cut", plan=plan)
    sh.heal(
        tmp_path / "cut", fit.fit[::-1], tmp_path / "healed", recipe=QUICK, eval_texts=fit.choose,
        merge=True,
    )  # fmt: skip
    loss = sh.evaluate_loss(*sh.load_model(tmp_path / "healed", "float32"), REPORT, max_length=16)
    assert healed.loss.nats == pytest.approx(loss.nats, abs=1e-6)


@pytest.mark.slow
def test_a_healing_that_was_made_is_not_made_again(learned, words, tmp_path, monkeypatch):
    texts = progressions(MANY, 5)
    options = {**TAKEN, "n": [2], "strategies": ["deepest"], "heal": QUICK, "states": ["healed"]}
    with monkeypatch.context() as patched:
        patched.setattr(Measuring, "loss_now", _killed)
        with pytest.raises(Killed):
            sh.curve(learned, words, texts, **options, out=tmp_path / "out")
    monkeypatch.setattr("shallower.healing.heal.heal", _killed)
    curve = sh.curve(learned, words, texts, **options, out=tmp_path / "out")
    assert curve.points[1].loss is not None
    assert not (tmp_path / "out" / ".healing").exists()


def _killed(*_args, **_options):
    raise Killed


# Bad input.
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": [6]}, sh.LayersError, "cannot drop n = 6 of 6 layers: expected 1 <= n <= 5"),
        ({"n": [1, -2]}, sh.LayersError, r"n = -2: expected at least 0"),
        ({"n": "1,2"}, sh.LayersError, "expected numbers of layers, as 1,2,4"),
        ({"n": [1.5]}, sh.LayersError, "1.5: expected an integer"),
        ({"strategies": ["magic"]}, sh.CriterionError, "'magic': expected some of recommended, "),
        ({"strategies": "deepest"}, sh.CriterionError, "must be a sequence of names"),
        ({"strategies": []}, sh.CriterionError, "expected some of recommended"),
        ({"strategies": ["deepest"] * 2}, sh.CriterionError, "named twice: deepest"),
        ({"states": ["mended"]}, sh.PatchError, "'mended': expected some of cut, patched, healed"),
        (
            {"patch_tokens": 0},
            sh.LayersError,
            "patch_tokens = 0: expected a whole number",
        ),
        ({"seed": -1}, sh.LayersError, "seed = -1"),
        ({"heal_steps": 3}, sh.RecipeError, "--heal-steps without --states healed"),
        ({"heal": QUICK}, sh.RecipeError, "without the state healed"),
        ({"eval_texts": []}, sh.TextsError, "too few test texts"),
        ({"eval_texts": "w1 w2"}, sh.TextsError, "texts must be an iterable of strings"),
        ({"states": ["healed"], "heal": TOO_LONG}, sh.TextsError, "texts make"),
    ],
)
def test_what_cannot_be_is_one_sentence(llama, words, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        sh.curve(llama, words, TEXTS, **{**TAKEN, **options}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_curve_needs_overwrite_before_any_work(learned, words, tmp_path):
    options = {**TAKEN, "n": [1], "strategies": ["deepest"], "states": ["cut"]}
    sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out")
    before = (tmp_path / "out" / "curve.json").read_bytes()
    options["n"] = [2]
    with pytest.raises(sh.OutputError, match=r"curve\.json exists already"):
        sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out")
    assert (tmp_path / "out" / "curve.json").read_bytes() == before
    curve = sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out", overwrite=True)
    assert curve.points[1].n == 2


@pytest.mark.parametrize("name", ["curve.json", "curve.csv", "scan.safetensors"])
def test_files_of_somebody_else_stay(llama, words, tmp_path, name):
    (tmp_path / name).write_text("dear to someone")
    with pytest.raises(sh.OutputError, match=f"{name} exists already"):
        sh.curve(llama, words, Unread(), **TAKEN, out=tmp_path, cache=False)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["dear to someone"]
