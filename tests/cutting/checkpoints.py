"""Checkpoints on disk, read byte by byte."""

import json
import struct
from collections import namedtuple

import pytest

import shallower as sh
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


def assert_refused(error, words, source, out, layers=DROPPED, **options):
    before = tree(out.parent)
    with pytest.raises(error, match=words):
        sh.prune_checkpoint(source, layers, out, **options)
    assert tree(out.parent) == before
