"""What a cut brings as a draft of its own parent, by the clock beside the formula.

    python benches/draft.py [--n 8,15,20,22] [--states bare,patched] [--cut FOLDER] [--prompts 16]
        [--new-tokens 64] [--pairs 3] [--work FOLDER] [--json FILE]

On SmolLM2-135M-Instruct. A cut is the block of least angular distance of each size, bare and
patched (patches are kept in `--work`), or lies in a `--cut FOLDER`, of which there may be several.
The whole model continues each prompt greedily; α is the share of its tokens that the cut chooses,
too, with an error by prompt, and c the time of a token of both in turns. Drafts have the length
that the formula of 2211.17192 calls the best, or 1 where none pays, always the same, with no
threshold of confidence. Asserted first: the text with a draft is that without, but for ties of the
whole model's logits, whose prompts are told and not timed. Then both ways run in turns. Beside the
ratio of their times stand the formula's S, and S with the time that the whole model really takes
to read a draft and one token more.
"""

import argparse
import copy
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

import shallower as sh
from patches import read_texts
from shallower.runs import demo
from shallower.savings.timing import STEPS, settle, time_forwards, title_of
from shallower.texts.prompts import SPEECH_PROMPTS, Prompt, prompt_ids, read_prompts
from shallower.values.draft import Draft, speedup
from shallower.values.provenance import versions
from shallower.values.scores import Scores

OWN = (
    "The capital of France is", "Once upon a time there was a fox who",
    "To bake bread at home, first", "The three states of matter are",
    "Dear Sir or Madam, I am writing to", "In Python, a list is sorted by",
    "The most important thing about friendship is", "Water boils at a lower temperature when",
)  # fmt: skip
"""Prompts where the package brings none."""

TIES = {"float32": 1e-3, "bfloat16": 0.25}
"""Differences of logits below which two tokens are a tie, by the dtype of the weights."""

SCANNED = 64
"""Texts that choose the layers of a cut."""


class Rounds(BaseStreamer):
    """The tokens that each forward of the whole model yields."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value.numel())

    def end(self):
        """What was put first is the prompt."""
        del self.tokens[0]


@dataclass
class Bench:
    """The whole model, its prompts, (1, P) each, and the texts that it says behind them."""

    whole: torch.nn.Module
    prompts: list
    new_tokens: int
    eos: int
    dtype: str

    def __post_init__(self):
        self.texts = [self.say(prompt) for prompt in self.prompts]
        self.context = int(np.mean([prompt.shape[1] for prompt in self.prompts]))
        self.context += self.new_tokens // 2

    def say(self, prompt, draft=None, streamer=None):
        """The tokens that the whole model says behind a prompt, with a draft or alone."""
        said = self.whole.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=self.new_tokens, eos_token_id=self.eos, pad_token_id=self.eos,
            assistant_model=draft, streamer=streamer,
        )  # fmt: skip
        return said[0, prompt.shape[1] :]

    @torch.inference_mode()
    def chosen(self, model, prompt, text):
        """The logits of a model where each token of a text was to be chosen, (T, V)."""
        ids = torch.cat([prompt[0], text])[None]
        return model(ids).logits[0, prompt.shape[1] - 1 : -1].float()

    def acceptance(self, cut):
        """The share of the texts' tokens that a cut chooses, too, by prompt."""
        pairs = list(zip(self.prompts, self.texts, strict=True))
        same = [(self.chosen(cut, *pair).argmax(-1) == pair[1]).sum().item() for pair in pairs]
        return Scores(np.array(same, float), np.array([len(text) for text in self.texts], float))

    def cost(self, cut, pairs):
        """The time of a token of a cut by that of the whole model, in turns: all ratios."""
        ratios = []
        for repeat in range(pairs + 1):
            models = (self.whole, cut) if repeat % 2 else (cut, self.whole)
            times = {id(one): time_forwards(one, context=self.context)[1] for one in models}
            ratios.append(times[id(cut)] / times[id(self.whole)])
        return ratios[1:]

    def reading(self, length, pairs):
        """The time in which the whole model reads a draft and one token, by that of a token."""
        ratios = []
        for _ in range(pairs + 1):
            one, many = (self._read(tokens) for tokens in (1, length + 1))
            ratios.append(many / one)
        return median(ratios[1:])

    @torch.inference_mode()
    def _read(self, tokens):
        ids = torch.arange(self.context + tokens)[None] % self.whole.config.vocab_size
        cache, times = self.whole(ids[:, : self.context], use_cache=True).cache, []
        for _ in range(STEPS):
            settle(self.whole.device)
            begun = time.perf_counter()
            self.whole(ids[:, self.context :], cache=cache, use_cache=True)
            settle(self.whole.device)
            times.append(time.perf_counter() - begun)
            cache.crop(-tokens)
        return median(times)

    def check(self, cut, length):
        """The prompts whose text is another with a draft, by a tie, and what was accepted."""
        different, accepted, rejected, proposed = [], 0, 0, 0
        for place, (prompt, text) in enumerate(zip(self.prompts, self.texts, strict=True)):
            rounds = Rounds()
            said = self.say(prompt, cut, rounds)
            if not torch.equal(said, text):
                different.append({"prompt": place, **self._apart(prompt, text, said)})
            done = 0
            for tokens in rounds.tokens:
                asked, done = min(length, self.new_tokens - done - 1), done + tokens
                if done == len(said) and said[-1] == self.eos:
                    asked = tokens - 1
                accepted += tokens - 1
                proposed += asked
                rejected += tokens - 1 < asked
        return different, accepted / max(1, accepted + rejected), accepted / max(1, proposed)

    def _apart(self, prompt, text, said):
        """Where two texts part, and how near the whole model's logits of both tokens are."""
        most = min(len(text), len(said))
        place = int((text[:most] != said[:most]).int().argmax())
        logits = self.chosen(self.whole, prompt, text)[place]
        gap = abs(float(logits[text[place]] - logits[said[place]]))
        assert gap < TIES[self.dtype], f"token {place} is another with a draft, by {gap} of logits"
        return {"token": place, "gap": gap}

    def times(self, cut, pairs, skipped):
        """The ratio of the seconds without a draft to those with one, by repeat and prompt."""
        kept = [prompt for place, prompt in enumerate(self.prompts) if place not in skipped]
        rows = [[self._turn(cut, prompt, repeat) for prompt in kept] for repeat in range(pairs)]
        seconds = np.array(rows).reshape(pairs, len(kept), 2)
        return seconds[..., 0] / seconds[..., 1], seconds.sum((0, 1))

    def _turn(self, cut, prompt, repeat):
        seconds = {}
        for draft in (None, cut) if repeat % 2 else (cut, None):
            begun = time.perf_counter()
            self.say(prompt, draft)
            seconds[draft is cut] = time.perf_counter() - begun
        return seconds[False], seconds[True]

    def row(self, name, cut, pairs):
        """All that is found of a cut."""
        found, costs = self.acceptance(cut), self.cost(cut, pairs)
        draft = Draft(median(costs), found.mean, found.stderr)
        length = draft.length or 1
        cut.generation_config.num_assistant_tokens = length
        cut.generation_config.num_assistant_tokens_schedule = "constant"
        cut.generation_config.assistant_confidence_threshold = 0.0
        different, drafted, share = self.check(cut, length)
        ratios, seconds = self.times(cut, pairs, {one["prompt"] for one in different})
        expected, reading = speedup(found.mean, draft.cost, length), self.reading(length, pairs)
        taken = (1 + length * draft.cost) / (reading + length * draft.cost)
        return {
            "cut": name, "num_layers": cut.config.num_hidden_layers, "pays": bool(draft.length),
            "length": length, "acceptance": found.mean, "acceptance_stderr": found.stderr,
            "acceptance_drafting": drafted, "accepted_of_proposed": share,
            "cost": draft.cost, "cost_range": [min(costs), max(costs)], "reading": reading,
            "expected": expected, "expected_stderr": draft.speedup_stderr,
            "expected_with_reading": expected * taken, "num_tokens": sum(map(len, self.texts)),
            "different": different, "num_timed": ratios.shape[1],
            "ratio": float(np.median(ratios)) if ratios.size else None,
            "ratio_range": [float(ratios.min()), float(ratios.max())] if ratios.size else None,
            "seconds": {"alone": seconds[0], "with_draft": seconds[1]},
        }  # fmt: skip


def cuts(options, model, tokenizer):
    """The names of the cuts, and each when it is asked for."""
    for folder in options.cut:
        yield folder.name, sh.load_model(folder, dtype=options.dtype)[0]
    if not options.n:
        return
    texts = read_texts(options.texts)
    scan = sh.scan(model, tokenizer, texts[:SCANNED])
    for n in options.n:
        for state in options.states:
            place = options.work / f"patched-{n}-{options.tokens}"
            if state == "patched" and place.exists():
                yield place.name, sh.load_model(place, dtype=options.dtype)[0]
                continue
            cut = copy.deepcopy(model)
            try:
                if state == "bare":
                    sh.drop_layers(cut, scan.plan(n))
                else:
                    plan, tokens = scan.plan(n), options.tokens
                    done = sh.patch(cut, tokenizer, plan, texts=texts, num_tokens=tokens)
                    sh.save_patched(cut, tokenizer, place, done=done)
            except sh.PatchError as error:
                print(f"{state} without {n}: {error}", file=sys.stderr)
                continue
            yield place.name if state == "patched" else f"bare-{n}", cut


def line(row):
    clock = "not timed"
    if row["ratio"] is not None:
        clock = f"{row['ratio']:.3f} [{row['ratio_range'][0]:.3f}, {row['ratio_range'][1]:.3f}]"
    return (
        f"{row['cut']}, {row['num_layers']} layers: α {row['acceptance']:.3f} ± "
        f"{row['acceptance_stderr']:.3f} ({row['acceptance_drafting']:.3f} of drafts), c "
        f"{row['cost']:.3f}, γ {row['length']}{'' if row['pays'] else ' (none pays)'}, reads in "
        f"{row['reading']:.2f}; S {row['expected']:.3f}, so read {row['expected_with_reading']:.3f}"
        f", by the clock {clock}; {len(row['different'])} texts differ by ties"
    )


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("SHALLOWER_DATA", Path(__file__).parents[2] / "shared" / "data"))
    parser.add_argument("--model", help="another model than SmolLM2-135M")
    parser.add_argument("--dtype", default="float32", choices=list(TIES))
    parser.add_argument("--n", type=lambda text: [int(n) for n in text.split(",") if n],
                        default=[8, 15, 20, 22], help="layers that go; none by --n ''")  # fmt: skip
    parser.add_argument("--states", type=lambda text: text.split(","), default=["bare", "patched"])
    parser.add_argument("--cut", type=Path, action="append", default=[], metavar="FOLDER")
    parser.add_argument("--texts", type=Path, default=data / "text" / "c4.jsonl")
    parser.add_argument("--tokens", type=int, default=32_768, help="of a patch")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("target") / "draft")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, as found")
    options = parser.parse_args()
    if unknown := set(options.states) - {"bare", "patched"}:
        sys.exit(f"--states: no {', '.join(sorted(unknown))}; there are bare, patched")
    return options


def main():
    options = parse()
    model, tokenizer = sh.load_model(options.model or demo.model_path(), dtype=options.dtype)
    brought = SPEECH_PROMPTS.is_file()
    prompts = read_prompts(limit=options.prompts) if brought else [*map(Prompt, OWN)]
    ids = [torch.tensor(one)[None] for one in prompt_ids(tokenizer, prompts[: options.prompts])]
    bench = Bench(model, ids, options.new_tokens, tokenizer.eos_token_id, options.dtype)
    rows = []
    for name, cut in cuts(options, model, tokenizer):
        rows.append(bench.row(name, cut, options.pairs))
        print(line(rows[-1]), flush=True, file=sys.stderr)
        if options.json:
            record = {
                "command": " ".join(["python", "benches/draft.py", *sys.argv[1:]]),
                "machine": title_of(model.device), "versions": versions(),
                "dtype": options.dtype, "prompts": len(ids), "rows": rows,
            }  # fmt: skip
            options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
