"""What workers save of a scan of SmolLM2-135M: two processes against one, and Ray against those.

Usage: python benches/workers.py [--samples 400 --max-length 128 --repeats 3 --json FILE]

Every worker has one thread. Times are from the moment that all workers have opened model and texts
to the last shard; starting is reported beside them. Scans alternate; each is asserted to have the
bytes of a scan by one process with one thread first.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import shallower as sh
from shallower.scanning.scan_file import read_text, scan_bytes
from shallower.scanning.shards import joined
from shallower.sharing.engines import workers_of
from shallower.sharing.scan_work import ScanWork
from shallower.sharing.share import OPENER
from shallower.studies import demo
from shallower.studies.scan import ScanJob
from shallower.texts.sources import Texts
from shallower.workers.units import Job, Ledger, drive

WAYS = {"one process": ("local", 1), "two processes": ("local", 2), "ray": ("ray", 2)}


def work_of(folder, texts, length, way):
    on, workers = way
    job = ScanJob(
        source=sh.ModelSource(demo.model_path()),
        texts=Texts(str(texts)),
        out=folder,
        max_length=length,
        batch_size=8,
    )
    return ScanWork(job, on=on, workers=workers)


class Once:
    """One scan by workers, with the moments that count."""

    def __init__(self, work):
        self.begun, self.workers, self.parts = time.perf_counter(), 0, {}
        self.wanted, self.ready, self.first = work.workers, None, None
        self.units = work.units
        job, of = Job(OPENER, work.described()), {"workers": work.workers, "on": work.on}
        engine = workers_of(job, memory=work.memory, **of)
        drive(engine, Ledger(work.units), self.accept, ready=self.opened)
        self.ended = self.last

    def opened(self, _worker, _hello):
        self.workers += 1
        if self.workers == self.wanted:
            self.ready = time.perf_counter()
            self.before = len(self.parts)

    def accept(self, unit, content):
        self.parts[unit] = content
        self.last = time.perf_counter()

    @property
    def seconds_a_shard(self):
        """Of all workers together, while all were there."""
        return (self.ended - self.ready) / (len(self.parts) - self.before)


def gathered(done):
    values = [json.loads(done.parts[unit])["value"] for unit in done.units]
    return scan_bytes(joined([read_text(value["content"]) for value in values]).contents)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", default=",".join(WAYS), help="some of them, comma-separated")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    calibration, _ = demo.texts(None, 400, 1)
    texts = (calibration * (args.samples // len(calibration) + 1))[: args.samples]
    ways = {name: WAYS[name] for name in args.ways.split(",")}
    found = {name: [] for name in ways}
    starts = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as place:
        folder, file = Path(place), Path(place, "texts.jsonl")
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        model, tokenizer = sh.ModelSource(demo.model_path()).load()
        whole = sh.scan(model, tokenizer, texts, max_length=args.max_length, batch_size=8)
        del model
        for _ in range(args.repeats):
            for name, way in ways.items():
                done = Once(work_of(folder / "out", file, args.max_length, way))
                bytes_of = gathered(done)
                assert bytes_of == scan_bytes(whole.contents), name
                found[name].append(done.seconds_a_shard)
                starts[name].append(done.ready - done.begun)
                print(
                    f"{name}: {done.seconds_a_shard:.3f} s a shard, start {starts[name][-1]:.1f} s"
                )
    ratios = {
        f"{second} to {first}": [b / a for a, b in zip(found[first], found[second], strict=True)]
        for first, second in pairwise(ways)
    }
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    if args.json:
        record = {"arguments": vars(args) | {"json": None}, "seconds a shard": found}
        record |= {"start": starts, "ratios": ratios}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
