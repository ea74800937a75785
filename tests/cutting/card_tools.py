"""Model cards, read and carried out as a reader would."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM

import shallower as sh
from shallower.cutting.cards import exports
from shallower.cutting.exports import CutFacts
from shallower.cutting.source import UncutModel

DROPPED = [1, 3, 4]

LICENSED = """---
license: other
license_name: own
license_link: LICENSE
language:
- en
- no
datasets: [a/b]
base_model: its/base
pipeline_tag: text2text-generation
tags:
- legal
- shallower
---
# Tiny

What its maker says.
"""


def blocks_of_code(card, language):
    return re.findall(rf"```{language}\n(.*?)\n```", card, re.DOTALL)


def front(card):
    return ModelCard(card).data.to_dict()


def texts_of(plan, source="a/tiny", **more):
    """The texts beside a cut of a model of the hub."""
    source = source if isinstance(source, UncutModel) else UncutModel(source, hub=source)
    return exports(CutFacts(plan, source, **more))


def history(card):
    """The steps by which a card says that its model was made."""
    found = re.search(r"## How it was made\n\n((?:\d+\. .+\n)+)", card)
    numbers, steps = zip(*(line.split(". ", 1) for line in found[1].splitlines()), strict=True)
    assert list(map(int, numbers)) == list(range(1, len(steps) + 1))
    return list(steps)


def one_line(command):
    return re.sub(r"\\\n *", "", command)


def cut_by(block, shallower, **places):
    """Carry out the one line of a block for the shell, with ``places`` for words in capitals."""
    program, *words = (str(places.get(word, word)) for word in shlex.split(one_line(block)))
    done = shallower(*words)
    assert (program, done.status) == ("shallower", 0), done.err


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def in_memory(source, out, dtype="bfloat16"):
    """Cut a model that is loaded."""
    model, tokenizer = sh.load_model(source, dtype=dtype)
    sh.save_model(model, tokenizer, out, plan=sh.drop_layers(model, DROPPED))


def on_disk(source, out, **options):
    """Cut a folder without loading it."""
    sh.prune(source, DROPPED, out, **options)


def ways(card, shallower):
    """What a card says to do for the same cut: a name, and how to do it."""
    return {
        "python": lambda: exec(blocks_of_code(card, "python")[0], {}),
        "command": lambda: cut_by(blocks_of_code(card, "sh")[0], shallower),
    }


def stand_for(place, source):
    """Let ``SOURCE`` in a folder be the folder of a model, where there is one."""
    place.mkdir()
    if source is not None:
        (place / "SOURCE").symlink_to(source)
    return place


def check_other_tools(card, folder, survivors):
    """The lines for other tools name what is there, and the layers that were dropped.

    The tools are not installed: their lines are read, and the files that they name. Where
    mergekit is, its line is run by test_source.
    """
    *_, serve, others = blocks_of_code(card, "sh")
    made = set()
    for line in (serve + "\n" + others).splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "vllm":
            assert words[0] == "serve"
            assert_servable(folder / words[1])
        elif program == "python":
            assert words[:2] == ["convert_hf_to_gguf.py", "."]
            assert words[2] == "--outfile"
            made.add(words[3])
        elif program == "llama-cli":
            assert words[0] == "-m"
            assert words[1] in made or (folder / words[1]).read_bytes()[:4] == b"GGUF"
        elif program == "mergekit-yaml":
            config = yaml.safe_load((folder / words[0]).read_text())
            assert kept_by(config) == list(survivors)
        else:
            assert [program, words[0]] == ["llama-quantize", "--prune-layers"]
            dropped = [int(word) for word in words[1].split(",")]
            assert sorted([*dropped, *survivors]) == list(range(len(dropped) + len(survivors)))


def assert_servable(path):
    if path.is_dir():
        assert {"config.json", "tokenizer.json"} <= {file.name for file in path.iterdir()}
    else:
        assert path.read_bytes()[:4] == b"GGUF"


def kept_by(config):
    """The layers that a config of mergekit keeps."""
    sources = [source for part in config["slices"] for source in part["sources"]]
    return [layer for source in sources for layer in range(*source["layer_range"])]


def tell_no_paths(folder, *paths):
    """No file in a folder names any of the paths, or a part of one that is this machine's."""
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix not in (".safetensors", ".gguf", ".png"):
            text = file.read_text(encoding="utf-8")
            for path in paths:
                assert str(path) not in text, file.name


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub: a function that puts a folder there as a model, and gives its place."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(folder, name):
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "blobs").mkdir()
        for file in Path(folder).iterdir():
            (repository / "blobs" / file.name).write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
        return snapshot

    return put
