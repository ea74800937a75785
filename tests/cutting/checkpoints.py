"""Checkpoints on disk, read byte by byte."""

import json
import struct
from collections import namedtuple

import pytest

from shallower.cutting.checkpoint import prepare
from shallower.storage import check_free
from tests.folders import tree

DROPPED = [1, 3, 4]
Stored = namedtuple("Stored", "dtype shape content")


def stored(folder):
    """Every tensor of a checkpoint's files, as its bytes."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for name, info in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in info["data_offsets"])
                assert name not in found
                found[name] = Stored(info["dtype"], info["shape"], raw[start:stop])
    return found


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**read_json(path), **changes}))


def cut_on_disk(source, layers, out, **options):
    """What ``sh.prune`` does where a folder is cut without loading it."""
    check_free(out)
    prepare(source, layers, **options).write(out)


def assert_refused(error, words, source, out, layers=DROPPED, **options):
    """The way over the disk refuses a cut, and leaves the place as it was."""
    before = tree(out.parent)
    with pytest.raises(error, match=words):
        cut_on_disk(source, layers, out, **options)
    assert tree(out.parent) == before
