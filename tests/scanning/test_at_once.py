"""Threads of Python that scan at once, with a global lock of the interpreter or without one."""

import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import shallower as sh
from shallower._core import Accumulator, Sums, Threads
from shallower.scanning.builder import ScanBuilder

THREADS = 6
METRICS = ["angular", "cosine"]


def states(seed):
    return np.random.default_rng(seed).standard_normal((40, 6, 64)).cumsum(axis=1)


def at_once(work):
    """What each of several threads makes of its number, all of them beginning together."""
    barrier = threading.Barrier(THREADS)

    def begin(number):
        barrier.wait(timeout=60)
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def built(number):
    builder = ScanBuilder(6, METRICS, threads=2, cka_batch=8)
    for start in range(0, 40, 8):
        builder.add(states(number)[start : start + 8], range(start, start + 8))
    scan = builder.finish()
    return scan.mean("angular").tobytes(), scan.variance("cosine").tobytes(), scan.cka.tobytes()


def test_builders_of_their_own_get_the_bits_of_one_alone():
    assert at_once(built) == [built(number) for number in range(THREADS)]


def test_the_same_threads_serve_several_sums():
    threads = Threads(2)

    def added(number):
        accumulator = Accumulator(6, METRICS)
        for start in range(0, 40, 8):
            accumulator.update(states(number)[start : start + 8], threads)
        return accumulator.sums().to_bytes()

    assert at_once(added) == [added(number) for number in range(THREADS)]


def test_a_scan_is_read_by_all():
    scan = sh.analyse_states(states(0), keep_samples=True, cka_batch=8)

    def read(_):
        plan = scan.plan(2)
        drawn = scan.bootstrap(50, threads=1)
        return str(plan), scan.mean("angular").tobytes(), str(drawn)

    alone = read(0)
    assert at_once(read) == [alone] * THREADS


def test_sums_that_are_merged_into_one_are_whole_or_refused():
    """Who merges holds the sums alone; another one gets an error, and not half of them."""
    total = Sums(6, METRICS)
    accumulator = Accumulator(6, METRICS)
    accumulator.update(states(0), Threads(1))
    part = accumulator.sums()

    def merged(_):
        done = 0
        for _ in range(50):
            try:
                total.merge(part)
            except RuntimeError as error:
                assert "borrowed" in str(error)  # noqa: PT017
            else:
                done += 1
        return done

    assert total.count == 0
    done = sum(at_once(merged))
    assert done
    assert total.count == 40 * done


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python is built with a lock"
)
def test_the_core_leaves_the_global_lock_off():
    assert not sys._is_gil_enabled()
