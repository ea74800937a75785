"""Layers that wait on disk come to a fake CUDA device while the one before them computes."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from shallower.evaluation.loss import FORWARD, evaluate_loss
from shallower.judgement.judges.judge import LossJudge, judged_batches
from shallower.judgement.patched_trials import PatchedTrials
from shallower.judgement.trials import Trials
from shallower.memory import plan as planning
from shallower.memory.device import Room
from shallower.memory.plan import fitting
from shallower.models.decoder import Decoder
from shallower.models.layerwise import Layerwise
from shallower.patching.quick import QuickPatch
from shallower.scanning.hidden_states import states_of
from shallower.values.tokens import Tokens
from tests.conftest import mostly_slow, word_tokenizer
from tests.devices.batches import TEXTS, batch
from tests.devices.stage import INNER_WIDTH, WIDTH, Stage
from tests.devices.test_models import A_PLAIN_SUM
from tests.devices.timeline import Copy

WORDS = word_tokenizer()
STAGE = Stage(1, streaming=True)
LEAST, SQUARE, MATRIX = SIZES = 2 * WIDTH, 2 * WIDTH**2, 2 * WIDTH * INNER_WIDTH
"""Bytes of the weights of a layer: 2, 4 and 3 of them. Token ids take fewer."""

LAYER = 2 * LEAST + 4 * SQUARE + 3 * MATRIX


def scan(model):
    for parts in states_of(Decoder.of(model), [[batch()] * 2]):
        assert all(part.states.shape == (5, 3, WIDTH) for part in parts)


def evaluate(model):
    assert evaluate_loss(model, WORDS, TEXTS, batch_size=2, progress=False).vocab_size == 32000


def race(model):
    trials = Trials(Layerwise(model), LossJudge(judged_batches(WORDS, TEXTS, Tokens(16, 2))))
    trials.judge_together([[1], [2], []])
    assert all(trials.scores(dropped).complete for dropped in ([1], [2], []))


def patch(model):
    layerwise, batches = Layerwise(model), judged_batches(WORDS, TEXTS, Tokens(16, 2))
    trials, quick = Trials(layerwise, LossJudge(batches)), QuickPatch(layerwise, batches)
    assert len(PatchedTrials(trials, quick).scores([2], 2)) > 2


def runs_and_copies(work):
    """What a streamed model does: a layer's index for each run of it alone, and copies between."""
    model = STAGE.model()
    with pytest.MonkeyPatch.context() as change, STAGE.open(_scale=A_PLAIN_SUM) as stage:
        log, plain = stage.timeline.log, Layerwise.run

        def run(self, batch, states, layers, **options):
            log.append(layers[0] if len(layers) == 1 else None)
            return plain(self, batch, states, layers, **options)

        change.setattr(Layerwise, "run", run)
        work(model)
        assert stage.timeline.peaks[MATRIX] <= 3 * 3  # of three layers
    return [one for one in log if not isinstance(one, Copy) or one.num_bytes >= LEAST]


def by_layer(log):
    """Runs of a layer one after the other: its index, the copies before them, those between."""
    groups, copies = [], []
    for one in log:
        if isinstance(one, Copy):
            copies.append(one)
            continue
        if groups and groups[-1][0] == one:
            groups[-1][2].extend(copies)
        else:
            groups.append((one, copies, []))
        copies = []
    return groups


def check(work):
    """Run some work; raises AssertionError where it is not overlapped with the copies for it."""
    groups = by_layer(runs_and_copies(work))
    assert {layer for layer, *_ in groups} >= {0, 1, 3}
    for (layer, before, between), (following, later, _) in pairwise(groups):
        if layer is None:  # all layers of a small batch at once
            continue
        coming = [one for one in (*before, *between) if one.to_device and not one.blocks]
        weights = [one for one in coming if one.num_bytes in SIZES]
        assert not any(one.stream.startswith("computing") for one in coming)
        if following is not None and following > layer:
            assert sum(one.num_bytes for one in weights) == LAYER
            assert not any(one.blocks and one.num_bytes == SQUARE for one in later)
        else:
            assert weights == []
        if work in (scan, evaluate):
            assert not any(one.blocks for one in between)


@pytest.mark.parametrize("work", mostly_slow([scan, evaluate, race, patch], [scan]))
def test_each_layer_comes_while_the_one_before_computes(work):
    check(work)


def test_two_layers_and_their_states_are_planned_for():
    asked = []

    def plan(_config, _dtype, forward, *, room, **_options):
        asked.append((room, forward))
        return SimpleNamespace(micro_batch=4)

    decoders = Decoder.of(STAGE.model()), Decoder.of(Stage(1).model())
    with pytest.MonkeyPatch.context() as change:
        change.setattr(planning, "available_bytes", lambda _device: 10 * LAYER)
        change.setattr(planning, "plan_forward", plan)
        for decoder in decoders:
            assert fitting(decoder, Tokens(128), FORWARD) == Tokens(128, 4)
    (room, forward), (whole, plain) = asked
    assert (room, whole) == (Room(8 * LAYER, True), Room(10 * LAYER, True))
    states = 128 * WIDTH * 2
    assert [one.beside(decoders[0], 128) for one in (forward, plain)] == [3 * states, 0]
