"""A curve, a comparison of few criteria with full patches: patches, healings, what is known."""

import copy
from dataclasses import replace

import pytest

import shallower as sh
from shallower.judgement.subject import evenly
from shallower.judgement.verifying import PATCH_TEXTS
from shallower.models.layerwise import Layerwise
from shallower.patching.quick import QuickPatch
from shallower.reporting.stories.comparison import comparison_story
from shallower.studies.measuring import Measuring
from shallower.studies.verified_plans import VERIFYING_TEXTS
from shallower.texts.batches import TokenBatches
from shallower.texts.splits import three_splits
from shallower.values.tokens import Tokens
from tests.documents import assert_same, state_of
from tests.healing.cuts import MANY, QUICK
from tests.healing.cuts import documents as progressions
from tests.studies.conftest import Killed
from tests.studies.test_compare import Odd

TEXTS, REPORT = progressions(120, 5), progressions(12, 1)
TOO_LONG = replace(QUICK, max_length=128)
FIT = three_splits(TEXTS, REPORT, num_choosing=sh.CurveSettings().num_choosing).fit
TAKEN = {
    "eval_texts": REPORT, "max_length": 16, "top": 2, "n": [2, 3, 0], "patch_tokens": 512,
    "criteria": ["recommended", "angular", "deepest"],
}  # fmt: skip


@pytest.fixture(scope="module")
def done(trained, words):
    """The curve of a model that was trained a little."""
    model = copy.deepcopy(trained)
    before = state_of(model)
    curve = sh.curve(model, words, TEXTS, **TAKEN, cache=False)
    assert_same(before, state_of(model))
    return curve


def told(curve):
    """The facts of the settings on its page."""
    sections = comparison_story(curve, drawn=False).sections
    return {fact.name: str(fact.value) for part in sections for fact in part.facts}


def row_of(curve, criterion, state, n=2):
    """A row by what it is of."""
    (row,) = [
        one for one in curve.rows if (one.criterion, one.state, one.n) == (criterion, state, n)
    ]
    return row


# The rows.
def test_there_is_a_row_for_every_size_criterion_and_state(done):
    assert [(row.state, row.criterion, row.n) for row in done.rows] == [
        (state, criterion, n)
        for state in ("cut", "patched")
        for criterion in TAKEN["criteria"]
        for n in (2, 3)
    ]
    assert (done.models[0].num_layers, done.max_length, done.models[0].dtype) == (4, 16, "float32")
    assert done.splits == {"fit": 80, "choose": 39, "report": 12}
    assert told(done)["patch"] == "full patch on at most 512 tokens"


def test_a_patched_cut_has_the_loss_of_the_patched_model(done, learned, words):
    row = row_of(done, "angular", "patched")
    sh.patch(learned, words, row.dropped, texts=FIT, max_length=16, num_tokens=512)
    loss = sh.evaluate_loss(learned, words, REPORT, max_length=16)
    assert row.standing.loss.mean == pytest.approx(loss.nats, abs=1e-6)
    assert row.standing.loss.mean < row_of(done, "angular", "cut").standing.loss.mean


def test_what_cannot_be_patched_says_why_and_the_others_go_on(done):
    row = row_of(done, "deepest", "patched", 3)
    assert (row.dropped, row.standing) == ((0, 1, 2), None)
    assert row.failed.startswith("there is no layer before the block [0, 3)")
    assert [one.failed for one in done.rows].count(None) == 11


@pytest.mark.slow
def test_the_choices_are_those_of_the_other_commands(done, learned, words, tmp_path):
    scanned = sh.scan(learned, words, FIT, max_length=16)
    run = sh.run(
        learned, words, TEXTS, eval_texts=REPORT, max_length=16, top=2, n=2, prompts=(),
        out=tmp_path / "run",
    )  # fmt: skip
    for criterion, dropped in (
        ("recommended", run.recommended.plan.dropped),
        ("angular", tuple(scanned.best_block(2).layers)),
        ("deepest", (1, 2)),
    ):
        assert row_of(done, criterion, "cut").dropped == dropped


def test_a_criterion_of_ones_own_and_one_that_fails(learned, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sh.criteria, "odd", Odd())
    options = {**TAKEN, "n": [2], "states": ["cut"], "criteria": ["odd", "best_plan"]}
    curve = sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out")
    assert row_of(curve, "odd", "cut").dropped == (1, 3)
    scanned = sh.scan(learned, words, FIT, max_length=16)
    assert row_of(curve, "best_plan", "cut").dropped == scanned.best_plan(2, 3).dropped
    with pytest.raises(sh.OutputError, match=r"comparison\.json exists already"):
        sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out")  # who knows its code
    monkeypatch.setattr(Odd, "costs", lambda *_: 1 / 0)
    curve = sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out", overwrite=True)
    assert curve.skipped == {"odd": "ZeroDivisionError: division by zero"}
    assert [row.criterion for row in curve.rows] == ["best_plan"]


def test_a_quick_patch_is_that_of_a_verification(learned, words):
    options = {**TAKEN, "n": [2], "states": ["patched"], "criteria": ["deepest"]}
    curve = sh.curve(learned, words, TEXTS, **options, patch="quick")
    batches = list(TokenBatches(words, FIT[:VERIFYING_TEXTS], Tokens(16, 8), min_tokens=2))
    quick = QuickPatch(Layerwise(learned), evenly(batches, PATCH_TEXTS))
    with quick.patched(sh.Plan.of(4, [1, 2])), sh.without_layers(learned, [1, 2]):
        loss = sh.evaluate_loss(learned, words, REPORT, max_length=16)
    (row,) = curve.rows
    assert row.standing.loss.mean == pytest.approx(loss.nats, abs=1e-6)
    assert told(curve)["patch"] == "quick patch (one matrix a block)"
    assert "patch" not in told(sh.curve(learned, words, TEXTS, **{**options, "states": ["cut"]}))


def noted(monkeypatch):
    """The cuts and states that are measured from here on."""
    measure, seen = Measuring._measure, []

    def note(measuring, plan, state, on):
        seen.append((plan and plan.dropped, state))
        return measure(measuring, plan, state, on)

    monkeypatch.setattr(Measuring, "_measure", note)
    return seen


def test_cuts_that_criteria_have_in_common_are_measured_once(learned, words, monkeypatch):
    seen = noted(monkeypatch)
    options = {**TAKEN, "n": [1], "criteria": ["angular", "best_plan", "cosine"]}
    curve = sh.curve(learned, words, TEXTS, **options, patch="quick")
    assert len(seen) == len(set(seen)) == 3
    assert len({row.standing.loss.mean for row in curve.rows}) == 2


# Healed.
@pytest.mark.slow
def test_a_cut_is_healed_from_its_patch_and_nothing_is_left(learned, words, tmp_path):
    texts = progressions(MANY, 5)
    options = {**TAKEN, "n": [2], "criteria": ["angular"], "heal": QUICK}
    options |= {"states": ["healed", "cut", "patched"], "out": tmp_path / "out"}
    before = state_of(learned)
    curve = sh.curve(learned, words, texts, **options)
    assert_same(before, state_of(learned))
    cut, patched, healed = curve.rows
    assert [one.state for one in (cut, patched, healed)] == ["cut", "patched", "healed"]
    assert healed.standing.loss.mean < patched.standing.loss.mean < cut.standing.loss.mean
    assert not (tmp_path / "out" / ".healing").exists()
    fit = three_splits(texts, REPORT, num_choosing=sh.CurveSettings().num_choosing)
    sh.patch(learned, words, cut.dropped, texts=fit.fit, max_length=16, num_tokens=512)
    plan = sh.Plan.of(4, cut.dropped)
    sh.save_model(learned, words, tmp_path / "cut", plan=plan)
    sh.heal(
        tmp_path / "cut", fit.fit[::-1], tmp_path / "healed", recipe=QUICK, eval_texts=fit.choose,
        merge=True,
    )  # fmt: skip
    loss = sh.evaluate_loss(*sh.load_model(tmp_path / "healed", "float32"), REPORT, max_length=16)
    assert healed.standing.loss.mean == pytest.approx(loss.nats, abs=1e-6)


@pytest.mark.slow
def test_a_healing_that_was_made_is_not_made_again(learned, words, tmp_path, monkeypatch):
    texts = progressions(MANY, 5)
    options = {**TAKEN, "n": [2], "criteria": ["deepest"], "heal": QUICK, "states": ["healed"]}
    with monkeypatch.context() as patched:
        patched.setattr(Measuring, "loss_now", _killed)
        with pytest.raises(Killed):
            sh.curve(learned, words, texts, **options, out=tmp_path / "out")
    monkeypatch.setattr("shallower.healing.heal.heal", _killed)
    curve = sh.curve(learned, words, texts, **options, out=tmp_path / "out")
    assert curve.rows[0].standing is not None
    assert not (tmp_path / "out" / ".healing").exists()


@pytest.mark.slow
def test_a_healing_of_a_model_that_is_not_known_is_made_again(
    learned, words, tmp_path, monkeypatch
):
    learned.model.norm.register_forward_hook(lambda *_: None)
    options = {**TAKEN, "n": [2], "criteria": ["deepest"], "heal": QUICK, "states": ["healed"]}
    options |= {"out": tmp_path / "out", "overwrite": True}
    texts = progressions(MANY, 5)
    with monkeypatch.context() as patched:
        patched.setattr(Measuring, "loss_now", _killed)
        with pytest.raises(Killed):
            sh.curve(learned, words, texts, **options)
    assert any((tmp_path / "out" / ".healing").iterdir())
    monkeypatch.setattr("shallower.healing.heal.heal", _killed)
    with pytest.raises(Killed):
        sh.curve(learned, words, texts, **options)


def test_an_unknown_model_resumes_nothing(learned, words, tmp_path):
    learned.model.norm.register_forward_hook(lambda *_: None)
    options = {**TAKEN, "n": [1], "criteria": ["deepest"], "states": ["cut"]}
    sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out")
    with pytest.raises(sh.OutputError, match=r"comparison\.json exists already"):
        sh.curve(learned, words, TEXTS, **options, out=tmp_path / "out")


def _killed(*_args, **_options):
    raise Killed


# Bad input.
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": [1, -2]}, sh.LayersError, r"n = -2: expected at least 0"),
        ({"eval_texts": "w1 w2"}, sh.TextsError, "texts must be an iterable of strings"),
        ({"states": ["healed"], "heal": TOO_LONG}, sh.TextsError, "texts make"),
        ({"settings": sh.RunSettings()}, sh.SettingsError, "expected CurveSettings"),
    ],
)
def test_what_cannot_be_is_one_sentence(llama, words, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        sh.curve(llama, words, TEXTS, **{**TAKEN, **options}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["comparison.json", "comparison.csv"])
def test_files_of_somebody_else_stay(llama, words, tmp_path, name):
    (tmp_path / name).write_text("dear to someone")
    with pytest.raises(sh.OutputError, match=f"{name} exists already"):
        sh.curve(llama, words, TEXTS, **TAKEN, out=tmp_path, cache=False)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["dear to someone"]
