"""Whether the forecast of what a cut saves is what this CPU needs.

    OMP_NUM_THREADS=1 python benches/gain.py [--context 128] [--repeats 5] [--json]

A token of SmolLM2-135M with all layers and with 4, 8 and 15 less, in turns, in CPU time; beside it
the forecast by the config and the benchmark of this machine, which is made again in every turn. The
ratios of the times with and without the layers, forecast and timed, are within 15 % of one another.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from statistics import median

import shallower as sh
from shallower.savings.account import count
from shallower.savings.roofline import seconds
from shallower.savings.timing import this_machine, time_forwards
from shallower.studies import demo
from shallower.values.layers import Block

CUTS = (None, Block(13, 17), Block(12, 20), Block(8, 23))
MOST = 0.15


def without(model, block):
    return nullcontext() if block is None else sh.without_layers(model, [block])


def ratios(times, whole):
    """The median, the least and the greatest of the paired ratios."""
    paired = [one / other for one, other in zip(times, whole, strict=True)]
    return median(paired), min(paired), max(paired)


def measured(dtype, context, repeats):
    model, _ = sh.load_model(demo.model_path(), dtype=dtype)
    accounts = {}
    for block in CUTS:
        with without(model, block):
            accounts[block] = count(model.config, dtype, context=context).decode
            time_forwards(model, context=context, steps=2)
    timed, forecast = {block: [] for block in CUTS}, {block: [] for block in CUTS}
    for _ in range(repeats):
        machine = this_machine(dtype, time.process_time)
        for block in CUTS:
            forecast[block].append(seconds(accounts[block], machine, dtype))
            with without(model, block):
                token = time_forwards(model, context=context, clock=time.process_time)[1]
            timed[block].append(token)
    return [
        {
            "dtype": dtype, "dropped": block and [block.start, block.stop],
            "forecast_ms": 1e3 * median(forecast[block]), "timed_ms": 1e3 * median(timed[block]),
            "forecast": ratios(forecast[block], forecast[None]),
            "timed": ratios(timed[block], timed[None]),
        }
        for block in CUTS
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [
        row
        for dtype in options.dtypes.split(",")
        for row in measured(dtype, options.context, options.repeats)
    ]
    off = max(abs(row["forecast"][0] / row["timed"][0] - 1) for row in rows)
    if options.json:
        print(json.dumps({"rows": rows, "off": off}, indent=2))
    else:
        for row in rows:
            print(
                f"{row['dtype']} without {row['dropped']}: {row['forecast_ms']:.1f} ms forecast, "
                f"{row['timed_ms']:.1f} timed; ratios {row['forecast'][0]:.3f} and "
                f"{row['timed'][0]:.3f} [{row['timed'][1]:.3f}, {row['timed'][2]:.3f}]"
            )
        print(f"off by {100 * off:.0f} % at most")
    sys.exit(off > MOST)


if __name__ == "__main__":
    main()
