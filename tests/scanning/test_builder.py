"""Scans of several samples a sequence: means of samples, errors of sequences."""

from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shallower as sh
from shallower import (
    Positions,
    RejectedSamplesWarning,
    Scan,
    ScanError,
    StatesError,
    analyse_states,
)
from shallower.scanning.builder import ScanBuilder
from tests import reference
from tests.conftest import tiny_llama
from tests.scanning.samples import exact_sums

METRICS = ("angular", "cosine", "relative_l2", "norm_ratio")


def states_in(sequences, num_states=5, width=6, seed=0):
    """Random states that have something in common within a sequence."""
    rng = np.random.default_rng(seed)
    common = {number: rng.standard_normal((num_states, width)) for number in set(sequences)}
    noise = 0.5 * rng.standard_normal((len(sequences), num_states, width))
    return np.stack([common[number] for number in sequences]) + noise


def numbers_of(lengths):
    return np.repeat(np.arange(len(lengths))[::-1] - 3, lengths)


lengths = st.lists(st.integers(1, 6), min_size=2, max_size=8)


def values(scan):
    """The bytes of all that a scan gives."""
    arrays = [f(m) for m in scan.metrics for f in (scan.mean, scan.variance, scan.stderr)]
    kept = [scan.samples(m) for m in scan.metrics] if scan.keeps_samples else []
    counts = scan.num_samples, scan.num_sequences, scan.num_rejected
    return [array.tobytes() for array in (*arrays, *kept, scan.norms())], counts


@given(lengths, st.integers(0, 2**32))
def test_equals_the_slow_twin(lengths, seed):
    numbers = numbers_of(lengths)
    states = states_in(numbers, seed=seed)
    scan = analyse_states(states, METRICS, sequences=numbers)
    assert (scan.num_samples, scan.num_sequences) == (sum(lengths), len(lengths))
    for metric in METRICS:
        mean, stderr = reference.clustered(states, metric, numbers)
        np.testing.assert_allclose(scan.mean(metric), mean, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(scan.stderr(metric), stderr, rtol=1e-6, atol=1e-8)


def units(states, metric="angular"):
    """The exact value of every sample, (S, pairs) fractions of 2**-48."""
    found = []
    for sample in states:
        sums = exact_sums(analyse_states(sample[None], (metric,)), metric)
        found.append([Fraction(value, 2**48) for value in sums])
    return found


@given(lengths, st.sampled_from([1.0, 1e-3, 1e-6]), st.integers(0, 2**32))
def test_no_digit_of_the_variance_is_lost(lengths, spread, seed):
    numbers = numbers_of(lengths)
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((1, 4, 6))
    states = base + spread * rng.standard_normal((len(numbers), 4, 6))
    for metric in ("angular", "cosine"):
        variance = analyse_states(states, (metric,), sequences=numbers).variance(metric)
        exact = np.array(units(states, metric))
        for pair, (first, second) in enumerate(zip(*np.triu_indices(4, 1), strict=True)):
            expected = reference.exact_variance(exact[:, pair].tolist(), numbers.tolist())
            got = Fraction(float(variance[first, second]))
            assert abs(got - expected) <= expected * Fraction(2) ** -50
            assert variance[second, first] == variance[first, second]


@pytest.mark.filterwarnings("ignore::shallower.RejectedSamplesWarning")
@given(lengths, st.data())
def test_cuts_and_threads_do_not_matter(lengths, data):
    numbers = numbers_of(lengths)
    states = states_in(numbers)
    if data.draw(st.booleans(), label="one without a direction"):
        states[data.draw(st.integers(0, len(states) - 1)), 2] = 0
    builder = ScanBuilder(5, METRICS, threads=data.draw(st.integers(1, 3)), keep_samples=True)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(states)), max_size=6)))
    for start, stop in zip([0, *cuts], [*cuts, len(states)], strict=True):
        builder.add(states[start:stop], range(start, stop), sequences=numbers[start:stop])
    whole = ScanBuilder(5, METRICS, threads=1, keep_samples=True)
    by_state = np.ascontiguousarray(states.transpose(1, 0, 2))
    whole.add(by_state, range(len(states)), state_first=True, sequences=numbers)
    one, other = builder.finish(), whole.finish()
    assert values(one) == values(other)
    assert one.rejections == other.rejections


@given(lengths, st.data())
def test_shards_in_any_order_give_the_same(lengths, data):
    numbers = numbers_of(lengths)
    states = states_in(numbers)
    shard = {n: data.draw(st.integers(0, 2)) for n in set(numbers.tolist())}
    of_sample = np.array([shard[n] for n in numbers.tolist()])
    parts = [
        analyse_states(states[of_sample == s], METRICS, sequences=numbers[of_sample == s])
        for s in sorted(set(shard.values()))
    ]
    merged = Scan.merge(data.draw(st.permutations(parts)))
    assert values(merged) == values(analyse_states(states, METRICS, sequences=numbers))


def test_samples_alone_are_the_plain_scan():
    states = states_in(range(40))
    plain = analyse_states(states, METRICS)
    clustered = analyse_states(states, METRICS, sequences=np.arange(40)[::-1])
    assert values(plain) == values(clustered)
    with TemporaryDirectory() as folder:
        files = Path(folder) / "plain", Path(folder) / "clustered"
        plain.save(files[0])
        clustered.save(files[1])
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_sequence_longer_than_a_chunk(monkeypatch):
    numbers = numbers_of([1, 30, 2, 7])
    states = states_in(numbers)
    whole = analyse_states(states, METRICS, sequences=numbers, keep_samples=True)
    monkeypatch.setattr("shallower.scanning.analyse.CHUNK_BYTES", 4 * states[0].nbytes)
    cut = analyse_states(states, METRICS, sequences=numbers, keep_samples=True)
    assert values(cut) == values(whole)
    assert cut.samples().shape == (4, 10)
    angular = [reference.angular(sample)[np.triu_indices(5, 1)] for sample in states]
    np.testing.assert_allclose(cut.samples()[1], np.sum(angular[1:31], axis=0), rtol=1e-6)


def test_a_resampling_draws_sequences():
    numbers = numbers_of([3, 1, 5, 2, 4, 4, 2, 6])
    states = states_in(numbers, num_states=7)
    scan = analyse_states(states, sequences=numbers, keep_samples=True)
    found = scan.bootstrap(200, 3)
    expected = reference.bootstrap(scan.samples(), 200, 3, similarity=False)
    for n, wins in enumerate(expected, 1):
        assert (found[n].distribution * 200).round().tolist() == wins.tolist()


@pytest.mark.parametrize("name", ["stderr", "bootstrap"])
def test_the_error_is_that_of_sequences(name):
    """Of sequences of one and of many alike tokens, the spread of the means of many drawings."""
    rng = np.random.default_rng(11)
    means, errors, naive, resampled = [], [], [], []
    for _ in range(300):
        lengths = rng.integers(1, 12, 40)
        angles = np.repeat(rng.uniform(0.5, 1.5, 40) + 0.04 * lengths, lengths)
        angles += 0.1 * rng.standard_normal(len(angles))
        states = np.stack([np.stack([np.ones_like(angles), 0 * angles], 1),
                           np.stack([np.cos(angles), np.sin(angles)], 1)], 1)  # fmt: skip
        numbers = np.repeat(np.arange(40), lengths)
        scan = analyse_states(states, threads=1, sequences=numbers, keep_samples=True)
        means.append(scan.mean()[0, 1])
        errors.append(scan.stderr()[0, 1])
        naive.append(analyse_states(states, threads=1).stderr()[0, 1])
        drawn = rng.integers(0, 40, (200, 40))
        sums = scan.samples()[:, 0].astype(np.float64)
        resampled.append((sums[drawn].sum(1) / lengths[drawn].sum(1)).std())
    # 300 drawings tell a standard deviation to 4 %; the seed is fixed.
    expected = np.std(means)
    found = errors if name == "stderr" else resampled
    assert abs(np.sqrt(np.mean(np.square(found))) / expected - 1) < 0.12
    assert np.mean(naive) < 0.6 * expected


def test_one_sequence_has_no_error():
    scan = analyse_states(states_in([4, 4, 4]), sequences=[4, 4, 4], keep_samples=True)
    assert np.isnan(scan.stderr()).all()
    with pytest.raises(ScanError, match="resampled"):
        scan.bootstrap()


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([0, 0], "an integer for each of 3 samples"),
        ([[0], [0], [1]], "an integer for each"),
        ([0.0, 1.0, 2.0], "an integer for each"),
        (["a", "b", "c"], "an integer for each"),
        ([True, False, True], "an integer for each"),
        ([1, 0, 1], "sequence 1 comes again at sample 2"),
        (np.array([0, 1, 2**63], np.uint64), "number them from 0"),
    ],
)
def test_numbers_that_name_no_sequences_are_refused(sequences, message):
    with pytest.raises(StatesError, match=message):
        analyse_states(states_in([0, 1, 2]), sequences=sequences)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint64, ">i8"])
def test_numbers_of_any_integer_type_are_taken(dtype):
    numbers = np.array([3, 3, 0, 1, 1, 1], dtype)
    assert analyse_states(states_in([3, 3, 0, 1, 1, 1]), sequences=numbers).num_sequences == 3


def test_a_sequence_too_long_is_refused():
    states = np.ones((2**20 + 1, 2, 1), np.float32)
    with pytest.raises(StatesError, match="sequence 7 has more than 1048576 samples"):
        analyse_states(states, sequences=np.full(len(states), 7))
    builder = ScanBuilder(2, ["angular"])
    builder.add(states[:-1], range(2**20), sequences=np.full(2**20, 7))
    with pytest.raises(StatesError, match="sequence 7"):
        builder.add(states[:1], [0], sequences=np.array([7]))


# Of a model's tokens
TEXTS = [" ".join(f"w{(7 * i + j) % 97}" for j in range(1 + i % 9)) for i in range(40)]


def scan_of(positions, seed=0, **options):
    _, words = options.pop("model"), options.pop("words")
    return sh.scan(_, words, TEXTS, positions=positions, seed=seed, progress=False, **options)


@pytest.mark.parametrize("name", ["last", "last:3", "random:3", "all"])
def test_batches_do_not_choose_the_tokens(words, name):
    model = tiny_llama(3)
    scans = [
        scan_of(name, 5, model=model, words=words, batch_size=size, keep_samples=True)
        for size in (1, 7, 64)
    ]
    tokens = [1 + i % 9 for i in range(40)]
    positions = Positions.parse(name, 5)
    expected = sum(tokens) if name == "all" else sum(min(positions.count, n) for n in tokens)
    for scan in scans:
        assert scan.positions == positions
        assert (scan.num_samples, scan.num_sequences) == (expected, 40)
        np.testing.assert_allclose(scan.mean(), scans[0].mean(), atol=1e-6)
        np.testing.assert_allclose(scan.stderr(), scans[0].stderr(), atol=1e-6)
        assert scan.samples().shape == (40, 6)
    if name == "last":
        plain = sh.scan(model, words, TEXTS, batch_size=7, progress=False, keep_samples=True)
        assert values(scans[1]) == values(plain)


def test_saved_and_merged_scans_know_their_positions(words, tmp_path):
    model = tiny_llama(3)
    scan = scan_of("random:2", 9, model=model, words=words, keep_samples=True)
    scan.save(tmp_path / "scan")
    loaded = Scan.load(tmp_path / "scan")
    assert loaded.positions == Positions.parse("random:2", 9)
    assert values(loaded) == values(scan)
    assert loaded.plan(1).positions == scan.positions
    loaded.plan(1).save(tmp_path / "plan")
    assert sh.Plan.load(tmp_path / "plan") == loaded.plan(1)
    assert Scan.merge([loaded, scan]).num_sequences == 80
    other = scan_of("random:2", 8, model=model, words=words)
    with pytest.raises(ScanError, match="random:2, seed 9 and random:2, seed 8"):
        Scan.merge([scan, other])


def test_a_rejected_token_is_named_and_the_rest_of_its_text_stays(words):
    model = tiny_llama(3)
    with_nan = next(i for i, text in enumerate(TEXTS) if "w50" in text.split())
    token = TEXTS[with_nan].split().index("w50")
    hook = model.model.layers[2].register_forward_hook(_spoil(model, 50))
    with pytest.warns(RejectedSamplesWarning):
        scan = scan_of("all", model=model, words=words, batch_size=1)
    hook.remove()
    first = scan.rejections[0]
    assert (first.sample, first.reason) == (
        with_nan,
        f"state 3 of compared token {token} holds NaN or infinity",
    )
    tokens = [word for text in TEXTS for word in text.split()]
    assert scan.num_rejected == tokens.count("w50") > 0
    assert scan.num_samples == len(tokens) - scan.num_rejected
    assert scan.num_sequences == len(TEXTS)


def _spoil(model, token):
    """A hook that makes the states of one token NaN, for the last layer: no other sees them."""
    seen = {}
    model.model.embed_tokens.register_forward_hook(
        lambda _module, args, _out: seen.update(ids=args[0])
    )

    def hook(_module, _args, output):
        states = output[0] if isinstance(output, tuple) else output
        states = states.clone()
        states[seen["ids"] == token] = float("nan")
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return hook
