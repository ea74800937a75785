"""Nothing is too large to be read, and the budget of the house only falls."""

import ast
import inspect
import re
import subprocess
import tomllib
from importlib import import_module

import pytest

from shallower import cli
from tests import house
from tests.conftest import ROOT

SOURCE = ROOT / "python" / "shallower"
MODULES = house.modules(SOURCE)
FILES = list(SOURCE.rglob("*.py"))
LONG = (".py", ".pyi", ".rs")
BUDGET = "tests/ceilings.toml"
CEILINGS = tomllib.loads((ROOT / BUDGET).read_text(encoding="utf-8"))


def nodes(kind):
    """All parts of the package's code that are of a kind."""
    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in FILES)
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, kind)]


def is_docstring(statement):
    value = getattr(statement, "value", None)
    if not (isinstance(statement, ast.Expr) and isinstance(value, ast.Constant)):
        return False
    return isinstance(value.value, str)


DECISIONS = (
    ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension, ast.Assert,
)  # fmt: skip


def complexity(function):
    """McCabe's number of a function, with those that it defines within."""
    inside = list(ast.walk(function))
    operands = sum(len(node.values) - 1 for node in inside if isinstance(node, ast.BoolOp))
    return 1 + operands + sum(isinstance(node, DECISIONS) for node in inside)


def num_options():
    """Options of all commands, but for ``--help``."""
    every = [option for name in cli.COMMANDS for option in cli.parser(name).params]
    return sum(option.param_type_name != "argument" for option in every)


def num_bundles():
    """Dicts of anything that have a name."""
    text = "".join(file.read_text(encoding="utf-8") for file in FILES)
    return len(re.findall(r": (?:Any|dict\[str, Any\]) = (?:\{|dict\()", text))


def longest(*folders):
    files = (file for folder in folders for file in (ROOT / folder).rglob("*"))
    return max(house.num_lines(file) for file in files if file.suffix in LONG)


def found():
    """What the house holds, by the names of the budget."""
    folders = [path for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    inside = [list(folder.rglob("*.py")) for folder in folders]
    functions = nodes((ast.FunctionDef, ast.AsyncFunctionDef))
    table = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = table.partition("## Entries of the store")[2].partition("## Decisions")[0]
    built = {"__pycache__", "_core.abi3.so"}
    return {
        "package": {
            "statements": sum(not is_docstring(one) for one in nodes(ast.stmt)),
            "files": len(FILES),
            "classes": len(nodes(ast.ClassDef)),
            "options": num_options(),
            "complex": sum(complexity(function) > 15 for function in functions),
            "bundles": num_bundles(),
            "entries": len(re.findall(r"^\| `\w+` \|(?: .+? \|){3}$", table, re.MULTILINE)),
            "top": len({path.name for path in SOURCE.iterdir()} - built),
            "folder_files": max(map(len, inside)),
            "file_lines": longest("python", "rust", "benches"),
        },
        "tests": {
            "lines": sum(map(house.num_lines, (ROOT / "tests").rglob("*.py"))),
            "file_lines": longest("tests"),
        },
    }


def flat(budget):
    return {(place, name): most for place, of in budget.items() for name, most in of.items()}


def risen(earlier, later):
    """The ceilings that are higher than they were, or gone."""
    later = flat(later)
    return {name: (most, later.get(name)) for name, most in flat(earlier).items()
            if later.get(name, most + 1) > most}  # fmt: skip


def test_the_house_keeps_its_budget():
    assert risen(CEILINGS, found()) == {}


def git(*words):
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout


def test_a_ceiling_never_rises():
    """Neither above what this branch ever said, nor above ``main``."""
    commits = git("log", "--full-history", "--format=%H", "--", BUDGET).split()
    known = [text for one in ("main", *commits) if (text := git("show", f"{one}:{BUDGET}"))]
    if not known:
        pytest.skip("there is no git, or no history of the budget")
    assert [risen(tomllib.loads(text), CEILINGS) for text in known] == [{}] * len(known)


def test_a_ceiling_that_rises_or_goes_is_seen():
    budget = {"package": {"lines": 10, "files": 2}}
    assert risen(budget, {"package": {"lines": 9, "files": 2, "classes": 3}}) == {}
    assert risen(budget, {"package": {"lines": 11}}) == {
        ("package", "lines"): (10, 11),
        ("package", "files"): (2, None),
    }


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
