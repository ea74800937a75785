"""States that a scan keeps: the same scan again, whole or not at all, and never twice."""

import json
import os
import random
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import shallower as sh
from shallower import OutputError, ScanError, StatesError, TextsError
from shallower.scanning import states_file
from shallower.scanning.hidden_states import stream
from shallower.scanning.states_writer import HEADER_BYTES, keep_states_in
from shallower.storage import partial_folder
from shallower.texts.batches import TokenBatches
from shallower.values.identity import ModelIdentity, TextsIdentity
from shallower.values.plan import Rejection
from shallower.values.tokens import Tokens
from tests.conftest import WORDS, tiny_llama

MODEL = ModelIdentity("model", "llama", 4, "bfloat16", "f" * 64)
ALL = ("angular", "cosine", "relative_l2", "norm_ratio")


def texts_so_far(count):
    return TextsIdentity(count, 256, f"{count:064x}")


def documents(count, seed=0):
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(3, 20))) for _ in range(count)]


def states_of(dtype, num_samples, num_states=5, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, num_states, width, generator=generator).to(dtype)


def saved(scan, path):
    scan.save(path)
    return path.read_bytes()


def left(folder):
    """The names of what lies in a folder, hidden too."""
    return {path.name for path in folder.iterdir()}


# The writer.
@contextmanager
def failing(path):
    """A run that fails when the body is done."""
    with pytest.raises(ZeroDivisionError), keep_states_in(path, MODEL) as writer:  # noqa: PT012
        yield writer
        raise ZeroDivisionError


@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    state_first=st.booleans(),
)
def test_every_bit_is_kept(tmp_path_factory, dtype, sizes, state_first):
    path = tmp_path_factory.mktemp("kept") / "states.safetensors"
    states = states_of(dtype, sum(sizes))
    numbers = np.random.default_rng(0).permutation(sum(sizes)) * 3
    with keep_states_in(path, MODEL) as writer:
        start = 0
        for size in sizes:
            part = states[start : start + size]
            batch = part.transpose(0, 1).contiguous() if state_first else part
            writer.add(batch, numbers[start : start + size], state_first=state_first)
            start += size
        writer.finish(texts_so_far(40), 2, [Rejection(3, "empty text")])
    kept = load_file(path)
    assert kept.keys() == {"hidden_states", "samples"}
    assert kept["hidden_states"].dtype == dtype
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(kept["hidden_states"].view(bits), states.view(bits))
    assert kept["samples"].tolist() == numbers.tolist()
    assert left(path.parent) == {path.name}
    assert path.stat().st_size == HEADER_BYTES + states.nbytes + 8 * len(states)
    with safe_open(path, framework="np") as file:
        (described,) = map(json.loads, file.metadata().values())
    assert described["model"]["fingerprint"] == MODEL.fingerprint
    assert described["num_rejected"] == 2


def test_a_body_that_fails_leaves_nothing(tmp_path):
    path = tmp_path / "states.safetensors"
    with failing(path) as writer:
        writer.add(states_of(torch.float32, 3), np.arange(3))
    assert left(tmp_path) == set()
    with pytest.raises(StatesError, match="no states"), keep_states_in(path, MODEL) as writer:
        writer.finish(texts_so_far(1), 1, [])
    assert left(tmp_path) == set()


def begun(path, marks, extra=0):
    """A run that wrote 4 states between marks, ``extra`` behind the last, and failed."""
    states = states_of(torch.float32, 4 * marks + extra)
    with failing(path) as writer:
        for mark in range(marks):
            part = slice(4 * mark, 4 * mark + 4)
            writer.add(states[part], np.arange(part.start, part.stop))
            writer.mark(texts_so_far(4 * mark + 4))
        if extra:
            writer.add(states[4 * marks :], np.arange(4 * marks, len(states)))
    return states


@pytest.mark.parametrize("mark", [1, 2, 3])
def test_a_run_goes_on_from_any_mark(tmp_path, mark):
    path = tmp_path / "states.safetensors"
    states = begun(path, 3, extra=2)
    assert left(tmp_path) == {".states.safetensors.partial"}
    more = states_of(torch.float32, 5, seed=1)
    with keep_states_in(path, MODEL) as writer:
        writer.resume(texts_so_far(4 * mark))
        writer.add(more, np.arange(100, 105))
        writer.finish(texts_so_far(40), 0, [])
    kept = load_file(path)
    assert torch.equal(kept["hidden_states"], torch.cat([states[: 4 * mark], more]))
    assert kept["samples"].tolist() == [*range(4 * mark), *range(100, 105)]
    assert left(tmp_path) == {path.name}


def test_a_mark_without_states_is_gone_on_from(tmp_path):
    path = tmp_path / "states.safetensors"
    with failing(path) as writer:
        writer.mark(texts_so_far(7))
    states = states_of(torch.bfloat16, 2)
    with keep_states_in(path, MODEL) as writer:
        writer.resume(texts_so_far(7))
        writer.add(states, np.arange(2))
        writer.finish(texts_so_far(9), 7, [])
    assert torch.equal(load_file(path)["hidden_states"], states)


def test_what_was_not_marked_is_not_gone_on_from(tmp_path):
    path = tmp_path / "states.safetensors"
    begun(path, 2)
    other = ModelIdentity("model", "llama", 4, "bfloat16", "0" * 64)
    for model, texts in (
        (MODEL, texts_so_far(5)),
        (MODEL, TextsIdentity(8, 255, f"{8:064x}")),
        (other, texts_so_far(8)),
        (None, texts_so_far(8)),
    ):
        with (
            pytest.raises(ScanError, match=r"not kept in .*\.states\.safetensors\.partial"),
            keep_states_in(path, model) as writer,
        ):
            writer.resume(texts)
    with failing(path) as writer:
        writer.resume(texts_so_far(8))  # nothing was thrown away


@pytest.mark.parametrize("name", ["states.safetensors", "samples"])
def test_a_partial_file_that_lacks_states_is_refused(tmp_path, name):
    path = tmp_path / "states.safetensors"
    begun(path, 2)
    partial = partial_folder(path) / "folder" / name
    os.truncate(partial, partial.stat().st_size - 1)
    with (
        pytest.raises(ScanError, match="fewer than its 8 states"),
        keep_states_in(path, MODEL) as writer,
    ):
        writer.resume(texts_so_far(8))
    with keep_states_in(path, MODEL) as writer:
        writer.resume(texts_so_far(4))
        writer.finish(texts_so_far(4), 0, [])
    assert len(load_file(path)["samples"]) == 4


def test_a_mark_that_was_cut_off_is_none(tmp_path):
    path = tmp_path / "states.safetensors"
    begun(path, 2)
    marks = partial_folder(path) / "folder" / "marks"
    os.truncate(marks, marks.stat().st_size - 5)
    with keep_states_in(path, MODEL) as writer:
        with pytest.raises(ScanError):
            writer.resume(texts_so_far(8))
        writer.resume(texts_so_far(4))
        writer.finish(texts_so_far(4), 0, [])


def test_a_run_that_begins_anew_forgets_the_marks(tmp_path):
    path = tmp_path / "states.safetensors"
    begun(path, 2)
    states = states_of(torch.float16, 3, seed=3)
    with keep_states_in(path, MODEL) as writer:
        writer.add(states, np.arange(3))
        writer.finish(texts_so_far(3), 0, [])
    assert torch.equal(load_file(path)["hidden_states"], states)


@pytest.mark.parametrize(
    "other", [states_of(torch.float16, 2), states_of(torch.float32, 2, 4), np.zeros((2, 5, 7))]
)
def test_states_of_another_kind_are_refused(tmp_path, other):
    path = tmp_path / "states.safetensors"
    with failing(path) as writer:
        writer.add(states_of(torch.float32, 2), np.arange(2))
        with pytest.raises(StatesError, match=r"cannot keep states .* those before are"):
            writer.add(other, np.arange(2))


def test_a_place_that_is_taken_is_refused(tmp_path):
    path = tmp_path / "states.safetensors"
    path.write_text("dear to someone")
    with pytest.raises(OutputError, match="exists already"), keep_states_in(path):
        pass
    for bad, message in (
        (tmp_path / "states.npy", "ends in .safetensors"),
        (tmp_path, "ends in .safetensors"),
        (path / "below.safetensors", "not a folder"),
    ):
        with pytest.raises(OutputError, match=message), keep_states_in(bad):
            pass
    assert left(tmp_path) == {"states.safetensors"}
    with keep_states_in(path, MODEL, overwrite=True) as writer:
        assert path.read_text() == "dear to someone"
        writer.add(states_of(torch.float32, 2), np.arange(2))
        writer.finish(texts_so_far(2), 0, [])
    assert len(load_file(path)["samples"]) == 2


def test_one_process_at_a_time_writes(tmp_path):
    path = tmp_path / "states.safetensors"
    refused = pytest.raises(OutputError, match="is writing it")
    with failing(path), refused, keep_states_in(path):
        pass


FULL = """
import resource, sys
import numpy as np
from shallower.values.identity import TextsIdentity
from shallower.errors import OutputError
from shallower.scanning.states_writer import keep_states_in

# A write beyond the limit fails as on a full disk.
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    with keep_states_in(sys.argv[1]) as writer:
        for number in range(10):
            writer.add(np.ones((10, 4, 1000), np.float32), np.arange(10))
            if sys.argv[2] == "marks":
                writer.mark(TextsIdentity(number, 1, ""))
        writer.finish(TextsIdentity(10, 1, ""), 0, [])
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize("marks", ["marks", "none"])
def test_a_full_disk_is_an_error_and_leaves_what_was_marked(tmp_path, marks):
    path = tmp_path / "states.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", FULL, path, marks], capture_output=True, text=True, check=True
    )
    assert "cannot write" in done.stdout
    assert "file too large" in done.stdout
    assert done.stderr == ""
    assert ("go on where it was" in done.stdout) == (marks == "marks")
    if marks == "none":
        assert left(tmp_path) == set()
        return
    assert left(tmp_path) == {".states.safetensors.partial"}
    with keep_states_in(path) as writer:
        writer.resume(TextsIdentity(0, 1, ""))
        writer.finish(TextsIdentity(1, 1, ""), 0, [])
    assert len(load_file(path)["samples"]) == 10


def test_a_name_too_long_for_the_header_is_refused(tmp_path):
    path = tmp_path / "states.safetensors"
    named = ModelIdentity("x" * HEADER_BYTES, "llama", 4, "bfloat16", "f" * 64)
    with pytest.raises(OutputError, match="shorten the model's name"), keep_states_in(path, named):
        raise AssertionError("the body ran")
    assert left(tmp_path) == set()


# The scan.
@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_states_give_the_scan_that_wrote_them(words, tmp_path, dtype):
    model = tiny_llama().to(dtype)
    texts = documents(40)
    texts[3] = texts[20] = ""
    path = tmp_path / "states.safetensors"
    options = {"metrics": ALL, "keep_samples": True}
    scan = sh.scan(model, words, texts, batch_size=3, keep_states=path, cka_batch=8, **options)
    again = sh.analyse_states(path, cka_batch=8, **options)
    assert saved(again, tmp_path / "again") == saved(scan, tmp_path / "scan")
    assert [rejection.sample for rejection in again.rejections] == [3, 20]
    assert again.plan(2) == scan.plan(2)
    other = sh.analyse_states(path, metrics=("cosine",))
    assert (other.mean("cosine") == scan.mean("cosine")).all()
    assert load_file(path)["hidden_states"].dtype == dtype


@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
def test_a_state_that_is_rejected_is_kept_and_named_again(words, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    texts = documents(30)
    path = tmp_path / "states.safetensors"
    scan = sh.scan(model, words, texts, batch_size=4, keep_states=path)
    assert scan.num_rejected > 0
    again = sh.analyse_states(path, metrics=scan.metrics)
    assert again.rejections == scan.rejections
    assert saved(again, tmp_path / "again") == saved(scan, tmp_path / "scan")


@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
@pytest.mark.parametrize("positions", ["last", "last:4", "random:3", "random:1", "all"])
@pytest.mark.parametrize("buffer", [1, 4000, 1 << 20])
def test_kept_positions_and_clusters_are_the_same(words, tmp_path, monkeypatch, positions, buffer):
    for name in ("BUFFER_BYTES", "MAX_BUFFER_BYTES"):
        monkeypatch.setattr(states_file, name, buffer)
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    texts = documents(30)
    texts[7] = ""
    path = tmp_path / "states.safetensors"
    options = {"metrics": ALL, "keep_samples": True, "cka_batch": 8}
    scan = sh.scan(
        model, words, texts, batch_size=4, keep_states=path, positions=positions, seed=3, **options
    )
    again = sh.analyse_states(path, **options)
    assert again.num_rejected > 1
    assert again.rejections == scan.rejections
    assert again.positions == scan.positions
    assert again.num_sequences == scan.num_sequences
    assert saved(again, tmp_path / "again") == saved(scan, tmp_path / "scan")


def test_states_of_other_positions_are_not_gone_on_from(llama, words, tmp_path, monkeypatch):
    texts, path = documents(40), tmp_path / "states.safetensors"
    for name, positions in (("one", "last:2"), ("two", "all")):
        interrupted(
            llama, words, texts, 20, monkeypatch, checkpoint=tmp_path / name, keep_states=path,
            positions=positions,
        )  # fmt: skip
    with pytest.raises(ScanError, match="were not kept"):
        sh.scan(
            llama, words, texts, batch_size=1, checkpoint=tmp_path / "one", keep_states=path,
            positions="last:2",
        )  # fmt: skip
    sh.scan(
        llama, words, texts, batch_size=1, checkpoint=tmp_path / "two", keep_states=path,
        positions="all",
    )  # fmt: skip
    assert len(load_file(path)["samples"]) == sum(len(text.split()) for text in texts)


def test_the_states_are_those_of_the_model(llama, words, tmp_path):
    path = tmp_path / "states.safetensors"
    sh.scan(llama, words, documents(10), batch_size=4, keep_states=path)
    batches = TokenBatches(words, documents(10), Tokens(256, 4))
    expected = [(part.samples, part.states) for part in stream(llama, batches)]
    kept = load_file(path)
    assert kept["samples"].tolist() == np.concatenate([s for s, _ in expected]).tolist()
    states = torch.cat([states for _, states in expected], dim=1).transpose(0, 1)
    assert torch.equal(kept["hidden_states"], states)


def broken_after(texts, count):
    yield from texts[:count]
    raise OSError("the disk went away")


def interrupted(llama, words, texts, count, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr("shallower.scanning.model.SECONDS_BETWEEN_CHECKPOINTS", -1)
        with pytest.raises(OSError, match="the disk went away"):
            sh.scan(llama, words, broken_after(texts, count), batch_size=1, **options)


@pytest.mark.filterwarnings("default::shallower.RejectedSamplesWarning")
@pytest.mark.parametrize("count", [16, 20, 40])
def test_an_interrupted_scan_goes_on_to_the_same_file(llama, words, tmp_path, monkeypatch, count):
    texts = documents(56)
    texts[2] = texts[30] = ""
    path, checkpoint = tmp_path / "states.safetensors", tmp_path / "partial"
    interrupted(llama, words, texts, count, monkeypatch, checkpoint=checkpoint, keep_states=path)
    assert not path.exists()
    sh.scan(llama, words, texts, batch_size=1, checkpoint=checkpoint, keep_states=path)
    sh.scan(llama, words, texts, batch_size=1, keep_states=tmp_path / "whole.safetensors")
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert left(tmp_path) == {"states.safetensors", "whole.safetensors", "partial"}


def test_a_scan_that_kept_no_states_is_not_gone_on_from(llama, words, tmp_path, monkeypatch):
    texts, checkpoint = documents(40), tmp_path / "partial"
    interrupted(llama, words, texts, 20, monkeypatch, checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(ScanError, match=r"cannot go on .*were not kept.*delete it to start anew"):
        sh.scan(
            llama, words, texts, batch_size=1, checkpoint=checkpoint,
            keep_states=tmp_path / "states.safetensors",
        )  # fmt: skip
    assert checkpoint.read_bytes() == before
    assert left(tmp_path) == {"partial"}


def test_states_without_their_scan_are_written_anew(llama, words, tmp_path, monkeypatch):
    texts, checkpoint = documents(40), tmp_path / "partial"
    path = tmp_path / "states.safetensors"
    interrupted(llama, words, texts, 20, monkeypatch, checkpoint=checkpoint, keep_states=path)
    checkpoint.unlink()
    sh.scan(llama, words, texts[:10], batch_size=1, checkpoint=checkpoint, keep_states=path)
    assert load_file(path)["samples"].tolist() == sorted(range(10), key=lambda n: order(texts, n))


def order(texts, number):
    """Longest first within a window; ten texts are one window here."""
    return -len(texts[number].split()), number


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_scan_that_finds_nothing_leaves_no_states(llama, words, tmp_path, texts):
    with pytest.raises((TextsError, StatesError)):
        sh.scan(llama, words, texts, keep_states=tmp_path / "states.safetensors")
    assert left(tmp_path) == set()
