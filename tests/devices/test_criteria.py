"""Criteria of similarity, of all tokens and by linear maps, on fake CUDA devices."""

import pytest

from shallower.errors import CriterionError
from shallower.judgement.criteria import criteria
from tests.conftest import mostly_slow, word_tokenizer
from tests.devices.batches import TEXTS
from tests.devices.stage import Stage
from tests.devices.test_models import A_PLAIN_SUM
from tests.judgement.toy import make_subject


@pytest.mark.parametrize(
    "name",
    mostly_slow(["block_influence", "linear_map", "reachable", "weights"], ["reachable"]),
)
def test_a_criterion(stage, name):
    with stage.open(_scale=A_PLAIN_SUM):
        subject = make_subject(stage.model(), word_tokenizer(), TEXTS * 2, sizes=(2,))
        costs = criteria[name].costs(subject)
    assert (costs.num_layers, costs.metric) == (4, name)


def test_taylor_needs_weights_on_their_device():
    stage = Stage(1, offloading=True)
    with stage.open():
        subject = make_subject(stage.model(), word_tokenizer(), TEXTS)
        with pytest.raises(CriterionError, match="weights of layer 1 have none"):
            criteria["taylor"].costs(subject)
