"""Blocks, plans and losses: what they refuse, and how they come back from a file."""

import copy
import itertools
import json
import math
import tracemalloc
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shallower import (
    Block,
    Comparison,
    Cut,
    LayersError,
    Loss,
    ModelIdentity,
    OutputError,
    Plan,
    PlanError,
    Positions,
    Rejection,
    TextsIdentity,
)
from shallower.artifacts import blocks_of, describe_rejections, dropped_layers
from shallower.report import plan_table

MODEL = ModelIdentity("tiny", "llama", 12, "bfloat16", "f" * 64)
TEXTS = TextsIdentity(24, 256, "0" * 64)
PLAN = Plan(
    12, (Block(2, 4, 0.25, 0.125), Block(7, 8)), "similarity", "angular", MODEL, (TEXTS, TEXTS)
)
NO_INDICES = [True, np.True_, 1.0, np.float64(1), "1", b"1", None, 1j, [1], float("nan")]

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-10_000, 10_000)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, 1, -1, "", "angular"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def places(document):
    """Every container of a JSON document with each of its keys."""
    keys = document if isinstance(document, dict) else range(len(document))
    for key in keys:
        yield document, key
        if isinstance(document[key], dict | list):
            yield from places(document[key])


@st.composite
def damaged(draw, document):
    """A JSON document with a few values replaced, removed, or joined by others."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(list(places(document))))
        match draw(st.sampled_from(["replace", "replace", "remove", "join"])):
            case "replace":
                container[key] = draw(JSON)
            case "remove":
                del container[key]
            case "join" if isinstance(container, dict):
                container[draw(st.text(max_size=5))] = draw(JSON)
            case "join":
                container.insert(key, draw(JSON))
        if not list(places(document)):
            break
    return document


@pytest.fixture
def plan_file(tmp_path):
    """Writes what it is given, text or JSON values, and names the file."""

    def write(content):
        path = tmp_path / "plan.json"
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


def test_a_block_is_half_open():
    block = Block(3, 7, 0.5, 0.1)
    assert list(block.layers) == [3, 4, 5, 6]
    assert len(block) == 4
    assert str(block) == "[3, 7)"


def test_a_block_equals_its_range_alone():
    assert Block(11, 19, 0.3, 0.1) == Block(11, 19)
    assert hash(Block(11, 19, 0.3, 0.1)) == hash(Block(11, 19))
    assert Block(11, 19) != Block(11, 18)


def test_a_block_holds_plain_integers():
    block = Block(np.int64(3), torch.tensor(7))
    assert type(block.start) is int
    assert type(block.stop) is int
    assert json.loads(json.dumps(block.to_json())) == {
        "start": 3, "stop": 7, "score": None, "stderr": None,
    }  # fmt: skip


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 3), (3, 2), (-1, 2), (-3, -1)])
def test_a_block_without_layers_is_refused(start, stop):
    with pytest.raises(LayersError, match="0 <= start < stop"):
        Block(start, stop)


@pytest.mark.parametrize("value", NO_INDICES)
def test_a_block_needs_integers(value):
    with pytest.raises(LayersError):
        Block(value, 5)
    with pytest.raises(LayersError):
        Block(0, value)


@pytest.mark.parametrize(
    "layers",
    [
        Block(2, 5), [Block(2, 5)], range(2, 5), [range(2, 5)], [2, 3, 4], (4, 3, 2), {2, 3, 4},
        [Block(2, 4), 4], [4, range(2, 4)], np.arange(2, 5), torch.arange(2, 5), iter([4, 2, 3]),
        [range(4, 1, -1)], [np.int32(2), Block(3, 5)],
    ],
    ids=repr,
)  # fmt: skip
def test_layers_are_named_in_any_mixture(layers):
    dropped = dropped_layers(6, layers)
    assert dropped == (2, 3, 4)
    assert {type(layer) for layer in dropped} == {int}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([6], "no layer 6"), ([-1], "no layer -1"), (Block(4, 7), "no layer 6"),
        ([10**30], "no layer"), ([2, 2], "layer 2 is named twice"),
        ([Block(1, 4), 3], "layer 3 is named twice"), ([], "no layer is named"),
        ([range(3, 3)], "no layer is named"), (range(6), "at least one must stay"),
        ([Block(0, 6)], "at least one must stay"),
    ],
)  # fmt: skip
def test_layers_that_cannot_go_are_refused(layers, message):
    with pytest.raises(LayersError, match=message):
        dropped_layers(6, layers)


@pytest.mark.parametrize("layers", ["3", b"3", 3, None, 2.5, object()])
def test_what_holds_no_layers_is_refused(layers):
    with pytest.raises(LayersError):
        dropped_layers(6, layers)


@pytest.mark.parametrize("value", NO_INDICES)
def test_what_is_no_layer_is_refused(value):
    with pytest.raises(LayersError):
        dropped_layers(6, [2, value])


def peak_memory(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_block_far_too_long_costs_no_memory():
    def name_a_million():
        with pytest.raises(LayersError):
            dropped_layers(32, [Block(0, 1_000_000)])

    assert peak_memory(name_a_million) < 1_000_000


@given(st.integers(2, 40), st.data())
def test_blocks_and_layers_are_two_ways_to_say_the_same(num_layers, data):
    subsets = st.sets(st.integers(0, num_layers - 1), min_size=1, max_size=num_layers - 1)
    layers = tuple(sorted(data.draw(subsets)))
    blocks = blocks_of(layers)
    assert dropped_layers(num_layers, blocks) == layers
    assert all(left.stop < right.start for left, right in itertools.pairwise(blocks))
    plan = Plan(num_layers, blocks)
    assert plan.dropped == layers
    assert sorted(plan.dropped + plan.survivors) == list(range(num_layers))


def test_no_layers_are_no_blocks():
    assert blocks_of([]) == ()


@pytest.mark.parametrize(
    ("num_layers", "blocks"),
    [
        (6, ()), (6, (Block(0, 6),)), (6, (Block(5, 7),)), (6, (Block(3, 4), Block(1, 2))),
        (6, (Block(1, 3), Block(2, 4))), (6, (Block(1, 2), Block(1, 2))), (1, (Block(0, 1),)),
        (0, (Block(0, 1),)), (-1, (Block(0, 1),)),
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


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError):
        PLAN.save(tmp_path / "file" / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_truncated_plan_is_refused_at_every_length(plan_file):
    whole = json.dumps(PLAN.to_json())
    for length in range(len(whole)):
        with pytest.raises(PlanError):
            Plan.load(plan_file(whole[:length]))


@pytest.mark.parametrize("text", ["null", "[]", "{}", "5", '"plan"', "NaN", "", "\0", "1" * 5000])
def test_json_that_is_no_plan_is_refused(plan_file, text):
    with pytest.raises(PlanError):
        Plan.load(plan_file(text))


@pytest.mark.parametrize("opening", ["[", '{"format":'])
def test_json_nested_without_end_is_refused(plan_file, opening):
    with pytest.raises(PlanError):
        Plan.load(plan_file(opening * 100_000))


@pytest.mark.parametrize("key", sorted(set(PLAN.to_json()) - {"positions"}))
def test_a_plan_that_lacks_something_is_refused(plan_file, key):
    data = PLAN.to_json()
    del data[key]
    with pytest.raises(PlanError):
        Plan.load(plan_file(data))


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


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("format", "shallower.scan"), ("version", 2), ("version", "1"),
        ("num_layers", -12), ("num_layers", 12.0), ("num_layers", "12"), ("num_layers", True),
        ("num_layers", None), ("num_layers", 13),
        ("drop", []), ("drop", None), ("drop", [[2, 4]]), ("drop", [{}]),
        ("drop", {"start": 2, "stop": 4}), ("drop", PLAN.to_json()["drop"][::-1]),
        ("survivors", [0, 1]), ("survivors", None), ("survivors", list(range(12))),
        ("model", 5), ("model", []), ("model", {}), ("model", "tiny"), ("model", {"name": "tiny"}),
        ("metric", 5), ("metric", ["angular"]),
        ("strategy", None), ("strategy", ["similarity"]),
        ("texts", None), ("texts", [None]), ("texts", [{"num_texts": 1}]),
        ("versions", None), ("versions", 5), ("versions", ["ab"]),
        ("drop.0.start", -2), ("drop.0.start", 2.0), ("drop.0.start", "2"), ("drop.0.start", None),
        ("drop.0.stop", 2), ("drop.0.stop", 12), ("drop.0.end", 4),
        ("drop.0.score", "abc"), ("drop.0.score", []), ("drop.0.score", True),
        ("drop.0.stderr", []), ("drop.0.stderr", "0.1"),
        ("model.fingerprint", 5), ("model.fingerprint", None), ("model.name", None),
        ("model.num_layers", "12"), ("model.num_layers", 13), ("model.extra", 1),
        ("texts.0.num_texts", "24"), ("texts.0.fingerprint", 5),
    ],
)  # fmt: skip
def test_a_damaged_plan_is_refused(plan_file, place, value):
    keys = [int(key) if key.isdigit() else key for key in place.split(".")]
    with pytest.raises(PlanError):
        Plan.load(plan_file(changed(*keys, to=value)))


@given(damaged(PLAN.to_json()))
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


@given(st.binary(max_size=200))
def test_bytes_that_are_no_plan_are_refused(content):
    with TemporaryDirectory() as folder:
        (Path(folder) / "plan.json").write_bytes(content)
        with pytest.raises(PlanError):
            Plan.load(Path(folder) / "plan.json")


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


def test_a_rejection_names_the_sample():
    assert str(Rejection(3, "state 2 is a zero vector")) == "sample 3: state 2 is a zero vector"


def test_many_rejections_are_counted_and_the_first_are_named():
    described = describe_rejections(8, 20, [Rejection(i, f"why {i}") for i in range(8)])
    assert described.startswith("8 of 20 samples rejected: sample 0: why 0; ")
    assert "sample 4: why 4" in described
    assert "sample 5" not in described
    assert described.endswith("and 3 more")


def test_few_rejections_are_all_named():
    described = describe_rejections(1, 20, [Rejection(7, "no token")])
    assert described == "1 of 20 samples rejected: sample 7: no token"


def test_a_loss_is_normalized_by_the_logarithm_of_the_vocabulary():
    uniform = Loss(math.log(50_000), 0.5, 1000, 10, 0, 50_000)
    assert uniform.normalized == pytest.approx(1)
    assert uniform.normalized_stderr == pytest.approx(0.5 / math.log(50_000))


def test_a_loss_is_printed_with_its_error_where_there_is_one():
    assert str(Loss(2.34567, 0.01234, 1000, 10, 0, 100)) == "2.346 ± 0.012"
    assert str(Loss(2.34567, math.nan, 1000, 1, 0, 100)) == "2.346"


def test_a_comparison_is_strict_json():
    base = Loss(2.5, math.nan, 100, 1, 0, 1000)
    cut = Cut("similarity", Block(2, 4, 0.25, math.nan), Loss(2.75, 0.125, 100, 2, 1, 1000))
    data = json.loads(json.dumps(Comparison(base, (cut,)).to_json(), allow_nan=False))
    assert data["base"]["nats"] == 2.5
    assert data["base"]["stderr"] is None
    assert data["base"]["normalized"] == pytest.approx(2.5 / math.log(1000))
    assert data["cuts"][0]["strategy"] == "similarity"
    assert data["cuts"][0]["drop"] == {"start": 2, "stop": 4, "score": 0.25, "stderr": None}
    assert data["cuts"][0]["loss"]["stderr"] == 0.125
