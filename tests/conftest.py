"""What the tests share: tiny random models for structure, and the real one for numbers.

Heavy packages are imported where they are used: a room without models is tested in seconds.
"""

import atexit
import gc
import json
import os
import secrets
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from tests.commands import Done

settings.register_profile("fast", max_examples=30, deadline=None)
settings.register_profile("slow", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

# Tiny models on busy cores: threads that wait for each other cost tenfold. Read when torch loads.
os.environ["OMP_NUM_THREADS"] = "1"
# No test waits for the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# No test sees a cache of another one, let alone that of the user.
_CACHES = tempfile.TemporaryDirectory(prefix="shallower-tests-")
os.environ["SHALLOWER_CACHE"] = _CACHES.name

ROOT = Path(__file__).resolve().parents[1]
WORDS = [f"w{i}" for i in range(97)]


def write_jsonl(path, texts):
    """A file of texts, a JSON object a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def mostly_slow(cases, quick):
    """Cases as parameters, each a tuple or a single value; all but the quick ones are slow."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in quick else pytest.mark.slow,
        )
        for case in cases
    ]


TINY = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
"""Sizes of a small model in the words of its config."""


def tiny_llama(num_layers=6, seed=0, **options):
    """A random Llama of a few layers; for structure only."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(num_hidden_layers=num_layers, **TINY, **options)
    return LlamaForCausalLM(config).eval()


def edited(model):
    """A copy of a model with other values in one matrix, which its fingerprint does not cover."""
    import copy

    model = copy.deepcopy(model)
    model.model.layers[2].mlp.up_proj.weight.data[1:] *= 1.5
    return model


LONGEST = ("test_kills.py", "test_examples.py")


def pytest_collection_modifyitems(items):
    """The files that take longest come first: no process waits for one of them in the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True, scope="module")
def what_is_there_to_stay():
    """Packages that are imported are not gone through again whenever garbage is collected."""
    gc.collect()
    gc.freeze()


atexit.register(gc.unfreeze)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """The folder of a cache that is new for every test; it is made with its first entry."""
    folder = tmp_path_factory.getbasetemp() / "caches" / secrets.token_hex(8)
    monkeypatch.setenv("SHALLOWER_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a cache that is one for a module: in use while what the module shares is made.

    Tests see it by ``warm``, on a test or as a module's ``pytestmark``; there a test of what is
    measured, counted or gone on with is ``cold``.
    """
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("kept")
        patched.setenv("SHALLOWER_CACHE", str(folder))
        yield folder


@pytest.fixture
def warm(request, kept, cache_folder, monkeypatch):
    """What was measured for this module is found."""
    if "cold" not in request.fixturenames:
        monkeypatch.setenv("SHALLOWER_CACHE", str(kept))


@pytest.fixture
def cold():
    """Nothing is found, in a module that is ``warm``."""


DRAWN = {"reporting", "docs"}
"""Folders of the tests that look at figures."""
FEW_BYTES = {
    "svg": b'<svg width="1pt" height="1pt"><title>-</title></svg>',
    "png": b"\x89PNG",
}


@pytest.fixture(autouse=True, scope="module")
def figures(request):
    """Elsewhere they are made, and not laid out, and their files are the same few bytes."""
    if request.path.parent.name in DRAWN:
        yield
        return
    from shallower.reporting.charts import drawing, heat_map, plots

    with pytest.MonkeyPatch.context() as patched:
        for module in (drawing, heat_map):
            patched.setattr(module, "render", lambda _figure, kind, **_words: FEW_BYTES[kind])
        for module in (plots, heat_map):
            patched.setattr(module, "lay_out", lambda figure: figure.set_layout_engine("none"))
        yield


@pytest.fixture
def llama():
    return tiny_llama()


def word_tokenizer():
    """A tokenizer of 97 words, w0 .. w96, without special tokens of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*WORDS, "<unk>", "<pad>", "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


@pytest.fixture(scope="session")
def words():
    """A tokenizer of 97 words, as `word_tokenizer` makes it."""
    return word_tokenizer()


@pytest.fixture(scope="session")
def smol():
    """SmolLM2-135M-Instruct in float32 and its tokenizer. Tests leave it as it is."""
    import shallower as sh
    from shallower.studies import demo

    return sh.load_model(demo.model_path(), dtype="float32")


@pytest.fixture(scope="session")
def passages():
    """Real English: calibration and held-out passages of Python's documentation."""
    from shallower.studies import demo

    return demo.texts(None, 24, 8)


@pytest.fixture(scope="session")
def data():
    """The folder of real texts named by SHALLOWER_DATA."""
    folder = Path(os.environ.get("SHALLOWER_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "text" / "c4.jsonl").is_file():
        pytest.skip(f"no texts in {folder}: set SHALLOWER_DATA")
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, and in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def rehearsals():
    """The bytes that forwards without weights held, by all that they depend on."""
    return {}


@pytest.fixture(scope="session")
def stages():
    """The forward of a stage, one thing for each, as its rehearsals are known by it."""
    from shallower.forecasts import forecast

    return cache(forecast._forward)


@pytest.fixture
def hasty(monkeypatch, rehearsals, stages):
    """Forecasts time this machine by few repeats of little, and rehearse a forward once."""
    from shallower.forecasts import forecast, speed
    from shallower.healing.memory import HealingStep
    from shallower.memory.plan import ForwardStep
    from shallower.savings import timing

    def once(rehearse, *key):
        if key not in rehearsals:
            rehearsals[key] = rehearse()
        return rehearsals[key]

    def content(model):
        config = model.config
        ways = str(config._attn_implementation), str(config._experts_implementation)
        return config.to_json_string(use_diff=False), str(model.dtype), *ways

    forwards, healings = ForwardStep._rehearsed, HealingStep.run

    def forward(step, texts):
        of = step._forward.run, *content(step.model), step._length, texts
        return once(lambda: forwards(step, texts), *of)

    def healing(step, texts, recompute):
        recipe = step.recipe
        names = ("rank", "max_length", "dropout", "dtype", "attention", "has_teacher", "is_padded")
        of = *content(step._model), *(getattr(recipe, name) for name in names), texts, recompute
        return once(lambda: healings(step, texts, recompute), *of)

    monkeypatch.setattr(forecast, "_forward", stages)
    monkeypatch.setattr(ForwardStep, "_rehearsed", forward)
    monkeypatch.setattr(HealingStep, "run", healing)
    monkeypatch.setattr(speed, "ENOUGH", 0.0)
    monkeypatch.setattr(timing, "_WIDTH", 256)
    monkeypatch.setattr(timing, "_STREAMED", 1 << 22)


@pytest.fixture
def forked(monkeypatch):
    """Workers are forks of a process that has imported all, where they would be spawned."""
    from shallower.workers.local_workers import LocalWorkers
    from tests.forks import Forking

    monkeypatch.setattr(LocalWorkers, "processes", Forking)


@pytest.fixture
def shallower(folder, hasty, forked, monkeypatch, capfd):
    """Run a command in this process, in ``folder``."""
    from shallower import cli

    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["shallower", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Done(ended.value.code, *capfd.readouterr())

    return call
