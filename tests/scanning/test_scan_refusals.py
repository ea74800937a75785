"""Samples that cannot be compared, and input without states."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

from shallower import (
    MetricError,
    RejectedSamplesWarning,
    Rejection,
    StatesError,
    analyse_states,
)
from tests import reference
from tests.scanning.samples import BOTH, DTYPES, bits, random_states, rounded


# Samples that cannot be compared
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (np.nan, "holds NaN or infinity"), (np.inf, "holds NaN or infinity"),
        (-np.inf, "holds NaN or infinity"), (0.0, "is a zero vector"), (-0.0, "is a zero vector"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("state", [0, 2, 4])
def test_a_bad_sample_is_named_and_enters_no_sum(dtype, bad, reason, state):
    values = random_states((7, 5, 600), 8)
    values[3, state] = bad
    states, _ = rounded(values, dtype)
    good, _ = rounded(np.delete(values, 3, axis=0), dtype)
    with pytest.warns(RejectedSamplesWarning, match="1 of 7") as warned:
        scan = analyse_states(states, BOTH)
    assert warned[0].filename == __file__
    assert scan.rejections == (Rejection(3, f"state {state} {reason}"),)
    assert (scan.num_samples, scan.num_rejected) == (6, 1)
    assert bits(scan) == bits(analyse_states(good, BOTH))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("channel", [0, 511, 512, 599])
def test_one_bad_channel_is_enough(bad, channel):
    states = random_states((3, 4, 600), 8)
    states[1, 2, channel] = bad
    with pytest.warns(RejectedSamplesWarning):
        scan = analyse_states(states)
    assert scan.rejections == (Rejection(1, "state 2 holds NaN or infinity"),)


@pytest.mark.parametrize("scale", [1e-80, 1e-200, 1e80, 1e200])
def test_a_norm_beyond_double_precision_is_rejected(scale):
    states = random_states((3, 4, 8), 8)
    states[1, 2] *= scale
    with pytest.warns(RejectedSamplesWarning, match="norm"):
        scan = analyse_states(states)
    assert [rejection.sample for rejection in scan.rejections] == [1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_smallest_and_the_largest_numbers_are_compared(dtype):
    info = torch.finfo(getattr(torch, dtype))
    signs = np.where(random_states((2, 3, 8), 9) > 0, 1.0, -1.0)
    for scale in (info.smallest_normal, info.tiny / 4, info.max):
        states, exact = rounded(signs * scale, dtype)
        expected, _ = reference.mean_and_stderr(exact, "angular")
        np.testing.assert_allclose(analyse_states(states).mean(), expected, rtol=0, atol=1e-7)


def test_the_first_bad_state_of_every_bad_sample_is_named_in_order():
    states = random_states((60, 6, 8), 8)
    states[10, 4], states[10, 2] = np.nan, 0
    states[5, 1], states[59, 5] = 0, np.inf
    with pytest.warns(RejectedSamplesWarning, match="3 of 60"):
        scan = analyse_states(states, threads=4)
    assert [str(rejection) for rejection in scan.rejections] == [
        "sample 5: state 1 is a zero vector",
        "sample 10: state 2 is a zero vector",
        "sample 59: state 5 holds NaN or infinity",
    ]


def test_many_bad_samples_are_counted_and_the_first_hundred_named():
    states = random_states((300, 3, 4), 8)
    states[::2, 1] = 0
    with pytest.warns(RejectedSamplesWarning, match="150 of 300"):
        scan = analyse_states(states)
    assert (scan.num_samples, scan.num_rejected) == (150, 150)
    assert [rejection.sample for rejection in scan.rejections] == list(range(0, 200, 2))


@pytest.mark.parametrize("threads", [1, 4])
def test_samples_that_are_all_bad_are_an_error(threads):
    states = random_states((9, 3, 4), 8)
    states[:, 1, 2] = np.nan
    with pytest.raises(StatesError, match=r"9 of 9 .*sample 0: state 1 holds NaN"):
        analyse_states(states, threads=threads)


# Input that is no states
@pytest.mark.parametrize(
    "shape",
    [
        (), (4,), (3, 4), (2, 3, 4, 5), (0, 3, 4), (0, 0, 0), (3, 0, 4), (3, 1, 4), (3, 4, 0),
        (0, 1, 4), (0, 10**9, 4), (0, 2**33, 1),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("make", [np.ones, torch.ones])
def test_states_of_another_shape_are_refused(shape, make):
    with pytest.raises(StatesError):
        analyse_states(make(shape))


@pytest.mark.parametrize(
    "dtype",
    [
        "int64", "int32", "int16", "int8", "uint8", "uint32", "uint64", "bool", "complex64",
        "complex128", "longdouble", "object", "U3", "S3", "V4", "M8[s]", ">f4", ">f8", ">f2",
        ">u2", [("x", "f4")],
    ],
    ids=str,
)  # fmt: skip
def test_arrays_of_another_dtype_are_refused(dtype):
    with pytest.raises(StatesError, match="dtype"):
        analyse_states(np.zeros((2, 3, 4), dtype))
    with pytest.raises(StatesError, match="dtype"):
        analyse_states(np.zeros((2, 3, 8), dtype)[..., ::2])


@pytest.mark.parametrize(
    "dtype",
    ["int64", "int16", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"],
)
def test_tensors_of_another_dtype_are_refused(dtype):
    with pytest.raises(StatesError):
        analyse_states(torch.ones(2, 3, 4).to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 3, 4, device="meta"),
        torch.ones(2, 3, 4).to_sparse(),
        torch.ones(2, 3, 4, dtype=torch.complex64).conj(),
    ],
    ids=["meta", "sparse", "conjugate"],
)
def test_tensors_that_hold_no_plain_numbers_are_refused(tensor):
    with pytest.raises(StatesError):
        analyse_states(tensor)


@pytest.mark.parametrize(
    "states",
    [None, [[[1.0, 2.0]]], 5, b"states", np.float32(1), iter([]), torch.Size([2, 3, 4])],
    ids=lambda states: type(states).__name__,
)
def test_what_is_no_array_is_refused(states):
    with pytest.raises(StatesError, match=r"NumPy array or a torch tensor"):
        analyse_states(states)


@pytest.mark.parametrize(
    "metrics", [(), [], ["euclidean"], ["Angular"], [""], ["angular", "angular"], "angular", ""]
)
def test_metrics_that_are_none_unknown_or_twice_are_refused(metrics):
    with pytest.raises(MetricError):
        analyse_states(random_states((2, 3, 4), 0), metrics)


def test_more_states_than_memory_holds_are_an_error_and_no_crash():
    code = (
        "import numpy, shallower\n"
        "try: shallower.analyse_states(numpy.ones((1, 300_000, 1)))\n"
        "except (shallower.StatesError, MemoryError): print('refused')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )
    assert done.stdout.strip() == "refused", done.stderr[-500:]
