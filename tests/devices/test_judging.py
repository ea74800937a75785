"""Cuts judged on fake CUDA devices, by every judge."""

import pytest

from shallower.judgement.judges.judge import KLJudge, LossJudge, SpeechJudge, judged_batches
from shallower.judgement.judges.options import OptionsJudge
from shallower.judgement.patched_trials import PatchedTrials
from shallower.judgement.trials import Trials
from shallower.models.layerwise import Layerwise
from shallower.patching.quick import QuickPatch
from shallower.results.speech import Answer
from shallower.texts.options import OptionItem
from shallower.values.tokens import Tokens
from tests.conftest import mostly_slow, word_tokenizer
from tests.devices.batches import TEXTS
from tests.devices.test_models import A_PLAIN_SUM

WORDS = word_tokenizer()
SAID = [[Answer((1, 2), (3, 4, place), False), Answer((1, 2), (5,), True)]
        for place in range(len(TEXTS))]  # fmt: skip
ITEMS = [OptionItem(text, ("w1 w2", "w3", "w4"), 1) for text in TEXTS]


@pytest.mark.parametrize("judge", mostly_slow(["loss", "kl", "options", "speech"], ["speech"]))
def test_a_cut_is_judged(stage, judge):
    if judge == "options":
        made = OptionsJudge(ITEMS, WORDS, tokens=Tokens(16, 3))
    elif judge == "speech":
        made = SpeechJudge(SAID, tokens=Tokens(16, 8))
    else:
        made = {"loss": LossJudge, "kl": KLJudge}[judge](judged_batches(WORDS, TEXTS, Tokens()))
    with stage.open():
        trials = Trials(Layerwise(stage.model()), made)
        # The second begins with states of the first, which wait in the CPU's memory.
        found = [trials.scores(dropped) for dropped in ([1, 2], [1, 3])]
    assert all(scores.complete for scores in found)
    assert all(len(scores) == len(TEXTS) for scores in found)


def test_cuts_are_judged_together(stage):
    with stage.open():
        trials = Trials(Layerwise(stage.model()), LossJudge(judged_batches(WORDS, TEXTS, Tokens())))
        trials.model.is_streamed = True  # as if its layers waited on disk
        trials.judge_together([[1, 2], [1, 3], []])
        found = [trials.scores(dropped) for dropped in ([1, 2], [1, 3])]
    assert all(scores.complete for scores in found)


@pytest.mark.slow
def test_cuts_are_judged_together_after_a_patch(stage):
    with stage.open(_scale=A_PLAIN_SUM):
        model = Layerwise(stage.llama())
        batches = judged_batches(WORDS, TEXTS, Tokens())
        trials, patch = Trials(model, LossJudge(batches)), QuickPatch(model, batches)
        model.is_streamed = True  # as if its layers waited on disk
        found = PatchedTrials(trials, patch).scores([1, 3], 1)
    assert len(found) == 2
