"""How many texts `scan --until` takes, and how often it is wrong, by texts drawn from a scan.

    shallower scan SMOLLM2.gguf --texts c4.jsonl --max-length 128 --keep-samples --out kept
    python benches/settling.py kept/scan.safetensors [--repeats 300] [--n 1,2,4,8,12,15] [--json]

The texts of the scan stand for all that there are. Each repetition draws some of them again, with
replacement, until the rule is settled or `--most` are drawn, for every size by itself with all of
the error, and for all of them together; by the limit theorem and by bets (`--exact`). Asserted
first: the rule says the same as plain loops. Then: a best block is worse than the best of the scan
by more than the tolerance in at most 1 - P of the repetitions. Beside it stands how often a single
rival is missed that exceeds the best by just the tolerance, by the skewness of its differences.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from shallower import Scan, Until
from shallower.scanning.settling import Asymptotic, Betting, Settling
from shallower.values.layers import parse_sizes

sys.path.append(str(Path(__file__).parents[1]))
from tests import reference

WINDOW = 128
"""Texts that a scan judges together: 16 batches of 8."""


def columns(num_layers, n):
    starts, stops = np.triu_indices(num_layers + 1, 1)
    return np.flatnonzero(stops - starts == n)


def repetition(pool, num_layers, until, *, seed, window, most):
    """The texts after which all were settled, or None, and the greatest excess of a leader."""
    drawn = np.random.default_rng(seed).integers(0, len(pool), most)
    settling = Settling(until.of(num_layers), num_layers, "angular")
    used = 0
    while used < most and not settling.settled.all:
        settling.take([pool[drawn[used : used + window]]])
        used = min(used + window, most)
        settling.judge(used, 1.0)
    seen, means = pool[drawn[:used]].mean(0, dtype=float), pool.mean(0, dtype=float)
    places = [columns(num_layers, n) for n in settling.settled.until.sizes]
    excess = max(float(means[at][seen[at].argmin()] - means[at].min()) for at in places)
    return used if settling.settled.all else None, excess


def check(pool, num_layers, until):
    """The rule against plain loops, on the first texts."""
    rows, named = pool[:WINDOW], until.of(num_layers)
    settling = Settling(named, num_layers, "angular")
    settling.take([rows])
    settling.judge(len(rows), 1.0)
    error = (1 - until.confidence) / len(named.sizes)
    for n, sure in settling.settled.by_size.items():
        values = rows[:, columns(num_layers, n)].astype(float)
        expected = reference.is_settled(values, error, tolerance=until.tolerance, exact=until.exact)
        assert (sure is not None) == expected, n


def simulated(pool, num_layers, until, *, repeats, window=WINDOW, most=2000):
    """Quantiles of the texts that were taken, how many stayed open, and how many were wrong."""
    check(pool, num_layers, until)
    done = [
        repetition(pool, num_layers, until, seed=seed, window=window, most=most)
        for seed in range(repeats)
    ]
    texts = [most if used is None else used for used, _ in done]
    wrong = sum(used is not None and excess > until.tolerance for used, excess in done)
    assert wrong <= (1 - until.confidence) * repeats, (until, wrong)
    return {
        "n": list(until.sizes), "exact": until.exact, "window": window,
        "texts": [int(np.quantile(texts, share)) for share in (0.5, 0.1, 0.9)],
        "open": sum(used is None for used, _ in done), "wrong": wrong,
    }  # fmt: skip


def missed(pool, num_layers, n, *, exact, repeats, error=0.01, most=1024):
    """How often each of the three next starts is ever shown to be within just its own excess.

    The hardest case of one pair, which a rule should miss at a rate of ``error`` at the most.
    """
    values = pool[:, columns(num_layers, n)].astype(float)
    means = values.mean(0)
    best, *rivals = means.argsort()[:4]
    rates = {}
    for rival in rivals:
        pair, excess = values[:, [rival, best]], means[rival] - means[best]
        found = 0
        for seed in range(repeats):
            rule = (Betting if exact else Asymptotic)(2, error, excess)
            drawn = np.random.default_rng(seed).integers(0, len(pair), (most // WINDOW, WINDOW))
            for part in drawn:
                rule.take(pair[part])
                if rule.shown(0, 1.0)[1]:
                    found += 1
                    break
        rates[int(rival)] = found / repeats
    skewed = {int(one): skewness(values[:, one] - values[:, best]) for one in rivals}
    return {"n": n, "exact": exact, "error": error, "missed": rates, "skewness": skewed}


def skewness(values):
    return float(((values - values.mean()) ** 3).mean() / values.std() ** 3)


def rows_of(scanned, options):
    sizes = tuple(parse_sizes(options.n))
    for exact in (False, True):
        for named in [*((n,) for n in sizes), sizes]:
            until = Until(options.until, options.tolerance, named, exact)
            windows = (WINDOW,) if exact else (WINDOW, 1)
            for window in windows:
                yield simulated(
                    scanned.samples(), scanned.num_layers, until,
                    repeats=options.repeats, window=window, most=options.most,
                )  # fmt: skip
        for n in sizes:
            yield missed(
                scanned.samples(), scanned.num_layers, n, exact=exact, repeats=options.repeats
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scan")
    parser.add_argument("--until", type=float, default=0.99)
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--n", default="1,2,4,8,12,15")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--most", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for row in rows_of(Scan.load(options.scan), options):
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"options": vars(options), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
