"""Objectives, settings and texts of a healing, from the patch of one cut, at equal wall time.

    python benches/objectives.py [--drop 12:20] [--steps 60] [--recipes NAME,...] [--held-out 64]
        [--texts c4.jsonl] [--eval-texts c4_eval.jsonl] [--answers 1024] [--speech]
        [--work FOLDER] [--json FILE]

On SmolLM2-135M in bfloat16. The patch is made once, and kept in `--work`, as the healed models are.
The first recipe trains for `--steps` steps of 16 sequences; every other for as many as its speed
allows in the same time, told by a few steps before. Losses are of the merged checkpoints, on two
sets that no recipe was trained on: the last `--held-out` of the texts, to choose a recipe by, and
`--eval-texts`, to report alone; differences to the patch are paired by text. Recipes with answers
train on what the whole model says to `--answers` prompts of our own, which it writes once; with
`--speech` every row tells how the model speaks on the package's own prompts, of other kinds, paired
with the first recipe.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import ClassVar

import shallower as sh
from patches import judged, read_texts
from shallower.evaluation.speech import Reference, Speaking
from shallower.healing import training
from shallower.judgement.judges.judge import LossJudge, judged_batches
from shallower.models.decoder import Decoder
from shallower.models.layerwise import Layerwise
from shallower.models.source import ModelSource
from shallower.store.given_models import ModelStore
from shallower.store.inputs import model_inputs
from shallower.store.store import open_store
from shallower.studies import demo
from shallower.studies.answers import WantedAnswers
from shallower.texts.prompts import prompt_ids, read_prompts
from shallower.values.layers import parse_layers
from shallower.values.tokens import Tokens

RECIPES = {
    "lm": {},
    "kd": {"objective": "kd"},
    "lm rate 2e-3": {"learning_rate": 2e-3},
    "lm rate 4e-3": {"learning_rate": 4e-3},
    "lm no attention": {"attention": False},
    "lm rank 128": {"rank": 128},
    "lm dropout": {"dropout": 0.05},
    "lm answers": {"share": 1.0},
    "lm half": {"share": 0.5},
    "lm quarter": {"share": 0.25},
    "kd answers": {"objective": "kd", "share": 1.0},
    "kd half": {"objective": "kd", "share": 0.5},
}
"""What differs from our recipe for small models."""


FEW = 4
"""Steps by which the time of a step is told; the first ones of a training are slower."""


class Clock(training.Throughput):
    """Keeps the seconds of every step of the training that was last."""

    took: ClassVar[list[float]] = []

    def on_step_end(self, args, state, control, **options):
        before = self._seconds
        super().on_step_end(args, state, control, **options)
        Clock.took.append(self._seconds - before)


training.Throughput = Clock


@dataclass
class Bench:
    """A patched cut on disk, the texts that train, and the judges by what they are for."""

    options: argparse.Namespace

    def __post_init__(self):
        options, self.work = self.options, self.options.work
        texts = read_texts(options.texts)
        self.texts, held_out = texts[: -options.held_out], texts[-options.held_out :]
        self.recipe = sh.Recipe(
            steps=options.steps, dtype=options.dtype, max_length=options.max_length,
            learning_rate=options.learning_rate, rank=options.rank,
        )  # fmt: skip
        self.whole, self.patched = self.work / "whole", self.work / "patched"
        tokenizer = self._patch()
        reports = read_texts(options.eval_texts, options.items)
        tokens = Tokens(options.max_length or 256, 8)
        self.judges = {
            name: LossJudge(judged_batches(tokenizer, some, tokens))
            for name, some in (("choose", held_out), ("report", reports))
        }
        self.scores, self.first = self.judged(self.patched), None
        self.reference = None
        self.spoken = self.speech(self.patched) if options.speech else None

    def _patch(self):
        """Save the whole model and the patched cut, unless an earlier run did."""
        options = self.options
        place = options.model or demo.model_path()
        model, tokenizer = sh.load_model(place, dtype=options.dtype)
        source = ModelSource(place, options.dtype)
        store = open_store(False)
        kept = ModelStore(store, model_inputs(source, store), [])
        wanted = WantedAnswers(None, options.answers, options.answer_tokens)
        self.answers, self.source = None, source
        if any("share" in RECIPES[name] for name in options.recipes):
            self.answers = wanted.by(Decoder.of(model), tokenizer, self.texts, store=kept)
        if not self.patched.exists():
            sh.save_model(model, tokenizer, self.whole, overwrite=True)
            layers = parse_layers(options.drop)
            done = sh.patch(model, tokenizer, layers, texts=self.texts, num_tokens=options.tokens)
            sh.save_patched(model, tokenizer, self.patched, done=done)
        return tokenizer

    def speech(self, place):
        """How a checkpoint speaks beside the whole model, on prompts of our own."""
        whole, tokenizer = self.source.load()
        decoder = Decoder.of(whole)
        if self.reference is None:
            ids = prompt_ids(tokenizer, read_prompts(limit=self.options.prompts))
            self.reference = Reference.of(Speaking(tokenizer, ids), decoder)
        model, _ = sh.load_model(place, dtype=self.options.dtype)
        spoken = self.reference.compare(Decoder.of(model), decoder)
        return self.reference.judged(spoken, decoder)

    def judged(self, place):
        """The scores of a checkpoint, by what the texts are for."""
        model, _ = sh.load_model(place, dtype=self.options.dtype)
        layerwise = Layerwise(Decoder.of(model))
        return {name: judged(layerwise, judge) for name, judge in self.judges.items()}

    def heal(self, recipe, name, *, with_answers=False):
        """The seconds of the steps of a healing, and its place."""
        out = self.work / name
        for leftover in (out, self.work / f".{name}.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        recipe = replace(recipe, eval_every=max(1, recipe.steps or 1))
        answers = self.answers if with_answers else None
        Clock.took = []
        sh.heal(
            self.patched, self.texts, out, recipe=recipe, merge=True, answers=answers,
            original=self.whole if recipe.objective != "lm" else None, progress=False,
        )  # fmt: skip
        return Clock.took, out

    def row(self, name, seconds):
        """The row of a recipe in so many seconds, told by a few steps; the first one sets them."""
        changes = RECIPES[name]
        recipe, answers = replace(self.recipe, **changes), "share" in changes
        if seconds is not None:
            few = replace(recipe, steps=FEW)
            of_step = median(self.heal(few, "probe", with_answers=answers)[0])
            recipe = replace(recipe, steps=max(2, round(seconds / of_step)))
        took, out = self.heal(recipe, name.replace(" ", "-"), with_answers=answers)
        row = {"recipe": name, "changes": changes, "steps": len(took), "seconds": sum(took)}
        row["as_probed"] = len(took) * median(took[:FEW])
        for kind, scores in self.judged(out).items():
            less = scores.minus(self.scores[kind])
            row[kind] = {"loss": scores.mean, "stderr": scores.stderr, "less": less.to_json()}
        if self.options.speech:
            row["speech"] = self._speech_row(out)
        return row

    def _speech_row(self, place):
        speech = self.speech(place)
        self.first = self.first or speech
        less = {key: one.to_json() for key, one in speech.minus(self.first).items()}
        return {**speech.to_json(), "less_than_first": less}


def line(row):
    told = [
        f"{kind} {row[kind]['loss']:.4f} ({row[kind]['less']['mean']:+.4f} ± "
        f"{row[kind]['less']['stderr']:.4f})"
        for kind in ("choose", "report")
    ]
    if speech := row.get("speech"):
        told += [
            f"{name} {speech[name]:.3f} ({speech['less_than_first'][name]['mean']:+.3f} ± "
            f"{speech['less_than_first'][name]['stderr'] or 0:.3f})"
            for name in ("acceptance", "divergence", "repetition")
        ]
    return f"{row['recipe']:<24} {row['steps']:>9} steps {row['seconds']:6.0f} s  {'  '.join(told)}"


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("SHALLOWER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--model", help="another model than SmolLM2-135M")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--texts", type=Path, default=data / "text" / "c4.jsonl")
    parser.add_argument("--eval-texts", type=Path, default=data / "text" / "c4_eval.jsonl")
    parser.add_argument("--drop", default="12:20")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--tokens", type=int, default=131_072, help="of the patch")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--items", type=int, help="the first so many texts report; all by default")
    parser.add_argument("--answers", type=int, default=1024, help="prompts that are answered")
    parser.add_argument("--answer-tokens", type=int, default=192, help="of an answer, at most")
    parser.add_argument("--speech", action="store_true", help="measure how each speaks")
    parser.add_argument("--prompts", type=int, default=120, help="of our own that it speaks on")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=list(RECIPES))
    parser.add_argument("--work", type=Path, default=Path("target") / "objectives")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, as found")
    options = parser.parse_args()
    if unknown := set(options.recipes) - set(RECIPES):
        sys.exit(f"--recipes: no {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    return options


def main():
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    bench, rows, seconds = Bench(options), [], None
    for name in options.recipes:
        row = bench.row(name, seconds)
        seconds = row["as_probed"] if seconds is None else seconds
        rows.append(row)
        print(line(row), flush=True, file=sys.stderr)
        if options.json:
            command = " ".join(["python", "benches/objectives.py", *sys.argv[1:]])
            patched = {
                kind: {"loss": scores.mean, "stderr": scores.stderr}
                for kind, scores in bench.scores.items()
            }
            if bench.spoken is not None:
                patched["speech"] = bench.spoken.to_json()
            record = {"command": command, "dtype": options.dtype, "patched": patched, "rows": rows}
            options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
