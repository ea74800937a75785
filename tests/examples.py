"""The folder and the names in which the examples of README, docs and docstrings are run."""

import json
import re
import shlex
import shutil
import textwrap

import numpy as np

import shallower as sh
from tests.conftest import WORDS, tiny_llama, write_jsonl

MODEL = "HuggingFaceTB/SmolLM2-135M"
NUM_TEXTS, NUM_HELD_OUT = 120, 32
CUT = "smol-22-layers"
# What would take minutes.
QUICKER = {"--steps 200": "--steps 2", "steps=200": "steps=2"}


def sentences(count, seed=0, length=24):
    """Words that follow from the two before, most of the time."""
    generator = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        words = list(generator.integers(0, 30, 2))
        for _ in range(length - 2):
            noise = generator.integers(0, 30) if generator.random() < 0.1 else 0
            words.append((3 * words[-1] + words[-2] + 1 + noise) % 30)
        texts.append(" ".join(WORDS[word] for word in words))
    return texts


def learned_llama(tokenizer, num_layers, steps):
    """A tiny Llama that predicts such words better than chance."""
    import torch

    model = tiny_llama(num_layers=num_layers).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    ids = torch.tensor(tokenizer(sentences(2048))["input_ids"])
    for step in range(steps):
        part = ids[step * 64 % 2048 :][:64]
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def make_folder(folder, tokenizer):
    """What examples read: a model in a folder named as its hub id, a GGUF file, texts."""
    from tests.cutting.gguf_files import write

    learned_llama(tokenizer, 30, 40).save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    write_jsonl(folder / "c4.jsonl", sentences(NUM_TEXTS, seed=1))
    write_jsonl(folder / "c4_eval.jsonl", sentences(NUM_HELD_OUT, seed=2))
    write(folder / "model.gguf", num_layers=30)
    (folder / "wikitext2.txt").write_text("\n".join(sentences(20, seed=3)))
    rows = [{"passage": one, "question": "w1 w2", "answer": one < "w2"} for one in sentences(12)]
    (folder / "benchmarks" / "boolq").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "benchmarks" / "boolq" / "val.jsonl").write_text(lines)


FENCED = r"^( *)```+ *(\w*)[^\n]*\n(.*?)^\1```+\n"
INDENTED = r"(?<=\n\n)((?: {4}[^\n]*\n|\n)+)"


def code_blocks(text):
    """(language, line number, code) of every fenced or indented block of Markdown, in order."""
    blocks = []
    pattern = re.compile(f"{FENCED}|{INDENTED}", re.MULTILINE | re.DOTALL)
    for match in pattern.finditer(f"{text}\n"):
        _, language, fenced, indented = match.groups()
        line = text[: match.start()].count("\n") + (1 if fenced is None else 2)
        code = textwrap.dedent(indented) if fenced is None else fenced
        if code.strip():
            blocks.append((language or "", line, code.strip("\n")))
    return blocks


def commands(code, program):
    """The words of every command of a program in a block for the shell."""
    for line in code.replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("$ ")
        if line.startswith(f"{program} "):
            yield shlex.split(line, comments=True)[1:]


def quicker(code):
    for slow, quick in QUICKER.items():
        code = code.replace(slow, quick)
    return code


def shorten(folder, layers):
    """The model in a folder loses some of its layers: what measures many cuts takes seconds."""
    model = folder / MODEL
    sh.prune(model, layers, folder / "shorter")
    shutil.rmtree(model)
    (folder / "shorter" / "shallower_plan.json").unlink()
    (folder / "shorter").rename(model)


def copy_folder(made, folder):
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder
