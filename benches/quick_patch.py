"""Whether the quick patch ranks cuts as the full one does, and in what share of its time.

    python benches/quick_patch.py [--tokens 131072] [--plans 20] [--json]

Plans of SmolLM2-135M with 4 and 8 layers less, contiguous and scattered, are patched both ways on
C4, in bfloat16. The loss of both is measured on the same texts, which neither has seen. Kendall's τ
of the two lists is at least 0.8, and a quick patch, the whole model's run on its texts shared out
among the plans, takes at most a tenth of the CPU time of a full one.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

import shallower as sh
from shallower.models.layerwise import Layerwise
from shallower.patching.quick import QuickPatch
from shallower.studies import demo
from shallower.texts.batches import TokenBatches
from shallower.values.layers import ranges
from shallower.values.tokens import Tokens

LEAST_TAU, MOST_TIME = 0.8, 0.1
QUICK_TEXTS = 24


def plans(count):
    """Sets of layers in the middle of 30, contiguous and scattered in turn, with a fixed seed."""
    generator = np.random.default_rng(0)
    found = []
    while len(found) < count:
        n = (4, 8)[len(found) // 2 % 2]
        if len(found) % 2:
            chosen = generator.choice(np.arange(4, 27), n, replace=False)
        else:
            chosen = generator.integers(6, 27 - n) + np.arange(n)
        layers = tuple(sorted(map(int, chosen)))
        if layers not in found:
            found.append(layers)
    return found


def kendall(one, other):
    """Kendall's τ of two lists without ties."""
    pairs = [
        np.sign((one[i] - one[j]) * (other[i] - other[j]))
        for i in range(len(one)) for j in range(i)
    ]  # fmt: skip
    return float(np.mean(pairs))


def timed(work):
    """The CPU seconds of a function, and its result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("SHALLOWER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=data / "text")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    fit, report = (
        [json.loads(line)["text"] for line in (options.data / name).read_text().splitlines()]
        for name in ("c4.jsonl", "c4_eval.jsonl")
    )
    model, tokenizer = sh.load_model(demo.model_path(), dtype="bfloat16")
    batches = list(TokenBatches(tokenizer, fit[:QUICK_TEXTS], Tokens(256, 8), min_tokens=2))
    quick = QuickPatch(Layerwise(model), batches)

    def loss():
        texts = report[: options.texts]
        return sh.evaluate_loss(model, tokenizer, texts, max_length=256, progress=False).nats

    chosen = plans(options.plans)
    once, _ = timed(lambda: quick._parts)
    rows = []
    for layers in chosen:
        context = quick.patched(sh.Plan.of(30, layers))
        quick_seconds, _ = timed(context.__enter__)
        with sh.without_layers(model, layers):
            quick_loss = loss()
        context.__exit__(None, None, None)
        full, tokens = sh.load_model(demo.model_path(), dtype="bfloat16")
        seconds, done = timed(
            lambda full=full, tokens=tokens, layers=layers: sh.patch(
                full, tokens, layers, texts=fit, num_tokens=options.tokens, progress=False
            )
        )
        model, kept = full, model
        full_loss = loss()
        model = kept
        rows.append({
            "dropped": layers, "quick": quick_loss, "full": full_loss, "recovered": done.recovered,
            "quick_seconds": quick_seconds + once / len(chosen), "full_seconds": seconds,
        })  # fmt: skip
        print(f"{ranges(layers)}: {json.dumps(rows[-1])}", file=sys.stderr, flush=True)
    tau = kendall(*([row[name] for row in rows] for name in ("quick", "full")))
    share = sum(r["quick_seconds"] for r in rows) / sum(r["full_seconds"] for r in rows)
    result = {"tau": tau, "time_share": share, "rows": rows}
    print(json.dumps(result) if options.json else f"τ {tau:.2f}, time {share:.3f} of a full patch")
    assert tau >= LEAST_TAU, result
    assert share <= MOST_TIME, result


if __name__ == "__main__":
    main()
