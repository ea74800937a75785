"""GGUF files and cuts that are refused, full disks, and the command line."""

import os
import struct
import subprocess
import sys
import threading
import time

import pytest

import shallower as sh
from shallower._core import Gguf
from shallower.cutting.gguf import plan_path, prepare_gguf
from tests.cutting.gguf_files import CUT, write


def test_split_files_are_refused(tmp_path):
    source = write(tmp_path / "a-00001-of-00003.gguf", split=3)
    with pytest.raises(sh.ModelError, match=r"one of 3 files.*llama-gguf-split --merge"):
        sh.prune(source, [1], tmp_path / "b.gguf")


def test_layers_and_plans_are_checked(tmp_path):
    source, out = write(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    with pytest.raises(sh.LayersError, match="no layer 6"):
        prepare_gguf(source, [6], out)
    block = sh.Block(1, 3)
    with pytest.raises(sh.PlanError, match=r"for 8 layers, .*a\.gguf has 6"):
        sh.prune(source, sh.Plan(8, (block,)), out)
    assert not out.exists()
    plan = sh.Plan(6, (block,), "deepest")
    assert sh.prune(source, plan, out) is plan
    assert sh.Plan.load(plan_path(out)).strategy == "deepest"


def test_nothing_is_overwritten_unasked(tmp_path):
    source, out = write(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    out.write_text("mine")
    with pytest.raises(sh.OutputError, match="exists already"):
        sh.prune(source, [1], out)
    out.unlink()
    plan_path(out).write_text("mine")
    with pytest.raises(sh.OutputError, match="exists already"):
        sh.prune(source, [1], out)
    assert not out.exists()
    sh.prune(source, [1], out, overwrite=True)
    assert Gguf(out).num_layers == 5
    before = source.read_bytes()
    with pytest.raises(sh.OutputError, match="which is read"):
        sh.prune(source, [1], source, overwrite=True)
    assert source.read_bytes() == before
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(sh.OutputError, match="is a folder"):
        sh.prune(source, [1], tmp_path / "d.gguf", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(sh.OutputError, match="not a folder"):
        sh.prune(source, [1], tmp_path / "file" / "e.gguf")


def test_an_interrupted_cut_leaves_nothing(real, tmp_path):
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sh.prune(real, CUT, tmp_path / "b.gguf", progress=stop)
    assert len(seen) == 3
    assert seen[0][0] < seen[2][0] < seen[2][1]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(real, tmp_path):
    code = (
        "import resource, signal, sys, shallower as sh\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 24, 1 << 24))\n"
        "try: sh.prune(sys.argv[1], range(12, 20), sys.argv[2])\n"
        "except sh.OutputError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(real), str(tmp_path / "b.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_gil_is_free(real, tmp_path):
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    sh.prune(real, CUT, tmp_path / "b.gguf")
    end = time.perf_counter()
    stop.set()
    thread.join()
    assert sum(start < moment < end for moment in ticks) > 5


def test_memory_is_constant(real, tmp_path):
    code = (
        "import resource, sys, shallower as sh\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "sh.prune(sys.argv[1], range(12, 20), sys.argv[2])\n"
        "print(peak() - before, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(real), str(tmp_path / "b.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kilobytes, has_torch = done.stdout.split()
    assert int(kilobytes) < 16 * 1024
    assert has_torch == "False"


def damage(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def test_hostile_files(tmp_path):
    good = write(tmp_path / "good.gguf").read_bytes()
    huge = struct.pack("<Q", 2**63 + 1)
    cases = {
        "empty": (b"", "cut short"),
        "text": (b"hello, this is no model at all", "not a GGUF file"),
        "zip": (b"PK\3\4" + good[4:], "not a GGUF file"),
        "version 1": (damage(good, 4, struct.pack("<I", 1)), "version 1"),
        "big endian": (damage(good, 4, struct.pack(">I", 3)), "big-endian"),
        "tensors": (damage(good, 8, huge), "tensors are counted, and there is room for"),
        "entries": (damage(good, 16, huge), "entries are counted, and there is room for"),
        "key": (damage(good, 24, huge), "expected at most"),
        "cut header": (good[:100], "room for"),
        "cut names": (good[:200], "cut short"),
        "cut data": (good[:-40], "cut short"),
        "tail": (good + b"x", "truncate -s"),
    }
    for name, (data, words) in cases.items():
        path = tmp_path / "bad.gguf"
        path.write_bytes(data)
        with pytest.raises(sh.ModelError, match=words) as caught:
            sh.prune(path, [1], tmp_path / "out.gguf")
        assert "bad.gguf" in str(caught.value), name
    with pytest.raises(sh.ModelError, match="No such file"):
        Gguf(tmp_path / "none.gguf")
    with pytest.raises(sh.ModelError, match="not a regular file"):
        Gguf(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(sh.ModelError, match="not a regular file"):
        Gguf(tmp_path / "pipe.gguf")
    assert {file.name for file in tmp_path.iterdir()} == {"good.gguf", "bad.gguf", "pipe.gguf"}


def test_a_sparse_giant_is_refused_at_once(tmp_path):
    path = tmp_path / "giant.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 1, 1))
        file.write(struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**36))
        file.truncate(2**40)
    start = time.thread_time()  # not of others, on a loaded machine
    with pytest.raises(sh.ModelError, match="elements are counted, and there is room for"):
        Gguf(path)
    assert time.thread_time() - start < 1


def test_the_command_line_refuses_with_status_2(real, shallower, tmp_path):
    sh.Plan(28, (sh.Block(1, 3),)).save(tmp_path / "plan.json")
    small = write(tmp_path / "gemma.gguf", arch="gemma2")
    out = tmp_path.with_name("new") / "out.gguf"
    for words, message in [
        ((real, "--plan", tmp_path / "plan.json"), "is for 28 layers"),
        ((real, "--drop", "1", "--dtype", "nf4"), "--dtype nf4 does not go with"),
        ((small, "--drop", "1", "--dry-run"), "gemma2 is an architecture"),
        ((tmp_path, "--gguf-file", "none.gguf", "--drop", "1"), "No such file"),
    ]:
        done = shallower("prune", *words, "--out", out)
        assert done.status == 2, words
        assert message in " ".join(done.err.split()), done.err
        assert "Traceback" not in done.err
    assert not out.exists()
