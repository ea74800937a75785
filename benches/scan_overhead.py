"""What a scan costs beyond the bare forward of the base model over the same batches.

Usage: python benches/scan_overhead.py time [--samples 64 --max-length 256 --repeats 5]
       python benches/scan_overhead.py stream [--samples 64 --max-length 256 --repeats 5]
       python benches/scan_overhead.py memory [--samples 100,10000 --max-length 16]

`time` alternates bare forwards and scans in one process, asserts the scan against the
float64 reference first, and prints every pair and the median ratio. `stream` alternates scans of
the model in memory and of the same with its layers on disk, and asserts that they are the same.
`memory` runs each in a process of its own and prints the peak resident memory after loading.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

import shallower as sh
from shallower.models.architecture import find_layers
from shallower.scanning.hidden_states import stream
from shallower.studies import demo
from shallower.texts.batches import TokenBatches

sys.path.append(str(Path(__file__).parents[1]))
from shallower.values.tokens import Tokens
from tests import reference


def texts(samples):
    calibration, _ = demo.texts(None, 400, 1)
    return list(islice(cycle(calibration), samples))


def bare_forward(model, tokenizer, samples, max_length, batch_size):
    layers = find_layers(model)
    with torch.inference_mode():
        for batch in TokenBatches(tokenizer, samples, Tokens(max_length, batch_size)):
            layers.runner(
                input_ids=torch.from_numpy(batch.input_ids),
                attention_mask=torch.from_numpy(batch.attention_mask),
                use_cache=False,
            )


def scan(model, tokenizer, samples, max_length, batch_size):
    return sh.scan(model, tokenizer, samples, max_length=max_length, batch_size=batch_size)


def check(model, tokenizer, samples, max_length, batch_size):
    """The scan against the reference on the states of a separate run."""
    scanned = scan(model, tokenizer, samples, max_length, batch_size)
    batches = TokenBatches(tokenizer, samples, Tokens(max_length, batch_size))
    states = np.concatenate(
        [part.states.float().numpy() for part in stream(model, batches)], axis=1
    )
    mean, _ = reference.mean_and_stderr(states.transpose(1, 0, 2), "angular")
    assert np.abs(scanned.mean("angular") - mean).max() < 1e-7


def seconds(run, *args):
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def compared(pairs):
    """Pairs of seconds with the ratio of the second to the first."""
    ratios = [second / first for first, second in pairs]
    return {
        "pairs_s": pairs,
        "ratio_median": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def measure_time(options):
    model, tokenizer = sh.load_model(demo.model_path(), dtype=options.dtype)
    work = (model, tokenizer, texts(int(options.samples)), options.max_length, options.batch_size)
    check(model, tokenizer, work[2][:16], options.max_length, options.batch_size)
    bare_forward(*work)
    pairs = []
    for _ in range(options.repeats):
        pairs.append((seconds(bare_forward, *work), seconds(scan, *work)))
        print(f"bare {pairs[-1][0]:.2f} s, scan {pairs[-1][1]:.2f} s", file=sys.stderr)
    return compared(pairs)


def measure_stream(options):
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = sh.load_model(demo.model_path(), dtype=options.dtype)
        sh.save_model(model, tokenizer, f"{folder}/model")
        streamed, _ = sh.load_model(f"{folder}/model", options.dtype, "stream")
        given = texts(int(options.samples)), options.max_length, options.batch_size
        ways = [(one, tokenizer, *given) for one in (model, streamed)]
        plain, by_layer = (scan(*work) for work in ways)
        assert np.array_equal(plain.mean("angular"), by_layer.mean("angular"))
        pairs = []
        for _ in range(options.repeats):
            pairs.append([seconds(scan, *work) for work in ways])
            print(f"plain {pairs[-1][0]:.2f} s, streamed {pairs[-1][1]:.2f} s", file=sys.stderr)
    return compared(pairs)


def measure_memory(options):
    peaks = {}
    for samples in options.samples.split(","):
        for mode in ("bare", "scan"):
            command = [sys.executable, __file__, mode, "--samples", samples]
            command += ["--max-length", str(options.max_length), "--dtype", options.dtype]
            command += ["--batch-size", str(options.batch_size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[f"{mode} {samples}"] = json.loads(done.stdout)["peak_mib"]
            print(f"{mode} {samples}: {peaks[f'{mode} {samples}']:.0f} MiB", file=sys.stderr)
    return {"peak_mib": peaks}


def measure_one(options):
    model, tokenizer = sh.load_model(demo.model_path(), dtype=options.dtype)
    run = scan if options.mode == "scan" else bare_forward
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    run(model, tokenizer, texts(int(options.samples)), options.max_length, options.batch_size)
    status = Path("/proc/self/status").read_text()
    return {"peak_mib": int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["time", "stream", "memory", "bare", "scan"])
    parser.add_argument("--samples", default=None)
    parser.add_argument("--max-length", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    defaults = {"memory": ("100,10000", 16), "time": ("64", 256), "stream": ("64", 256)}.get(
        options.mode, ("100", 16)
    )
    options.samples = options.samples or defaults[0]
    options.max_length = options.max_length or defaults[1]
    ways = {"time": measure_time, "stream": measure_stream, "memory": measure_memory}
    measure = ways.get(options.mode, measure_one)
    result = measure(options)
    print(
        json.dumps(
            {
                **vars(options),
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                **result,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
