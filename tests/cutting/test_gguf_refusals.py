"""GGUF files and cuts that are refused, full disks, and the command line."""

import os
import subprocess
import sys

import pytest

import shallower as sh
from shallower._core import Gguf
from shallower.cutting.gguf import plan_path, prepare_gguf
from tests.cutting.gguf_files import CUT, write
from tests.scanning.ticks import ticks_beside


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
    assert ticks_beside(lambda: sh.prune(real, CUT, tmp_path / "b.gguf")) >= 3


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


def test_hostile_files(tmp_path):
    good = write(tmp_path / "good.gguf").read_bytes()
    for data, words in (
        (b"hello, this is no model at all", "not a GGUF file"),
        (good[:100], "room for"),
        (good[:-40], "cut short"),
    ):
        path = tmp_path / "bad.gguf"
        path.write_bytes(data)
        with pytest.raises(sh.ModelError, match=rf"bad\.gguf.*{words}"):
            sh.prune(path, [1], tmp_path / "out.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, words in (("none.gguf", "No such file"), ("pipe.gguf", "not a regular file")):
        with pytest.raises(sh.ModelError, match=words):
            Gguf(tmp_path / name)
    assert {file.name for file in tmp_path.iterdir()} == {"good.gguf", "bad.gguf", "pipe.gguf"}
