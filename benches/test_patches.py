"""The operators that `patches.py` compares, against their formulas, and a cut with one."""

import numpy as np
import torch

from patches import judged, linear
from peer_checks import START, STOP, check, tiny
from peer_operators import collect
from shallower.judgement.judges.loss import LossJudge
from shallower.models.layerwise import Layerwise


def test_operators():
    check()


def test_a_cut_with_an_operator():
    """Its losses are those of a forward in which hooks put it between the layers."""
    model, texts, batches = tiny()
    layerwise, layers = Layerwise(model), model.model.layers
    matrix = collect(layerwise, batches, START, STOP).ghosted()
    stays = [layer for layer in range(len(layers)) if not START <= layer < STOP]
    found = judged(layerwise, LossJudge(batches), stays, at=START - 1, operator=linear(matrix))
    small = matrix.float()
    hooks = [
        layers[START - 1].register_forward_hook(lambda _m, _a, out: (out.float() @ small).double())
    ]
    hooks += [
        layers[i].register_forward_hook(lambda _m, args, _out: args[0]) for i in range(START, STOP)
    ]
    expected = []
    for ids in texts:
        with torch.no_grad():
            odds = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1).numpy()
        expected.append(-sum(odds[place, token] for place, token in enumerate(ids[1:])))
    for hook in hooks:
        hook.remove()
    assert np.allclose(found.sums, expected, rtol=1e-5)
