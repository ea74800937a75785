"""The house that ARCHITECTURE.md draws, enforced."""

import ast
import os
import re
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest

import shallower
from tests import house
from tests.conftest import ROOT

SOURCE = ROOT / "python" / "shallower"
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
MODULES = house.modules(SOURCE)
OPTIONAL = {"peft", "bitsandbytes", "datasets", "matplotlib", "gguf", "lm_eval", "ray"}


def listed(word):
    """The modules, and the folders, that a bullet of ARCHITECTURE.md names."""
    return [name for name in house.names_in(house.bullet(ARCHITECTURE, word)) if name != "_core"]


def own(module):
    """A module by the name that it is imported by."""
    return module.removesuffix(".__init__")


def written(folder, **files):
    """A package of files, named with two underscores for a slash."""
    for name, text in files.items():
        file = folder / "shallower" / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    return folder / "shallower"


def test_every_kind_of_store_entry_is_in_the_table():
    code = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    kinds = {*re.findall(r"\.(?:put|journal)\(\s*\"(\w+)\"", code)}
    table = ARCHITECTURE.partition("## Entries of the store")[2].partition("## Decisions")[0]
    assert kinds <= {*re.findall(r"^\| `(\w+)`", table, re.MULTILINE)}


# The law
def test_every_room_is_in_the_law():
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    unlisted = {"__init__", "__main__", "__pycache__", "_core"}
    layers = house.law(ARCHITECTURE)
    assert sorted(room for layer in layers for room in layer) == sorted(rooms - unlisted)


def test_imports_run_down():
    assert house.breaches(SOURCE, house.law(ARCHITECTURE)) == []


UPWARD = {
    "relative": "from ..healing.heal import heal",
    "of the folder": "from ..healing import heal",
    "absolute": "import shallower.healing.heal",
    "absolute from": "from shallower.healing import heal",
    "from the roof": "from .. import heal",
    "late": "def late():\n    from ..healing import heal",
    "for typing": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from ..healing.heal import heal
    """,
}


@pytest.mark.parametrize("text", UPWARD.values(), ids=UPWARD)
def test_an_import_that_runs_up_is_found(tmp_path, text):
    files = {"errors": "", "healing__heal": "from ..values.plan import Plan", "values__plan": text}
    found = house.breaches(written(tmp_path, **files), [("errors",), ("values",), ("healing",)])
    (breach,) = found
    assert breach.startswith("values.plan imports ")


def test_an_import_that_runs_sideways_is_found(tmp_path):
    files = {"scanning__scan": "from ..cutting.prune import prune", "cutting__prune": ""}
    package = written(tmp_path, **files)
    assert house.breaches(package, [("scanning", "cutting")]) == [
        "scanning.scan imports cutting.prune beside it"
    ]
    assert house.breaches(package, [("cutting",), ("scanning",)]) == []
    assert house.breaches(package, [("cutting",)]) == [
        "scanning.scan: the law does not know scanning"
    ]


def test_no_modules_import_each_other_in_a_circle():
    assert house.circle(house.python_graph(SOURCE)) is None


def test_a_circle_is_found(tmp_path):
    files = {"a__b": "from .c import d", "a__c": "from ..e import f", "e": "from .a.b import g"}
    assert {*house.circle(house.python_graph(written(tmp_path, **files)))} == {"a.b", "a.c", "e"}


def test_every_folder_has_its_line():
    block = re.search(r"^## Folders\n.*?^```\n(.*?)^```", ARCHITECTURE, re.MULTILINE | re.DOTALL)[1]
    listed = [name for line in block.splitlines() for name in line.split("  ")[0].split()]
    rooms = {f"{path.name}{'/' * path.is_dir()}" for path in SOURCE.iterdir()}
    rooms = {name for name in rooms if not name.startswith(("__", "_core", "py."))}
    assert sorted(listed) == sorted(rooms)


# The lists
def importing(packages, typing=False):
    """The modules that import one of the packages, and which."""
    for module, file in MODULES.items():
        for one in house.imports(SOURCE, file):
            if one.name in packages and (typing or not one.only_typing):
                yield own(module), one.name


def test_the_list_of_those_who_see_the_core():
    seeing = {module for module, _ in importing({"._core"})}
    assert sorted(seeing) == sorted(listed("_core"))


def test_those_who_see_no_torch():
    places = listed("no torch")
    for place in places:
        assert any(house.under(own(module), [place]) for module in MODULES), f"no module is {place}"
    heavy = house.HEAVY - {"gguf", "datasets", "matplotlib"}
    seen = [pair for pair in importing(heavy) if house.under(pair[0], places)]
    assert seen == []
    names = [f"shallower.{own(module)}" for module in MODULES if house.under(own(module), places)]
    code = f"import sys, {', '.join(names)}\nprint(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_optional_packages_live_where_the_list_says():
    text = house.bullet(ARCHITECTURE, "Optional")
    expected = set()
    for package, places in re.findall(r"`(\w+)`\s+in\s+((?:`[\w.]+`(?:,\s+|\s+and\s+)?)+)", text):
        expected |= {(place, package) for place in house.names_in(places)}
    found = {(house.room_of(module), package) for module, package in importing(OPTIONAL)}
    assert found == expected


def test_optional_packages_are_imported_late():
    for module, file in MODULES.items():
        early = {one.name for one in house.imports(SOURCE, file) if one.at_top}
        assert not early & OPTIONAL, module


def test_the_list_of_modules_whose_names_are_exported():
    exporting = {
        getattr(value, "__module__", "").removeprefix("shallower.")
        for value in (getattr(shallower, name) for name in shallower.__all__)
    } - {""}
    assert sorted(listed("exports")) == sorted(exporting)


def test_a_class_name_stands_in_one_file():
    places = defaultdict(list)
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(own(module))
    assert len(places) > 300
    twice = {name: found for name, found in places.items() if len(set(found)) > 1}
    assert twice == {}


def test_only_the_border_knows_pyo3():
    rust = ROOT / "rust"
    knowing = {
        file.relative_to(rust).parts[0]
        for file in rust.rglob("*.rs")
        if re.search(r"\bpyo3\b|\bnumpy\b", file.read_text(encoding="utf-8"))
    }
    assert len(knowing) == 1
    assert knowing <= {"python.rs", "python"}


# The package
def test_the_installed_wheel_is_tested():
    installed = Path(shallower.__file__)
    if installed.is_relative_to(SOURCE) and "SHALLOWER_WHEEL" not in os.environ:
        pytest.skip("the working tree is tested; `make test` tests the wheel")
    assert "site-packages" in installed.parts
    assert not installed.is_relative_to(SOURCE)


def test_a_name_that_is_not_public_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'scna'"):
        shallower.scna  # noqa: B018
