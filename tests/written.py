"""Prompts, answers in files, and how many answers a model was let to write."""

import json

import pytest

from shallower.evaluation import answers

MANY = [f"w{i} w{i + 1} w{i + 2}" for i in range(40)]
"""Prompts of three tokens, more than are answered together."""


def write_prompts(path, *records):
    """A file of prompts, texts or objects, one a line."""
    lines = ({"prompt": one} if isinstance(one, str) else one for one in records)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_answered(path, tokenizer, found, **fields):
    """A file of answers with their prompts, as words."""
    records = []
    for one in found:
        written = one.written[:-1] if one.ended else one.written
        said = {"prompt": tokenizer.decode(one.given), "answer": tokenizer.decode(written)}
        records.append({**said, "ended": one.ended, **fields})
    return write_prompts(path, *records)


@pytest.fixture
def written(monkeypatch):
    """The numbers of prompts that models answer from here on."""
    counts, write = [], answers.write_answers

    def counted(decoder, tokenizer, prompts, **options):
        found = write(decoder, tokenizer, prompts, **options)
        counts.append(len(prompts))
        return found

    monkeypatch.setattr(answers, "write_answers", counted)
    return counts
