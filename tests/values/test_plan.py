"""Plans, their files, and rejections."""

import json
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import ANY

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower import (
    Block,
    Costs,
    DroppedExperts,
    LayersError,
    ModelIdentity,
    Plan,
    PlanError,
    Positions,
    Rejection,
    TextsIdentity,
)
from shallower.reporting.stories.stages import plan_table
from shallower.values.layers import blocks_of
from shallower.values.plan import describe_rejections
from tests.values.damage import damaged, mistyped, peak_memory

MODEL = ModelIdentity("tiny", "llama", 12, "bfloat16", "f" * 64)
TEXTS = TextsIdentity(24, 256, "0" * 64)
PLAN = Plan(
    12, (Block(2, 4, 0.25, 0.125), Block(7, 8)), "similarity", "angular", MODEL, (TEXTS, TEXTS)
)

OF_EXPERTS = replace(PLAN, experts=DroppedExperts(6, {0: (1, 4), 4: (0, 5)}, "reap"))


@pytest.fixture
def plan_file(tmp_path):
    """Writes what it is given, text or JSON values, and names the file."""

    def write(content):
        path = tmp_path / "plan.json"
        path.unlink(missing_ok=True)  # quicker than to cut it short
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def changed(*place, to):
    """The plan's JSON with another value at a place."""
    data = PLAN.to_json()
    container = data
    for key in place[:-1]:
        container = container[key]
    container[place[-1]] = to
    return data


@pytest.mark.parametrize(
    ("num_layers", "blocks"),
    [
        (6, ()), (6, (Block(3, 4), Block(1, 2))), (1, (Block(0, 1),)), (0, (Block(0, 1),)),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_carried_out_is_refused(num_layers, blocks):
    with pytest.raises(LayersError):
        Plan(num_layers, blocks)


@st.composite
def plans(draw):
    num_layers = draw(st.integers(2, 40))
    subsets = st.sets(st.integers(0, num_layers - 1), min_size=1, max_size=num_layers - 1)
    number = st.none() | st.floats(0, 1)
    blocks = [
        Block(block.start, block.stop, draw(number), draw(number))
        for block in blocks_of(sorted(draw(subsets)))
    ]
    model = ModelIdentity(draw(st.text()), draw(st.text()), num_layers, "nf4", draw(st.text()))
    texts = st.builds(TextsIdentity, st.integers(0), st.integers(1), st.text())
    return Plan(
        num_layers,
        tuple(blocks),
        draw(st.sampled_from(["similarity", "deepest", "manual"])),
        draw(st.sampled_from([None, "angular", "cosine"])),
        draw(st.sampled_from([None, model])),
        tuple(draw(st.lists(texts, max_size=3))),
    )


@given(plans())
def test_a_plan_comes_back_from_its_file(plan):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        plan.save(path)
        back = Plan.load(path)
        path.write_text(path.read_text(), encoding="utf-8-sig")  # as editors of Windows do
        assert Plan.load(path) == plan
    assert back == plan
    assert [(b.score, b.stderr) for b in back.blocks] == [(b.score, b.stderr) for b in plan.blocks]
    assert back.to_json() == plan.to_json()


def test_a_plan_file_is_strict_json_that_names_what_goes_and_what_stays(tmp_path):
    plan = Plan(6, (Block(1, 3, 0.25, math.nan), Block(4, 5)), "similarity", "angular")
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text(), parse_constant=pytest.fail)
    assert data["survivors"] == [0, 3, 5]
    assert [(block["start"], block["stop"]) for block in data["drop"]] == [(1, 3), (4, 5)]
    assert data["drop"][0]["stderr"] is None
    assert {"shallower", "torch", "transformers", "numpy"} <= set(data["versions"])


@pytest.mark.parametrize("opening", ["[", '{"format":'])
def test_json_nested_without_end_is_refused(plan_file, opening):
    with pytest.raises(PlanError):
        Plan.load(plan_file(opening * 100_000))


def test_a_plan_need_not_know_the_positions(plan_file):
    data = PLAN.to_json()
    del data["positions"]
    assert Plan.load(plan_file(data)).positions is None
    data["positions"] = {"kind": "random", "count": 3, "seed": 7}
    assert Plan.load(plan_file(data)).positions == Positions.parse("random:3", 7)
    for broken in ("last", 5, [], {"kind": "first", "count": 1, "seed": 0}):
        data["positions"] = broken
        with pytest.raises(PlanError):
            Plan.load(plan_file(data))


OPTIONAL = ("score", "stderr", "metric", "model", "positions", "criterion")


@pytest.mark.parametrize("plan", [PLAN, OF_EXPERTS], ids=["layers", "experts"])
def test_a_value_of_another_type_is_refused(plan_file, plan):
    for data in mistyped(json.loads(json.dumps(plan.to_json())), *OPTIONAL):
        with pytest.raises(PlanError):
            Plan.load(plan_file(data))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("format", "shallower.scan"), ("version", 2), ("num_layers", -12), ("num_layers", 13),
        ("drop", []), ("drop", PLAN.to_json()["drop"][::-1]), ("survivors", list(range(12))),
        ("drop.0.start", -2), ("drop.0.stop", 2), ("drop.0.stop", 12), ("drop.0.end", 4),
        ("model.num_layers", 13), ("model.extra", 1), ("texts.0", {"num_texts": 1}),
    ],
)  # fmt: skip
def test_a_plan_that_contradicts_itself_is_refused(plan_file, place, value):
    keys = [int(key) if key.isdigit() else key for key in place.split(".")]
    with pytest.raises(PlanError):
        Plan.load(plan_file(changed(*keys, to=value)))


@given(damaged(PLAN.to_json()) | damaged(OF_EXPERTS.to_json()))
def test_a_plan_damaged_anyhow_is_refused_or_of_use(data):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(json.dumps(data))
        try:
            plan = Plan.load(path)
        except PlanError:
            return
        with suppress(PlanError):
            plan.check_model(MODEL)
        plan_table(plan)
        plan.save(path)
        assert Plan.load(path).dropped == plan.dropped


def test_a_plan_of_a_model_far_too_deep_costs_no_memory(plan_file):
    path = plan_file(changed("num_layers", to=1_000_000))

    def load():
        with pytest.raises(PlanError):
            Plan.load(path)

    assert peak_memory(load) < 1_000_000


@pytest.mark.parametrize("name", ["absent", "", ".", "x" * 300, "a\0b", "file/below"])
def test_a_plan_that_is_not_there_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("old")
    with pytest.raises(PlanError):
        Plan.load(tmp_path / name)


def test_a_plan_fits_its_own_model_in_any_dtype():
    PLAN.check_model(MODEL)
    PLAN.check_model(ModelIdentity("renamed", "llama", 12, "nf4", MODEL.fingerprint))
    Plan(12, (Block(2, 4),)).check_model(MODEL)


@pytest.mark.parametrize(
    "model",
    [
        ModelIdentity("tiny", "llama", 13, "bfloat16", MODEL.fingerprint),
        ModelIdentity("tiny", "llama", 12, "bfloat16", "e" * 64),
    ],
)
def test_a_plan_refuses_another_model(model):
    with pytest.raises(PlanError, match="tiny"):
        PLAN.check_model(model)


def test_a_plan_of_no_model_refuses_another_depth():
    with pytest.raises(PlanError, match="12 layers"):
        Plan(12, (Block(2, 4),)).check_model(ModelIdentity("deep", "llama", 32, "nf4", ""))


def test_whatever_names_layers_makes_a_plan():
    assert Plan.of(12, (i for i in [5, 2, 3])).blocks == (Block(2, 4), Block(5, 6))
    assert Plan.of(12, [range(2, 4), 4, Block(7, 9)]).blocks == (Block(2, 5), Block(7, 9))
    assert Plan.of(12, Block(7, 9)) == replace(Plan(12, (Block(7, 9),)), versions=ANY)
    with pytest.raises(LayersError, match="no layer 12"):
        Plan.of(12, [12])


def test_a_plan_of_blocks_keeps_their_scores():
    scored = [Block(9, 11, 0.2, 0.01), Block(4, 6, 0.1), 1, 2]
    plan = Plan.of(12, scored)
    assert plan.blocks == (Block(1, 3), Block(4, 6), Block(9, 11))
    assert [block.score for block in plan.blocks] == [None, 0.1, 0.2]
    assert plan.blocks[2].stderr == 0.01
    assert (plan.strategy, plan.metric) == ("manual", None)
    assert Plan.of(12, Block(4, 6, 0.1)).blocks[0].score == 0.1


@pytest.mark.parametrize("beside", [6, 3, range(6, 8), Block(2, 4), Block(6, 8, 0.2)], ids=str)
def test_a_block_that_touches_another_layer_loses_its_score(beside):
    (block,) = Plan.of(12, [Block(4, 6, 0.1, 0.01), beside]).blocks
    assert len(block) > 2
    assert (block.score, block.stderr) == (None, None)


def test_a_plan_passes_through_if_it_is_for_so_many_layers():
    assert Plan.of(12, PLAN) is PLAN
    with pytest.raises(PlanError, match="for 12 layers, the model has 13"):
        Plan.of(13, PLAN)


def test_many_rejections_are_counted_and_the_first_are_named():
    described = describe_rejections(8, 20, [Rejection(i, f"why {i}") for i in range(8)])
    assert described.startswith("8 of 20 samples rejected: sample 0: why 0; ")
    assert "sample 4: why 4" in described
    assert "sample 5" not in described
    assert described.endswith("and 3 more")


def test_a_plan_is_known_by_what_goes_and_not_by_what_chose_it():
    one, other = (
        Plan(6, (), experts=DroppedExperts(4, {3: gone}, criterion))
        for gone, criterion in (((1, 2), "reap"), ((2, 1), None))
    )
    assert one != other
    assert one.key == other.key != Plan(6, (), experts=DroppedExperts(4, {3: (1, 3)})).key


def test_a_plan_of_chosen_blocks_knows_what_chose_them():
    texts = (TextsIdentity(3, 8, "texts"),)
    values = np.add.outer(np.zeros(7), np.arange(7.0) % 3)
    costs = Costs.of_blocks(values, metric="taylor", texts=texts)
    first, second = costs.best_blocks(1, 2)
    plan = Plan.of(6, [second, first])
    assert (plan.strategy, plan.metric, plan.texts) == ("costs", "taylor", texts)
    assert [block.score for block in plan.blocks] == [first.score, second.score]
    other = Costs.of_blocks(values, metric="loss", texts=texts).best_block(1)
    for mixed in ([other, second], [first, 4], [first, Block(4, 5, 0.1)], [costs.scored(first)]):
        plan = Plan.of(6, mixed)
        assert (plan.strategy, plan.metric, plan.texts) == ("manual", None, ())
    assert Plan.from_json(Plan.of(6, [first]).to_json()).metric == "taylor"
