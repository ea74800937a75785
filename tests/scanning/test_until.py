"""A scan that stops when it is sure of its best blocks."""

from dataclasses import replace

import numpy as np
import pytest

import shallower as sh
from shallower import Scan, ScanError, SettingsError, Until
from shallower.models.offload import reading_of
from shallower.scanning.scan_file import scan_bytes
from tests import reference
from tests.conftest import mostly_slow, tiny_llama
from tests.documents import broken_after, documents

TEXTS = documents(176)
SURE = Until(0.9, 0.005, (1, 2, 4))


def bytes_of(scanned):
    return scan_bytes(scanned.contents)


@pytest.fixture(autouse=True, scope="module")
def judged():
    """Judge every 16 texts: so few are not worth a text of their own in other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shallower.scanning.model.JUDGED", 16)
        yield


@pytest.fixture(scope="module")
def model():
    """A model with two blocks that are nearly alike."""
    return tiny_llama(seed=2)


@pytest.fixture(scope="module")
def scan(model, words):
    """Scan the model."""
    return lambda texts=TEXTS, batch_size=8, **options: sh.scan(
        model, words, texts, batch_size=batch_size, **options
    )


@pytest.fixture(scope="module")
def stopped(scan, judged):
    done = scan(until=SURE)
    assert 64 <= done.num_samples < len(TEXTS)
    assert done.settled.all
    return done


@pytest.mark.parametrize("keep_samples", mostly_slow([False, True], [True]))
def test_it_is_the_scan_of_the_texts_so_far(scan, stopped, tmp_path, keep_samples):
    options = {"batch_size": 1, "keep_samples": keep_samples}  # batches of several are others
    done = scan(until=SURE, **options)
    plain = scan(TEXTS[: stopped.num_samples], **options)
    assert bytes_of(done) == bytes_of(plain)
    done.save(tmp_path / "done")
    assert plain.settled is None is Scan.load(tmp_path / "done").settled


def test_it_says_when_each_size_was_settled(stopped):
    by_size = stopped.settled.by_size
    assert list(by_size) == [1, 2, 4]
    assert max(by_size.values()) == stopped.num_samples > min(by_size.values()) >= 64
    assert {count % 16 for count in by_size.values()} == {0}
    assert str(stopped.settled).startswith("sure by 0.9 within 0.005: n = 1 after ")


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_texts_are_judged_as_often_whatever_the_batch(scan, stopped, batch_size):
    assert scan(until=SURE, batch_size=batch_size).settled == stopped.settled


def test_no_text_behind_the_stop_is_read(scan, stopped):
    texts = broken_after(TEXTS, stopped.num_samples)
    assert scan(texts, until=SURE).settled == stopped.settled


def test_what_stays_open_takes_all_texts(scan):
    done = scan(until=replace(SURE, tolerance=0.0), batch_size=1)
    assert None in done.settled.texts
    assert "open: n = " in str(done.settled)
    assert bytes_of(done) == bytes_of(scan(batch_size=1))


def test_bets_take_more_texts(scan, stopped):
    within = replace(SURE, tolerance=0.05)
    bets = scan(until=replace(within, exact=True))
    assert scan(until=within).num_samples < bets.num_samples < stopped.num_samples


def test_by_default_the_sizes_are_those_that_the_model_has(scan):
    assert list(scan(until=Until(0.9, 0.5)).settled.by_size) == [1, 2, 4]


@pytest.mark.parametrize("positions", ["last:2", "random:3", "all"])
def test_a_text_of_several_tokens_is_one_observation(scan, positions):
    done = scan(until=SURE, positions=positions, keep_samples=True)
    means = done.samples().astype(float) / (done.num_samples / done.num_sequences)
    starts, stops = np.triu_indices(7, 1)
    for n, after in done.settled.by_size.items():
        sure = reference.is_settled(means[:, stops - starts == n], 0.1 / 3, tolerance=0.005)
        assert sure == (after is not None)


@pytest.mark.parametrize("metrics", [("cosine",), ("norm_ratio", "cosine", "angular")])
def test_the_metric_that_decides_is_judged(scan, metrics):
    assert scan(until=replace(SURE, tolerance=0.3), metrics=metrics).settled.all


# An interrupted scan.
def interrupted(scan, path, count, monkeypatch, until=SURE):
    with monkeypatch.context() as patch:
        patch.setattr("shallower.scanning.model.SECONDS_BETWEEN_CHECKPOINTS", -1)
        with pytest.raises(OSError, match="the disk went away"):
            scan(broken_after(TEXTS, count), checkpoint=path, until=until)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.slow
def test_a_resumed_scan_stops_at_the_same_text(scan, tmp_path, monkeypatch, exact):
    until = replace(SURE, exact=exact, tolerance=0.05 if exact else SURE.tolerance)
    whole = scan(until=until)
    for count in (16, 64, 80):
        path = tmp_path / str(count)
        interrupted(scan, path, count, monkeypatch, until)
        for _ in range(2):  # the second time it is done, and reads no text behind
            texts = broken_after(TEXTS, whole.num_samples)
            resumed = scan(texts, checkpoint=path, until=until)
            assert resumed.settled == whole.settled
            assert bytes_of(resumed) == bytes_of(whole)


def test_a_scan_that_stops_otherwise_is_not_gone_on_with(scan, tmp_path, monkeypatch):
    interrupted(scan, tmp_path / "partial", 32, monkeypatch)
    others = [{"until": replace(SURE, confidence=0.95)}, {"keep_samples": True}, {}]
    for other in others:
        with pytest.raises(ScanError, match=r"partial: it .*; delete it to start anew"):
            scan(checkpoint=tmp_path / "partial", **other)
    scan(TEXTS[:32], checkpoint=tmp_path / "plain")
    with pytest.raises(ScanError, match=r"goes on to the last text, not sure by 0\.9 within"):
        scan(checkpoint=tmp_path / "plain", until=SURE)


def test_a_streamed_scan_stops_at_the_same_text(model, words, tmp_path):
    sh.save_model(model, words, tmp_path / "model")
    streamed, tokenizer = sh.load_model(tmp_path / "model", dtype="float32", device_map="stream")
    done = sh.scan(streamed, tokenizer, TEXTS, batch_size=4, until=SURE)
    whole, _ = sh.load_model(tmp_path / "model", dtype="float32", progress=False)
    plain = sh.scan(whole, words, TEXTS, batch_size=4, until=SURE)
    assert done.settled == plain.settled
    assert bytes_of(done) == bytes_of(plain)
    assert reading_of(streamed).passes == done.num_samples // 16


# Refusals.
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"confidence": 1.0, "tolerance": 0.0}, "until = 1.0, which no number of texts reaches"),
        ({"confidence": 0.0}, "until = 0.0: expected a probability between 0 and 1"),
        ({"confidence": float("nan")}, "until = nan: expected"),
        ({"tolerance": -0.1}, "tolerance = -0.1: expected a distance from 0 on"),
        ({"tolerance": 1.0}, "tolerance = 1.0: expected"),
    ],
)
def test_what_is_out_of_range_is_refused(wrong, said):
    with pytest.raises(SettingsError, match=said):
        Until(**{"confidence": 0.9, **wrong})


def test_what_cannot_be_judged_is_refused(scan):
    with pytest.raises(sh.LayersError, match="cannot drop n = 6 of 6 layers"):
        scan(until=Until(0.9, sizes=(1, 6)))
    for metrics in (("relative_l2", "cosine"), ("norm_ratio",)):
        with pytest.raises(sh.MetricError, match=rf"no scan by {metrics[0]} stops"):
            scan(until=SURE, metrics=metrics)
    with pytest.raises(sh.PositionsError, match=r"bets .* not on the positions last:2"):
        scan(until=replace(SURE, exact=True), positions="last:2")
