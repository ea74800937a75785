"""Every criterion on a network whose layers' worth is known."""

import numpy as np
import pytest

from shallower.judgement.criteria import criteria
from tests.judgement.toy import (
    GROWTH,
    IDENTITY,
    NUM_LAYERS,
    PAIR,
    SCALES,
    make_subject,
    toy_model,
    toy_texts,
)


@pytest.fixture(scope="module")
def subject(words):
    model = toy_model()
    return make_subject(model, words, toy_texts(model), sizes=(1, 2))


def test_the_answer_is_what_it_is_said_to_be(subject):
    subject.layerwise.check(subject.batches[0])
    whole = subject.trials.scores(())
    lost = [subject.trials.scores({i}).minus(whole) for i in range(NUM_LAYERS)]
    free = {IDENTITY, SCALES}
    assert lost[IDENTITY].mean == 0
    assert abs(lost[SCALES].mean) < 1e-6
    assert abs(subject.trials.scores(range(*PAIR)).minus(whole).mean) < 1e-6
    assert all(lost[i].mean > 3 * lost[i].stderr for i in range(NUM_LAYERS) if i not in free)


OF_BLOCKS = ["angular", "cosine", "relative_l2", "cka", "linear_map", "reachable"]
OF_LAYERS = ["block_influence", "magnitude", "xmerge", "taylor", "weights"]
BLIND_TO_SCALE = ["angular", "cosine", "cka", "block_influence"]


def costs_of(subject, name):
    return subject.shared(("costs", name), lambda: criteria[name].costs(subject))


def median(subject, name):
    return np.nanmedian(np.diag(costs_of(subject, name).blocks, 1))


@pytest.mark.parametrize("name", OF_BLOCKS + OF_LAYERS)
def test_the_identity_is_found(subject, name):
    costs = costs_of(subject, name)
    single = np.diag(costs.blocks, 1)
    assert single[IDENTITY] == np.nanmin(single)
    if name != "xmerge":  # a standard score
        assert abs(single[IDENTITY]) < 1e-9
    assert criteria[name].plans(subject)[1].dropped in ((IDENTITY,), (SCALES,))


@pytest.mark.parametrize("name", OF_BLOCKS)
def test_two_layers_that_cancel_are_found_as_a_block(subject, name):
    costs = costs_of(subject, name)
    assert costs.blocks[PAIR] < 1e-6
    assert costs.best_block(2).start == PAIR[0]


@pytest.mark.parametrize("name", OF_LAYERS)
def test_two_layers_that_cancel_are_not_seen_by_what_looks_at_single_layers(subject, name):
    costs = costs_of(subject, name)
    assert costs.blocks[PAIR] > 0.1 + costs.blocks[IDENTITY, IDENTITY + 1] * 2
    assert criteria[name].plans(subject)[2].dropped == (IDENTITY, SCALES)
    said = " ".join(type(criteria[name]).__doc__.split())
    assert "two cancel each other" in said or "two layers that cancel" in said or name == "xmerge"


@pytest.mark.parametrize("name", BLIND_TO_SCALE)
def test_a_layer_that_only_scales_is_free_to_what_sees_no_length(subject, name):
    assert abs(costs_of(subject, name).blocks[SCALES, SCALES + 1]) < 1e-6


def test_a_layer_that_only_scales_costs_its_growth_to_what_sees_lengths(subject):
    def of(name):
        return costs_of(subject, name).blocks[SCALES, SCALES + 1]

    assert of("relative_l2") == pytest.approx(GROWTH, rel=1e-6)
    assert of("magnitude") == pytest.approx(GROWTH / (1 + GROWTH), rel=1e-6)
    assert of("linear_map") < 0.1 * median(subject, "linear_map")  # a linear map stands in for it
    # As far as what the layer before it is made of tells what is to be scaled.
    assert 1e-3 < of("reachable") < 0.6 * median(subject, "reachable")
    # z of its length is the larger, and it is not as cheap as the identity.
    assert of("xmerge") > costs_of(subject, "xmerge").blocks[IDENTITY, IDENTITY + 1] + 0.3
