"""Width beside depth: parameters taken out of layers, out of feed-forwards, and out of both.

    python benches/width.py [--layers 8,6,4] [--tokens 32768] [--texts c4.jsonl]
        [--eval-texts c4_eval.jsonl] [--windows FILE] [--json FILE]

As many parameters as some layers of SmolLM2-135M hold go in three ways: (a) those layers, as `run`
chooses them; (b) the same number of neurons from every feed-forward, a uniform
`intermediate_size`; (c) fewer layers and fewer neurons, the best of four splits on the texts held
out of the fit. Neurons stay by the root mean square of their activation times the norm of the
column that they write by. Then our least squares solve matrices anew towards the whole model's
state: both that write in a layer before a block, in (b) and (c) the down-projections of all others
too. Then all matrices from the first that changed on take the same steps of a patch.

Losses are of texts that had no part in fit or choice, and paired; decode and prefill are timed in
turn. First is asserted: without a neuron less, the states are those of the whole model.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

import shallower as sh
from patches import judged, read_texts, windows
from shallower.judgement.judges.judge import LossJudge, judged_batches
from shallower.models.layerwise import Layerwise, rows
from shallower.patching.checkpoint import Changes, PatchCheckpoint
from shallower.patching.descent import Descent, keep_best
from shallower.patching.solver import Solver
from shallower.patching.states import divide
from shallower.savings.timing import time_forwards
from shallower.studies import demo
from shallower.values.tokens import Tokens

LENGTH = 256
CHOSEN = {
    1: [14],
    2: [14, 15],
    3: [13, 14, 15],
    4: [12, 16, 17, 18],
    5: [14, 15, 16, 17, 18],
    6: [13, 14, 15, 16, 17, 18],
    8: [5, 12, 13, 14, 15, 16, 17, 18],
}
"""Layers that `curve` and `run` recommend for SmolLM2-135M, by their number."""

GRAIN = 8
"""Neurons that stay are a multiple of it."""


class WidthSolver(Solver):
    """Solves a model with fewer layers, fewer neurons or both towards the whole one's states."""

    def __init__(self, whole, slim, dropped, fitted, held_out):
        num_layers = len(whole)
        plan = sh.Plan.of(num_layers, dropped or [0])
        super().__init__(slim, plan, fitted, held_out, Changes())
        self.source = whole
        self.survivors = [layer for layer in range(num_layers) if layer not in dropped]
        self._before = {block.start - 1 for block in plan.blocks} if dropped else set()
        self._solving = False
        self._bar = lambda *_: None
        self._checkpoint = PatchCheckpoint(None, plan, self._batches, (0.0, 0.0))

    def _advance_whole(self, layer, target):
        for states in self.whole:
            for index, batch in enumerate(states.batches):
                states[index] = self.source.run(batch, states[index], range(layer, target))

    @property
    def targets(self):
        """By layer: how far the whole model has come where the next layer that stays begins."""
        behind = [*self.survivors[1:], len(self.source)]
        return dict(zip(self.survivors, behind, strict=True))

    @torch.no_grad()
    def solve(self, everywhere):
        """Solve all layers that stay, or those before blocks; the held-out loss afterwards."""
        self._open()
        self._embed()
        first = 0 if everywhere else min(self._before)
        self.first = first
        self._advance_whole(0, first)
        self._keep_start()
        for layer, stop in self.targets.items():
            if layer < first:
                continue
            self._advance_whole(layer, stop)
            if everywhere or layer in self._before:
                self._solving = True
                fit = self._fit(layer, stop)
                self._solving = False
                self.first_weight, self.ridge = fit.first_weight, fit.ridge
            self._advance(self.cut, (layer,))
        return self._loss(len(self.source))

    def _give_attention_its_share(self, layer, attention, other):
        """Before a block, as in a patch; elsewhere the down-projection alone is solved."""
        if layer not in self._before:
            return None
        return super()._give_attention_its_share(layer, attention, other)

    def _loss(self, layer, layers=None, states=None):
        """The held-out loss; nobody asks for it between two layers."""
        return math.nan if self._solving else super()._loss(layer, layers, states)

    @torch.no_grad()
    def descend(self, nats):
        """Take the steps of a patch from what was solved."""
        fitted, held_out = self._starts
        layers = [layer for layer in self.survivors if layer >= self.first]
        descent = Descent(self.model, layers, whole=self.whole[0], cut=fitted, changes=self.changes)
        descent.run()
        return keep_best(descent, lambda: self._loss(self.first, states=held_out), nats)


def feed_forwards(model):
    return [layer.mlp for layer in model.model.layers]


@torch.no_grad()
def importance(model, batches):
    """(L, F): the root mean square of a neuron's activation times its column's norm."""
    taken, sums, count = {}, 0.0, 0
    hooks = [
        mlp.down_proj.register_forward_pre_hook(
            lambda _m, args, place=place: taken.__setitem__(place, args[0])
        )
        for place, mlp in enumerate(feed_forwards(model))
    ]
    layerwise = Layerwise(model)
    for batch in batches:
        layerwise.run(batch, layerwise.embed(batch), range(len(layerwise)))
        squares = [
            rows(taken[place], batch.learned).double().square().sum(0) for place in sorted(taken)
        ]
        sums, count = sums + torch.stack(squares), count + int(batch.learned.sum())
    for hook in hooks:
        hook.remove()
    norms = torch.stack([mlp.down_proj.weight.double().norm(dim=0) for mlp in feed_forwards(model)])
    return (sums / count).sqrt() * norms


@torch.no_grad()
def narrow(model, scores, neurons):
    """Keep the neurons of the highest scores in every layer, in their order."""
    for mlp, score in zip(feed_forwards(model), scores, strict=True):
        stay = score.topk(neurons).indices.sort().values
        for linear, axis in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            linear.weight = torch.nn.Parameter(
                linear.weight.index_select(axis, stay).contiguous(), requires_grad=False
            )
        mlp.gate_proj.out_features = mlp.up_proj.out_features = neurons
        mlp.down_proj.in_features = mlp.intermediate_size = neurons
    model.config.intermediate_size = neurons


def neurons_for(model, num_dropped, total):
    """Neurons that stay where so many layers go and ``total`` parameters in all."""
    layer = model.model.layers[0]
    each = sum(p.numel() for p in layer.parameters())
    stay = len(model.model.layers) - num_dropped
    neuron = 3 * model.config.hidden_size
    less = max(0, total - num_dropped * each) / (stay * neuron)
    return int((model.config.intermediate_size - less) // GRAIN * GRAIN)


class Comparison:
    """The whole model, texts and judges, and what each way makes of it."""

    def __init__(self, options):
        self.options = options
        self.model, self.tokenizer = sh.load_model(
            options.model or demo.model_path(), dtype=options.dtype
        )
        self.model.requires_grad_(False)
        self.whole = Layerwise(self.model)
        self.fitted, self.held_out = divide(
            self.tokenizer,
            read_texts(options.texts),
            tokens=Tokens(LENGTH, 16),
            num_tokens=options.tokens,
        )
        report = read_texts(options.eval_texts, options.items)
        tokens = Tokens(LENGTH, 16)
        self.judges = {
            options.eval_texts.stem: LossJudge(judged_batches(self.tokenizer, report, tokens))
        }
        if options.windows:
            batches = windows(self.tokenizer, options.windows, options.num_windows)
            self.judges[options.windows.stem] = LossJudge(batches)
        self.scores = importance(self.model, self.fitted)
        self.rows = []
        self._check()
        self.original = self._judged(self.whole)

    def _check(self):
        """Without a neuron less, the states are those of the whole model."""
        slim = copy.deepcopy(self.model)
        narrow(slim, self.scores, self.model.config.intermediate_size)
        same, batch = Layerwise(slim), self.fitted[0]
        first, second = (
            one.run(batch, one.embed(batch), range(len(one))) for one in (same, self.whole)
        )
        assert torch.equal(first, second)

    @torch.no_grad()
    def _judged(self, layerwise, layers=None):
        return {name: judged(layerwise, judge, layers) for name, judge in self.judges.items()}

    def make(self, dropped, neurons):
        """A solved model: its solver, its held-out loss, its model without the layers that go."""
        slim = copy.deepcopy(self.model)
        everywhere = neurons < self.model.config.intermediate_size
        if everywhere:
            narrow(slim, self.scores, neurons)
        solver = WidthSolver(self.whole, Layerwise(slim), dropped, self.fitted, self.held_out)
        started = time.process_time()
        nats = solver.solve(everywhere)
        return solver, nats, slim, time.process_time() - started

    def way(self, name, made, dropped, neurons):
        """Measure a way: after the least squares, and after the steps."""
        solver, nats, slim, seconds = made
        solved = self._judged(solver.model, solver.survivors)
        started = time.process_time()
        nats = solver.descend(nats)
        stepping = time.process_time() - started
        found = self._judged(solver.model, solver.survivors)
        if dropped:
            sh.drop_layers(slim, dropped)
        parameters = sum(p.numel() for p in slim.parameters())
        before = sum(p.numel() for p in self.model.parameters())
        row = {
            "way": name, "dropped": dropped, "neurons": neurons, "parameters": parameters,
            "share": 1 - parameters / before, "held_out": nats,
            "fit_cpu": seconds, "steps_cpu": stepping, "losses": {},
        }  # fmt: skip
        for texts, scores in found.items():
            lost = scores.minus(self.original[texts])
            row["losses"][texts] = {
                "solved": solved[texts].mean, "loss": scores.mean, "stderr": scores.stderr,
                "lost": lost.mean, "lost_stderr": lost.stderr,
            }  # fmt: skip
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        return found, slim

    def level(self, count):
        """The three ways of taking what ``count`` layers hold."""
        whole = self.model.config.intermediate_size
        each = sum(p.numel() for p in self.model.model.layers[0].parameters())
        total = count * each
        found, models = {}, {}
        found["a"], models["a"] = self.way(
            "a", self.make(CHOSEN[count], whole), CHOSEN[count], whole
        )
        neurons = neurons_for(self.model, 0, total)
        found["b"], models["b"] = self.way("b", self.make([], neurons), [], neurons)
        splits = sorted(
            {max(1, round(count * share)) for share in (0.2, 0.4, 0.6, 0.8)} & {*CHOSEN}
        )
        tried = []
        for fewer in splits:
            dropped, neurons = CHOSEN[fewer], neurons_for(self.model, fewer, total)
            tried.append((self.make(dropped, neurons), dropped, neurons))
            print(f"(c) {dropped} {neurons}: {tried[-1][0][1]:.4f}", file=sys.stderr, flush=True)
        best = min(tried, key=lambda one: one[0][1])
        tried = [[made[1], *split] for made, *split in tried]  # and free the states of the others
        found["c"], models["c"] = self.way("c", *best)
        for texts in self.judges:
            for way in "bc":
                less = found[way][texts].minus(found["a"][texts])
                row = {"layers": count, "texts": texts, "way": f"{way} less a"}
                row |= {"nats": less.mean, "stderr": less.stderr}
                self.rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
        self.rows.append({"layers": count, "tried": tried, "times": timed(models)})
        print(json.dumps(self.rows[-1]), file=sys.stderr, flush=True)


def timed(models, rounds=7, context=512):
    """Median ratios to way (a) of the times of a prefill and of a decoded token, in turn."""
    times = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(time_forwards(model, context=context, steps=24))
    found = {}
    for name, some in times.items():
        ratios = np.divide(some, times["a"])
        errors = ratios.std(axis=0, ddof=1) / np.sqrt(rounds)
        kinds = zip(("prefill", "decode"), np.median(ratios, axis=0), errors, strict=True)
        found[name] = {kind: [float(ratio), float(error)] for kind, ratio, error in kinds}
    return found


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("SHALLOWER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--model", help="another model of Llama's shape than SmolLM2-135M")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", default="8,6,4", help="layers whose parameters go")
    parser.add_argument("--texts", type=Path, default=data / "text" / "c4.jsonl")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens to fit")
    parser.add_argument("--eval-texts", type=Path, default=data / "text" / "c4_eval.jsonl")
    parser.add_argument("--items", type=int, help="the first so many texts report; all by default")
    parser.add_argument("--windows", type=Path, metavar="FILE", help="a text file that reports too")
    parser.add_argument("--num-windows", type=int, default=60)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    return parser.parse_args()


def main():
    options = parse()
    comparison = Comparison(options)
    for count in map(int, options.layers.split(",")):
        comparison.level(count)
        if options.json:
            command = " ".join(["python", "benches/width.py", *sys.argv[1:]])
            record = {"command": command, "dtype": options.dtype, "rows": comparison.rows}
            options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
