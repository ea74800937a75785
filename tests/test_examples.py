"""The examples of README, docs and public docstrings, executed."""

import doctest
import inspect

import pytest

import shallower as sh
from tests import examples
from tests.conftest import ROOT, mostly_slow
from tests.studies.conftest import answer_shortly

pytestmark = [
    pytest.mark.timeout(1200),
]
"""A document is one test, and some take minutes of one core."""

ELSEWHERE = {ROOT / "docs" / "tutorial.md"}
"""Documents that are run on the real model as the site is made."""
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(set((ROOT / "docs").rglob("*.md")) - ELSEWHERE),
]
BLOCKS = {
    str(file.relative_to(ROOT)): examples.code_blocks(file.read_text(encoding="utf-8"))
    for file in DOCUMENTS
    if file.is_file()
}
PYTHON = [name for name, blocks in BLOCKS.items() if any(kind == "python" for kind, *_ in blocks)]
SHELL = [
    name
    for name, blocks in BLOCKS.items()
    if any(
        any(examples.commands(code, "shallower"))
        for kind, _, code in blocks
        if kind not in ("python", examples.SHOWN)
    )
]

NOT_RUN = {
    "docs/gallery.md": [
        "shallower run", "shallower compare", "shallower curve", "shallower prune",
        "shallower compare",
    ],
    "docs/how-to/elsewhere.md": [
        "vllm", "python convert_hf_to_gguf.py", "llama-cli", "vllm", "llama-cli",
        "ollama", "ollama",
    ],
    "docs/how-to/gguf.md": ["llama-perplexity", "llama-cli", "shallower run", "llama-perplexity"],
    "docs/how-to/prune.md": [
        "    hf download", "    shallower prune klein", "shallower prune", "shallower prune",
    ],
    "docs/how-to/prune-heal-quantise.md": [
        "python convert_hf_to_gguf.py", "llama-quantize", "vllm", "shallower eval",
    ],
    "docs/how-to/share-the-work.md": [
        "srun shallower scan", "srun shallower eval", "srun shallower compare",
    ],
    "docs/how-to/vllm.md": ["vllm", "curl"],
}  # fmt: skip
"""How the commands begin that are shown and not run: there is no vLLM, llama.cpp or SLURM here,
and what the gallery shows takes half an hour."""
PROGRAMS = (
    "shallower", "python", "torchrun", "srun", "sbatch", "vllm", "curl", "llama-cli",
    "llama-server", "llama-quantize", "llama-perplexity", "mergekit-yaml", "pip", "ollama", "hf",
)  # fmt: skip


def how_to(*names):
    """Pages by their names."""
    return {f"docs/how-to/{name}.md" for name in names}


SLOW = how_to(
    "add-a-criterion", "choose-by-your-task", "compare", "curve", "eval", "experts", "gain", "gguf",
    "heal", "heal-a-7b", "memory", "patch", "prune-heal-quantise", "run", "scan-a-70b",
    "share-the-work", "vllm",
) | {
    "docs/how-much-is-20-percent.md",
    "answer_prompts", "compare", "curve", "evaluate_loss", "evaluate_speech", "heal",
    "load_model", "memory_forecast", "patch", "report", "run",
}  # fmt: skip

SHORTER = {"README.md", "report", "run"} | how_to(
    "choose-by-your-task", "compare", "curve", "prune-heal-quantise", "run"
)
"""Examples that measure many cuts, and do not tell of how many layers: they get 10 of the 30."""
STUDIES = {"run", "report", "curve", "compare"}
"""Examples that measure many cuts: they get fewer texts."""


def in_turn(names):
    """Documents and public names as parameters; those that take long are slow."""
    return mostly_slow(names, set(names) - SLOW)


@pytest.fixture(scope="module")
def made(tmp_path_factory, words):
    """What examples read; and a cut and a scan, that examples of README make."""
    folder = tmp_path_factory.mktemp("examples")
    examples.make_folder(folder, words)
    return folder


@pytest.fixture(scope="module")
def more(made, tmp_path_factory):
    folder = examples.copy_folder(made, tmp_path_factory.mktemp("more"))
    model, tokenizer = sh.load_model(folder / examples.MODEL, dtype="float32")
    scan = sh.scan(model, tokenizer, examples.sentences(32, seed=1), keep_samples=True)
    scan.save(folder / "scans" / "smol" / "scan.safetensors")
    plan = sh.drop_layers(model, [range(12, 20)])
    sh.save_model(model, tokenizer, folder / examples.CUT, plan=plan)
    return folder


@pytest.fixture(autouse=True)
def one_cache(made, cache_folder, hasty, monkeypatch):
    """What one example has measured, the same example elsewhere finds; answers are short."""
    answer_shortly(monkeypatch)
    monkeypatch.setenv("SHALLOWER_CACHE", str(made.with_name("cache-of-examples")))


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    monkeypatch.chdir(examples.copy_folder(made, tmp_path))
    return tmp_path


def names(folder):
    """The names that examples take for granted."""
    import numpy as np
    import torch

    model, tokenizer = sh.load_model(folder / examples.MODEL, dtype="float32")
    return {
        "sh": sh,
        "np": np,
        "torch": torch,
        "model": model,
        "tokenizer": tokenizer,
        "mixture": sh.load_model(folder / "mixture", dtype="float32")[0],
        "texts": examples.sentences(examples.NUM_TEXTS, seed=1),
        "held_out": examples.sentences(examples.NUM_HELD_OUT, seed=2),
        "states": np.random.default_rng(0).standard_normal((64, 31, 32)).astype(np.float32),
    }


def write_files(folder, document):
    """The files that a document shows, each named by its first line."""
    for kind, _, code in BLOCKS[document]:
        if kind == "yaml":
            (folder / code.split()[1]).write_text(code)


@pytest.mark.parametrize("document", in_turn(PYTHON))
def test_python_of_a_document_runs_and_prints_what_it_says(folder, capsys, document):
    if document in SHORTER:
        examples.shorten(folder)
    write_files(folder, document)
    bound = names(folder)
    for kind, line, code, printed in examples.with_output(BLOCKS[document]):
        if kind == "python":
            capsys.readouterr()
            lines = "\n" * (line - 1) + examples.quicker(code)
            exec(compile(lines, str(ROOT / document), "exec"), bound)
            got = capsys.readouterr().out
            checks = doctest.OutputChecker().check_output
            assert printed is None or checks(f"{printed}\n", got, doctest.ELLIPSIS), got


@pytest.mark.filterwarnings("default:no speech is measured:UserWarning")
@pytest.mark.parametrize("document", in_turn(SHELL))
def test_commands_of_a_document_run(folder, shallower, document):
    if document in SHORTER:
        examples.shorten(folder)
    write_files(folder, document)
    for kind, line, code in BLOCKS[document]:
        if kind in ("python", examples.SHOWN):
            continue
        for command in examples.commands(examples.quicker(code), "shallower"):
            done = shallower(*command)
            said = f"{document}:{line}: shallower {' '.join(command)}\n{done.err}"
            assert done.status == 0, said


def doctests():
    """(name, doctest) of every public name with an example in its docstring."""
    finder = doctest.DocTestFinder(recurse=True, exclude_empty=True)
    for name in sh.__all__:
        value = getattr(sh, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            for test in finder.find(value, name):
                if test.examples:
                    yield test.name, test


DOCTESTS = dict(doctests())


@pytest.mark.parametrize("name", in_turn(DOCTESTS))
def test_the_example_of_a_docstring_runs(more, tmp_path, monkeypatch, name):
    monkeypatch.chdir(examples.copy_folder(more, tmp_path))
    if name in SHORTER:
        examples.shorten(tmp_path)
    test = DOCTESTS[name]
    test.globs = {**names(tmp_path), "scan": sh.Scan.load("scans/smol/scan.safetensors")}
    if name in STUDIES:
        test.globs |= {"texts": test.globs["texts"][:40], "held_out": test.globs["held_out"][:12]}
    for example in test.examples:
        example.source = examples.quicker(example.source)
    said = []
    runner = doctest.DocTestRunner(
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False
    )
    runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_commands_that_are_not_run_are_these():
    found = {name: list(examples.shown(blocks, PROGRAMS)) for name, blocks in BLOCKS.items()}
    assert {name for name, lines in found.items() if lines} == set(NOT_RUN)
    for name, begins in NOT_RUN.items():
        for (line, text), begin in zip(found[name], begins, strict=True):
            assert text.startswith(begin), f"{name}:{line}: {text}"


@pytest.mark.parametrize("document", [*BLOCKS, "ARCHITECTURE.md"])
def test_links_within_the_repository_lead_somewhere(document):
    file = ROOT / document
    for link in examples.links(file.read_text(encoding="utf-8")):
        place, _, anchor = link.partition("#")
        target = file.parent / place if place else file
        assert target.exists(), link
        if anchor:
            assert anchor in examples.anchors(target.read_text(encoding="utf-8")), link


def test_the_reader_of_markdown_finds_what_documents_have():
    """Commands that are shown are counted above."""
    assert len(PYTHON) >= 18
    assert len(SHELL) >= 24
    printed = [one for blocks in BLOCKS.values() for *_, one in examples.with_output(blocks)]
    assert len([one for one in printed if one]) >= 6
    assert sum(len(examples.links((ROOT / name).read_text("utf-8"))) for name in BLOCKS) >= 250
