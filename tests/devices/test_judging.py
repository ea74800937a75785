"""Cuts judged on fake CUDA devices, by every judge."""

import pytest

from shallower.errors import StatesError
from shallower.judgement.half_blocks import half_blocks
from shallower.judgement.judges.judge import judged_batches
from shallower.judgement.judges.kl import KLJudge
from shallower.judgement.judges.loss import LossJudge
from shallower.judgement.judges.options import OptionsJudge
from shallower.judgement.looking_again import costs_in_a_cut
from shallower.judgement.subject import Subject
from shallower.judgement.trials import Trials
from shallower.judgement.work import Meter
from shallower.models.decoder import Decoder
from shallower.models.layerwise import Layerwise
from shallower.texts.options import OptionItem
from shallower.values.tokens import Tokens
from tests.conftest import word_tokenizer
from tests.devices.batches import TEXTS
from tests.devices.test_models import A_PLAIN_SUM

WORDS = word_tokenizer()
ITEMS = [OptionItem(text, ("w1 w2", "w3", "w4"), 1) for text in TEXTS]


@pytest.mark.parametrize("judge", ["loss", "kl", "options"])
def test_a_cut_is_judged(stage, judge):
    if judge == "options":
        made = OptionsJudge(ITEMS, WORDS, tokens=Tokens(16, 6))
    else:
        made = {"loss": LossJudge, "kl": KLJudge}[judge](judged_batches(WORDS, TEXTS, Tokens()))
    with stage.open():
        trials = Trials(Layerwise(stage.model()), made, meter=Meter())
        # The second begins with states of the first, which wait in the CPU's memory.
        found = [trials.scores(dropped) for dropped in ([1, 2], [1, 3])]
    assert all(scores.complete for scores in found)
    assert all(len(scores) == len(TEXTS) for scores in found)


def test_half_blocks(stage):
    judge = KLJudge(judged_batches(WORDS, TEXTS, Tokens()))
    with stage.open(_scale=A_PLAIN_SUM):
        decoder = Decoder.of(stage.model())
        trials = Trials(Layerwise(decoder), judge, meter=Meter())
        found = half_blocks(Subject(decoder, WORDS, judge.batches[:1], trials, (1,)))
    assert len(found) == 2 * len(decoder)
    assert found[0].kv_bytes == 2 * 4096 * 2


def test_a_cut_is_looked_at_again(stage):
    batches = judged_batches(WORDS, TEXTS, Tokens())
    # All states are zero here, which is told once they have been compared.
    with stage.open(), pytest.raises(StatesError, match="state 0 is a zero vector"):
        costs_in_a_cut(Layerwise(stage.model()), batches, [0, 1, 3])
