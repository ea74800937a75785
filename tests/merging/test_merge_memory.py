"""The memory of a merge does not depend on the size of the model."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from shallower.models.identity import stored_digest
from tests.merging.merges import adapters_of, sparse_neox

MERGE = """
import json, re, sys, time
from pathlib import Path
from shallower.merging import merging
from shallower.values.healing import Healing

def peak():  # not of getrusage, which counts the process that forked
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def merge(place):
    (place / "out").mkdir()
    adapters = place / "adapters"
    job = merging.Merging(
        str(place / "base"), adapters, Healing.load(adapters), progress=False
    )
    return job.into(place / "out")

merging.place_for = lambda _num_bytes: None
merge(Path(sys.argv[1]))  # all imports, and what libraries keep for ever
before, began = peak(), time.monotonic()
done = merge(Path(sys.argv[2]))
print(json.dumps([before, peak(), time.monotonic() - began, done.to_json()]))
"""


def merged(place, record, **model):
    """The MiB that a merge takes above what one of a tiny model takes."""
    large(place / "tiny", record, hidden=64, inner=256)
    large(place / "large", record, **model)
    command = [sys.executable, "-c", MERGE, place / "tiny", place / "large"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak, seconds, merge = json.loads(done.stdout.splitlines()[-1])
    assert merge["check"] == "tensors"
    assert 0 < merge["difference"] < merge["tolerance"]
    print(f"{peak - before:.0f} MiB above {before:.0f}, {seconds:.0f} s")  # for -s
    return peak - before


def large(place, record, *, hidden, inner, **more):
    base, adapters = place / "base", place / "adapters"
    names = sparse_neox(base, hidden, inner, **more)
    shapes = {"dense_h_to_4h": (inner, hidden), "dense_4h_to_h": (hidden, inner)}
    adapters_of(adapters, names, shapes, rank=2)
    record = replace(record, weights=stored_digest(base), merge=None)
    (adapters / "healing.json").write_bytes(record.to_bytes())


def test_a_large_tensor_is_merged_in_small_memory(healed, tmp_path):
    """Two weights of 256 MiB, of which the whole in float32 would be 512 each."""
    assert merged(tmp_path, healed[1], hidden=1024, inner=1 << 17) < 200


def test_many_shards_are_merged_in_small_memory(healed, tmp_path):
    assert merged(tmp_path, healed[1], hidden=512, inner=1 << 13, layers=20, shards=20) < 150
    assert len(list((tmp_path / "large" / "out").glob("*.safetensors"))) == 20


@pytest.mark.slow
def test_a_tensor_of_four_gibibytes_is_merged_in_less_than_one(healed, tmp_path):
    """Two of them, which the adapters change, and the attention's beside them."""
    assert merged(tmp_path, healed[1], hidden=4096, inner=1 << 19) < 1000
    assert (tmp_path / "large" / "out" / "model.safetensors").stat().st_size > 8 << 30
