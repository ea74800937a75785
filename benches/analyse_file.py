"""What the analysis of a file of states costs: time against reading it, and against the engine.

    python benches/analyse_file.py [--gb 20] [--dtype bfloat16] [--shape 33x4096] [--rounds 3]
                                   [--threads N] [--folder /tmp]

Writes a file of residual streams, a tile of random ones that differs from copy to copy by the
order of its samples, and asserts the scan of its first samples against the float64 reference, and
that of the whole file against the engine on the tiles in memory, bit by bit. Then, in every round,
cold (dropped from the page cache) and, where it fits there, warm: reading alone as the analysis
reads, `dd`, `analyse_states` in a process of its own, whose peak of resident memory may be 300
MiB, and the command `shallower analyse`, start of Python and heat map included. The engine's own
speed is that on states in memory, in parts of the same size, with as many threads. Everything is
deleted afterwards.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from shallower import Scan, analyse_states
from shallower._core import tier
from shallower.scanning.builder import ScanBuilder
from shallower.scanning.states_file import BUFFER_BYTES, DTYPES, StatesFile

sys.path.append(str(Path(__file__).parents[1]))
from tests import reference

NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
CHECKED = 64
LIMIT_MIB = 300
CHILD = """
import json, re, sys, time
from pathlib import Path
import shallower as sh
began = time.perf_counter()
scan = sh.analyse_states(sys.argv[1], ("angular", "cosine"), threads=json.loads(sys.argv[2]))
taken = time.perf_counter() - began
scan.save(sys.argv[3])
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(json.dumps([taken, int(peak) / 1024, "torch" in sys.modules]))
"""
LAUNCHER = """
import json, os, sys, time
began = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[
    (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)])
_, status, usage = os.wait4(pid, 0)
assert status == 0, status
print(json.dumps([time.perf_counter() - began, usage.ru_maxrss / 1024]))
"""
# A small process of its own: the peak of the one that forks would count as the child's.


def tile(num_samples, num_states, width, dtype):
    """Residual streams whose steps are small and grow, with two massive channels."""
    chance = np.random.default_rng(0)
    steps = chance.standard_normal((num_samples, num_states, width), dtype=np.float32)
    steps *= np.linspace(0.1, 0.4, num_states, dtype=np.float32)[:, None]
    steps[:, 0] *= 10
    steps[:, 1, :2] = 50
    states = steps.cumsum(axis=1)
    if dtype != "bfloat16":
        return states.astype(DTYPES[NAMES[dtype]])
    bits = states.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def tiles(base, num_samples):
    """Copies of the tile, each with its samples in another order, ``num_samples`` in all."""
    for number, start in enumerate(range(0, num_samples, len(base))):
        rolled = np.roll(base, 7 * number, axis=0)
        yield rolled[: num_samples - start]


def make(path, base, num_samples, dtype):
    shape = [num_samples, *base.shape[1:]]
    offsets = [0, num_samples * base[0].nbytes]
    header = {"hidden_states": {"dtype": NAMES[dtype], "shape": shape, "data_offsets": offsets}}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in tiles(base, num_samples):
            file.write(np.ascontiguousarray(part).data.cast("B"))
        os.fsync(file.fileno())


def widened(states):
    if states.dtype != np.uint16:
        return states.astype(np.float64)
    return (states.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def in_memory(base, num_samples, threads):
    """The scan of the same samples by the engine alone, and its seconds."""
    builder = ScanBuilder(base.shape[1], ["angular", "cosine"], threads=threads)
    seconds, start = 0.0, 0
    step = max(1, BUFFER_BYTES // base[0].nbytes)  # as the file is read, on few cores
    for part in tiles(base, num_samples):
        for first in range(0, len(part), step):
            chunk = part[first : first + step]
            began = time.perf_counter()
            builder.add(chunk, range(start, start + len(chunk)))
            seconds += time.perf_counter() - began
            start += len(chunk)
    return builder.finish(), seconds


def forget(path):
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_alone(path):
    """Seconds to read the file as the analysis does, and do nothing."""
    began = time.perf_counter()
    with StatesFile(path) as file:
        for _ in file.parts():
            pass
    return time.perf_counter() - began


def dd(path):
    began = time.perf_counter()
    subprocess.run(
        ["dd", f"if={path}", "of=/dev/null", "bs=8M"], stderr=subprocess.DEVNULL, check=True
    )
    return time.perf_counter() - began


def command(path, out, threads):
    """Seconds of ``shallower analyse``, start of Python included, and its peak in MiB."""
    words = [sys.executable, "-m", "shallower", "analyse", path, "--out", out, "--overwrite"]
    words += ["--threads", threads] if threads else []
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *map(str, words)], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def analyse(path, scan, threads):
    """Seconds of ``analyse_states`` in a process of its own, and the peak of that in MiB."""
    words = [sys.executable, "-c", CHILD, path, json.dumps(threads), scan]
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, check=True)
    seconds, peak, torch_loaded = json.loads(done.stdout)
    assert not torch_loaded
    assert peak < LIMIT_MIB, peak
    return seconds, peak


def available():
    """Bytes of memory that can hold the page cache."""
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024


def measure(options, root):
    num_states, width = map(int, options.shape.split("x"))
    sample_bytes = num_states * width * np.dtype(DTYPES[NAMES[options.dtype]]).itemsize
    num_samples = max(CHECKED, round(options.gb * 1e9 / sample_bytes))
    base = tile(min(num_samples, (128 << 20) // sample_bytes + 1), num_states, width, options.dtype)
    path, out = root / "states.safetensors", root / "out"
    make(path, base, num_samples, options.dtype)
    total = path.stat().st_size
    mean, _ = reference.mean_and_stderr(widened(base[:CHECKED]), "angular")
    assert np.abs(analyse_states(base[:CHECKED]).mean() - mean).max() < 1e-7
    expected, engine = in_memory(base, num_samples, options.threads)
    analyse(path, root / "scan", options.threads)
    found = Scan.load(root / "scan")
    assert found.num_samples == num_samples
    for metric in ("angular", "cosine"):
        assert (found.mean(metric) == expected.mean(metric)).all()
        assert (found.variance(metric) == expected.variance(metric)).all()
    print(f"answer asserted; engine {total / engine / 1e9:.2f} GB/s", file=sys.stderr)

    engines, peaks = [engine], {"analyse": [], "command": []}
    seconds = {}
    states = ["cold", "warm"] if total < 0.8 * available() else ["cold"]
    for round_ in range(options.rounds):
        for state in states:
            works = {
                "read": lambda: read_alone(path),
                "dd": lambda: dd(path),
                "analyse": lambda: analyse(path, root / "scan", options.threads),
                "command": lambda: command(path, out, options.threads),
            }
            for name in (list(works), list(works)[::-1])[round_ % 2]:
                if state == "cold":
                    forget(path)
                taken = works[name]()
                if name in peaks:
                    taken, peak = taken
                    peaks[name].append(peak)
                seconds.setdefault(f"{name}, {state}", []).append(taken)
                print(f"{name}, {state}: {total / taken / 1e9:.2f} GB/s", file=sys.stderr)
        engines.append(in_memory(base, num_samples, options.threads)[1])
    seconds["engine on memory"] = engines
    rate = {name: total / statistics.median(values) / 1e9 for name, values in seconds.items()}
    ratios = {}
    for state in states:
        read = rate[f"read, {state}"]
        slower = min(read, rate["engine on memory"])
        ratios[state] = {
            "of_the_slower": rate[f"analyse, {state}"] / slower,
            "of_read": rate[f"analyse, {state}"] / read,
            "of_dd": rate[f"analyse, {state}"] / rate[f"dd, {state}"],
            "command_of_the_slower": rate[f"command, {state}"] / slower,
            "of_engine": rate[f"analyse, {state}"] / rate["engine on memory"],
        }
    return {
        "bytes": total,
        "num_samples": num_samples,
        "tier": tier(),
        "cpus": len(os.sched_getaffinity(0)),
        "gb_per_s_medians": rate,
        "seconds": seconds,
        "ratios": ratios,
        "peak_mib": {name: max(values) for name, values in peaks.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=20)
    parser.add_argument("--dtype", choices=list(NAMES), default="bfloat16")
    parser.add_argument("--shape", default="33x4096")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="shallower-bench-", dir=options.folder))
    try:
        result = measure(options, root)
    finally:
        shutil.rmtree(root)
    machine = platform.processor() or platform.machine()
    print(json.dumps({**vars(options), "machine": machine, **result}, indent=2))


if __name__ == "__main__":
    main()
