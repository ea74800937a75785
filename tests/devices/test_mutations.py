"""Take any move to a device out of the package, and a rehearsal fails for it.

Which rehearsals reach a function is seen by running them once; those are run again with each move
of that function taken out, one after the other.
"""

import functools
import inspect
import itertools
import time

import pytest
from _pytest.mark import ParameterSet

from shallower.errors import ModelError
from tests.devices import (
    test_criteria,
    test_cutting,
    test_evaluation,
    test_healing,
    test_judging,
    test_merging,
    test_models,
    test_patching,
    test_scanning,
    test_streaming,
    test_tasks,
)
from tests.devices.conftest import STAGES
from tests.devices.mutations import moves, noting, without
from tests.devices.stage import is_about_devices

pytestmark = pytest.mark.slow

ROOMS = (
    test_scanning, test_models, test_cutting, test_evaluation, test_patching, test_healing,
    test_judging, test_merging, test_criteria, test_tasks, test_streaming,
)  # fmt: skip

_ROOM = "it only takes room on the device"
_LAYER = "both are of one layer, and so on one device"
_HEAD = "the head of another device is another one"
_INDEX = "an index may lie on the CPU"
_HOST = "no CUDA device gets here"
_MOVED = "generate moves tokens"
HARMLESS = {
    "cutting/saving.py: lend_layers: layer.to('cpu')": _ROOM,
    "cutting/saving.py: logits_difference: expected.to(device)": "accelerate brings logits back",
    "evaluation/answers.py: generated: torch.from_numpy(ids).to(decoder.device)": _MOVED,
    "evaluation/speech.py: Reference.of: one.states(head).cpu()": _ROOM,
    "evaluation/speech.py: _probe: "
    "next(head.logits_from(spans.kept[:_PROBED].to(head.decoder.device))).float().cpu()": _HEAD,
    "evaluation/task_model.py: TaskModel._predicted: "
    "torch.from_numpy(rows[here] - start).to(logits.device)": _INDEX,
    "memory/prefix_cache.py: Prefixes._settled: states.cpu()": _ROOM,
    "memory/streaming.py: _Travelling.__setitem__: states.cpu()": _HOST,
    "patching/quick.py: QuickPatch.run_cut: "
    "self._model.run(batch, states[index], (layer,)).cpu()": _ROOM,
    "experts/hooks.py: _Layer.check_stream: states.to(wanted.device)": _LAYER,
    "patching/checkpoint.py: Changes.add: writer.weight.to(delta.device)": _LAYER,
    "patching/descent.py: Descent._entered: self._model.run(batch, states, (layer,)).cpu()": _ROOM,
    "patching/descent.py: MovingMatrix.__init__: stored_weight(module, name).detach().cpu()": _ROOM,
    "patching/least_squares.py: NormalEquations._add_kept: r.to(gram)": _LAYER,
    "patching/least_squares.py: NormalEquations._add_kept: x.to(gram)": _LAYER,
    "patching/solver.py: Solver._best_fit: "
    "feed_forward.weight.to(equations.gram.device, copy=True)": _LAYER,
    "models/head.py: Head.logits_of: part.to(outputs.logits.device)": _INDEX,
    "models/head.py: Head.logits_of: part.to(states.device)": _INDEX,
    "models/head.py: Head.states_at: torch.from_numpy(tokens).to(states.device)": _INDEX,
    "models/residual_writers.py: _scale: probe.to(output)": _LAYER,
    "models/transfers.py: HostCopies.send: tensor.to(device)": _HOST,
    "models/transfers.py: HostCopies.start: gathered[0].rows.cpu()": _HOST,
}
"""Moves that no rehearsal misses, and why."""

ASKING = {"_products_are_deterministic", "this_machine", "_fill"}
"""Functions that ask CUDA itself, or time it or what runs there, and need a card."""

MOVES = [move for move in moves() if move.function not in ASKING]


def cases(function):
    """What a test is called with, stages apart: all its parameters, as pytest would set them."""
    marks = [m for m in getattr(function, "pytestmark", ()) if m.name == "parametrize"]
    sets = []
    for mark in marks:
        names, values, *_ = mark.args
        names = names.split(", ") if isinstance(names, str) else names
        values = [ParameterSet.extract_from(v, force_tuple=len(names) == 1).values for v in values]
        sets.append([dict(zip(names, some, strict=True)) for some in values])
    for chosen in itertools.product(*sets):
        yield {name: value for one in chosen for name, value in one.items()}


def rehearsals():
    """Every rehearsal as calls without arguments, one for each stage."""
    for room in ROOMS:
        for name, function in inspect.getmembers(room, inspect.isfunction):
            if not name.startswith("test_") or function.__module__ != room.__name__:
                continue
            for case in cases(function):
                if "stage" in inspect.signature(function).parameters:
                    given = [{**case, "stage": stage} for stage in STAGES.values()]
                else:
                    given = [case]
                yield [functools.partial(function, **one) for one in given]


@pytest.fixture(scope="module")
def reaching():
    """The rehearsals that run each function with a move, the quickest first."""
    found = {}
    with noting(MOVES) as ran:
        for calls in rehearsals():
            ran.clear()
            start = time.perf_counter()
            calls[0]()
            taken = time.perf_counter() - start
            for function in ran:
                found.setdefault(function, []).append((taken, calls))
    return {
        function: [call for _, calls in sorted(timed, key=lambda one: one[0]) for call in calls]
        for function, timed in found.items()
    }


@pytest.mark.parametrize("move", MOVES, ids=str)
def test_a_move_that_is_taken_out_is_missed(move, reaching):
    calls = reaching.get((move.file, move.function), [])
    assert calls, "no rehearsal runs this"
    missed, harmless = False, str(move) in HARMLESS
    with without(move):
        for call in calls[:1] if harmless else calls:
            try:
                call()
            except AssertionError:  # who looks at the result
                missed = True
            except (ModelError, RuntimeError, TypeError) as error:
                if not is_about_devices(error.__cause__ or error):
                    raise
                missed = True
            if missed:
                break
    assert missed != harmless


def test_what_is_harmless_is_there():
    assert set(HARMLESS) <= {str(move) for move in MOVES}
