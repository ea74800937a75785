"""Every criterion on a network whose layers' worth is known."""

import pytest

from tests.judgement.toy import (
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
