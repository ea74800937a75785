"""The states of a subject's texts, taken by plain hooks."""

import pytest

from tests.judgement import twins


@pytest.fixture(scope="module")
def states(subject):
    return twins.hooked_states(
        subject.decoder.model, subject.decoder.layers.modules, subject.batches
    )
