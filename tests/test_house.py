"""The architecture that ARCHITECTURE.md draws, enforced."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shallower
from tests.conftest import ROOT

SOURCE = ROOT / "python" / "shallower"
HEAVY = {
    "torch", "transformers", "peft", "bitsandbytes", "datasets", "matplotlib", "gguf", "accelerate",
}  # fmt: skip


def rooms():
    """Every module of the package by its dotted name below ``shallower``."""
    files = SOURCE.rglob("*.py")
    return {".".join(file.relative_to(SOURCE).with_suffix("").parts): file for file in files}


def imports(room, file):
    """The (module, whether at the top) pairs that a room imports; TYPE_CHECKING excluded."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name.split(".")[0], id(node) in top
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], id(node) in top
        elif isinstance(node, ast.ImportFrom):
            package = room.split(".")[: -node.level]
            if node.module:
                yield "." + ".".join([*package, node.module]), id(node) in top
            else:
                for name in node.names:
                    yield "." + ".".join([*package, name.name]), id(node) in top


def table():
    """ARCHITECTURE.md's table: room -> (rooms it may import, heavy packages it may import)."""
    rows = {}
    for line in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"\| `([\w.]+)` \|[^|]*\|([^|]*)\|([^|]*)\|", line)
        if match:
            allowed, heavy = (set(re.findall(r"`([\w.]+)`", cell)) for cell in match.groups()[1:])
            rows[match[1]] = allowed, heavy
    return rows


def test_every_room_is_in_the_table():
    contents = ("__init__", "__main__", "models.__init__", "healing.__init__", "patching.__init__")
    expected = {room for room in rooms() if room not in contents}
    assert set(table()) == expected


@pytest.mark.parametrize("room", sorted(table()))
def test_a_room_imports_what_the_table_allows(room):
    allowed, heavy = table()[room]
    found = set(imports(room, rooms()[room]))
    inner = {name[1:] for name, _ in found if name.startswith(".")} - {"__version__"}
    assert inner == allowed
    assert {name for name, _ in found if name in HEAVY} == heavy


def test_extras_are_imported_late():
    extras = {"peft", "bitsandbytes", "datasets", "matplotlib", "gguf"}
    for room, file in rooms().items():
        early = {name for name, top in imports(room, file) if top}
        assert not early & extras, room


def test_one_file_knows_pyo3():
    rust = ROOT / "rust"
    knowing = [
        file.name
        for file in rust.rglob("*.rs")
        if re.search(r"\bpyo3\b|\bnumpy\b", file.read_text(encoding="utf-8"))
    ]
    assert knowing == ["python.rs"]


def test_importing_loads_no_torch():
    code = f"import sys, shallower; print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_installed_wheel_is_tested():
    assert "site-packages" in shallower.__file__
    assert not Path(shallower.__file__).is_relative_to(SOURCE)


def test_every_public_name_exists():
    for name in shallower.__all__:
        assert getattr(shallower, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'scna'"):
        shallower.scna  # noqa: B018
