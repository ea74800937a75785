"""Nothing is too large to be read: folders, files, signatures, commands."""

import ast
import inspect
import operator
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
    assert len(things) <= 30, things


@pytest.mark.parametrize(("files", "most"), [(CODE, 500), (TESTS, 500)], ids=["code", "tests"])
def test_no_file_is_long(files, most):
    lines = {
        str(file.relative_to(ROOT)): house.num_lines(file)
        for file in files
        if file.suffix in (".py", ".pyi", ".rs")
    }
    assert lines
    assert {name: number for name, number in lines.items() if number > most} == {}


MOST_FILES, MOST_LINES = 25, 5_500
"""What one folder of the package holds at most."""


def test_a_folder_is_small_enough_to_be_known():
    for folder in (path for path in SOURCE.iterdir() if path.is_dir()):
        files = list(folder.rglob("*.py"))
        found = len(files), sum(map(house.num_lines, files))
        assert all(map(operator.le, found, (MOST_FILES, MOST_LINES))), (folder.name, found)


COMPARED = ("model", "tokenizer", "texts", "eval_texts")


def test_at_most_three_parameters_go_by_place():
    many = {
        f"{module}.{name}": house.positional(function)
        for module, file in MODULES.items()
        for name, function in house.functions(ast.parse(file.read_text(encoding="utf-8")))
        if len(house.positional(function)) > 3
    }
    # A model, its tokenizer, and the two sets of texts, in the data's order.
    assert many == {"studies.compare.compare": [*COMPARED]}


def test_commands_are_short():
    statements = {}
    for name in cli.COMMANDS:
        module = import_module(f"shallower.cli.{cli.MODULES.get(name, name)}")
        source = inspect.getsource(getattr(module, f"{name}_command"))
        statements[name] = house.num_statements(ast.parse(source).body[0])
    assert {name: number for name, number in statements.items() if number > 30} == {}
