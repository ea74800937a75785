"""Nothing is too large to be read: folders, files, signatures, commands."""

import ast
import inspect
from importlib import import_module

import pytest

from shallower import cli
from tests import house
from tests.conftest import ROOT

SOURCE = ROOT / "python" / "shallower"
MODULES = house.modules(SOURCE)
CODE = [file for folder in ("python", "rust", "benches") for file in (ROOT / folder).rglob("*")]
TESTS = list((ROOT / "tests").rglob("*"))


def test_few_things_lie_at_the_top():
    built = {"__pycache__", "_core.abi3.so"}
    things = sorted(path.name for path in SOURCE.iterdir() if path.name not in built)
    assert len(things) <= 20, things


@pytest.mark.parametrize(("files", "most"), [(CODE, 400), (TESTS, 500)], ids=["code", "tests"])
def test_no_file_is_long(files, most):
    lines = {
        str(file.relative_to(ROOT)): house.num_lines(file)
        for file in files
        if file.suffix in (".py", ".pyi", ".rs")
    }
    assert lines
    assert {name: number for name, number in lines.items() if number > most} == {}


COMPARED = ("model", "tokenizer", "texts", "eval_texts")


@pytest.mark.parametrize("module", MODULES)
def test_at_most_three_parameters_go_by_place(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    many = {
        name: house.positional(function)
        for name, function in house.functions(tree)
        if len(house.positional(function)) > 3
    }
    # A model, its tokenizer, and the two sets of texts, in the data's order.
    assert many == ({"compare": [*COMPARED]} if module == "runs.compare" else {})


def test_commands_are_short():
    lines = {}
    for name, command in cli.COMMANDS.items():
        module = import_module(f"shallower.cli.{command.module}")
        source = inspect.getsource(getattr(module, f"{name}_command"))
        lines[name] = house.body_lines(ast.parse(source).body[0])
    assert {name: number for name, number in lines.items() if number > 40} == {}
