"""GGUF files and cuts that are refused, full disks, and the command line."""

import os

import pytest

import shallower as sh
from shallower._core import Gguf
from tests.cutting.gguf_files import CUT, write
from tests.folders import full_disk
from tests.peaks import needs_linux, peak_of
from tests.scanning.ticks import ticks_beside


def test_split_files_are_refused(tmp_path):
    source = write(tmp_path / "a-00001-of-00003.gguf", split=3)
    with pytest.raises(sh.ModelError, match=r"one of 3 files.*llama-gguf-split --merge"):
        sh.prune(source, [1], tmp_path / "b.gguf")


def test_a_full_disk_leaves_nothing(real, tmp_path):
    with full_disk(1 << 24), pytest.raises(sh.OutputError, match="File too large"):
        sh.prune(real, CUT, tmp_path / "b.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_gil_is_free(real, tmp_path):
    assert ticks_beside(lambda: sh.prune(real, CUT, tmp_path / "b.gguf")) >= 3


@needs_linux
def test_memory_is_constant(real, tmp_path):
    assert peak_of(lambda: sh.prune(real, CUT, tmp_path / "b.gguf")) < 16 << 20


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, words in (("none.gguf", "No such file"), ("pipe.gguf", "not a regular file")):
        with pytest.raises(sh.ModelError, match=words):
            Gguf(tmp_path / name)
