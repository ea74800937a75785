"""The folder and the names in which the examples of README, docs and docstrings are run."""

import json
import re
import shlex
import shutil
import textwrap
from itertools import zip_longest

import numpy as np

from tests.conftest import WORDS, tiny_llama, write_jsonl

MODEL = "HuggingFaceTB/SmolLM2-135M"
NUM_TEXTS, NUM_HELD_OUT = 120, 32
CUT = "smol-22-layers"
LARGE = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-70b-hf"
"""Models of the documents that no test has: a small one lies in a folder of each name."""
# What would take minutes.
QUICKER = {
    "--steps 200": "--steps 2",
    "--steps 5000": "--steps 2",
    "steps=200": "steps=2",
    "--answers --": "--answers --answer-tokens 8 --",
}


def sentences(count, seed=0, length=24):
    """Words that follow from the one before, most of the time."""
    generator = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        words = [generator.integers(0, 30)]
        for _ in range(length - 1):
            noise = generator.integers(0, 30) if generator.random() < 0.1 else 0
            words.append((3 * words[-1] + 1 + noise) % 30)
        texts.append(" ".join(WORDS[word] for word in words))
    return texts


def learned_llama(tokenizer, num_layers):
    """A tiny Llama that predicts such words much better than chance, with every layer's help."""
    model = tiny_llama(num_layers=num_layers, initializer_range=0.05)
    return fit_head(model, tokenizer(sentences(256))["input_ids"])


def fit_head(model, ids):
    """Fit the last matrix of a random model to rows of tokens.

    What it learns is convex: the same on every machine, where a training leads elsewhere.
    """
    import torch

    ids = torch.tensor(ids)
    with torch.no_grad():
        states = model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1).double()
    weight = torch.zeros(model.lm_head.weight.shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        missed = torch.nn.functional.cross_entropy(states @ weight.T, ids[:, 1:].flatten())
        found = missed + 1e-3 * weight.square().mean()
        found.backward()
        return found

    optimizer.step(loss)
    with torch.no_grad():
        model.lm_head.weight.copy_(weight)
    return model


def make_folder(folder, tokenizer):
    """What examples read: a model in a folder named as its hub id, a GGUF file, texts."""
    from tests.cutting import embedders
    from tests.cutting.mixtures import mixture
    from tests.models.gguf_files import write_family
    from tests.scanning import state_files

    learned_llama(tokenizer, 30).save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    mixture("mixtral", 8, num_hidden_layers=2).save_pretrained(folder / "mixture")
    tokenizer.save_pretrained(folder / "mixture")
    embedders.write(folder / "embedder", tokenizer, num_layers=28)
    write_jsonl(folder / "c4.jsonl", sentences(NUM_TEXTS, seed=1))
    write_jsonl(folder / "c4_eval.jsonl", sentences(NUM_HELD_OUT, seed=2))
    short = learned_llama(tokenizer, 10)
    for name in LARGE:
        short.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_jsonl(folder / "mine.jsonl", sentences(NUM_TEXTS, seed=4))
    write_jsonl(folder / "mine_eval.jsonl", sentences(NUM_HELD_OUT, seed=5))
    write_items(folder / "items.jsonl", sentences(16, seed=6))
    write_family(folder / "model.gguf", "llama", block_count=30, context_length=512)
    (folder / "notes.txt").write_text("\n".join(sentences(48, seed=7, length=12)))
    state_files.write(folder / "states.safetensors", state_files.walk(num_states=31))
    (folder / "wikitext2.txt").write_text("\n".join(sentences(20, seed=3)))
    rows = [{"passage": one, "question": "w1 w2", "answer": one < "w2"} for one in sentences(12)]
    (folder / "benchmarks" / "boolq").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "benchmarks" / "boolq" / "val.jsonl").write_text(lines)


def write_items(path, texts):
    """Items of the judge options: how each text goes on, and a word that does not follow."""
    items = []
    for text in texts:
        context, last = text.rsplit(" ", 1)
        items.append({"context": context, "options": [last, WORDS[-1]], "answer": 0})
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


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


def links(text):
    """The places within the repository that Markdown links to, outside its blocks, with anchors."""
    prose = re.sub(FENCED, "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(text):
    """The anchors of the headings of Markdown, and of the names that API pages are made from."""
    prose = re.sub(FENCED, "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)", prose, re.MULTILINE)
    names = re.findall(r"^::: (\S+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings} | {*names}


def with_output(blocks):
    """Blocks with what they print: the indented block right below, where there is one."""
    for (kind, line, code), below in zip_longest(blocks, blocks[1:]):
        ends = line + code.count("\n") + 3
        is_output = kind == "python" and below is not None and below[:2] == ("", ends)
        yield kind, line, code, below[2] if is_output else None


SHOWN = "text"
"""The language of blocks that are shown, not run: output, and what needs more than tests have."""


def shown(blocks, programs):
    """(line, text) of every line of a shown block that holds a command of one of the programs."""
    called = re.compile(rf"(^|[\s;&|])({'|'.join(map(re.escape, programs))}) [\w.-]")
    for kind, line, code in blocks:
        for number, text in enumerate(code.splitlines(), line):
            if kind == SHOWN and called.search(text):
                yield number, text


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


def shorten(folder):
    """A model of 10 layers in place of that of 30: what measures many cuts takes seconds."""
    copy_folder(folder / LARGE[0], folder / MODEL)


def copy_folder(made, folder):
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder
