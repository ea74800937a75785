"""Names that other packages may move are where the list says, and the list is whole."""

import ast
import inspect
import re
from importlib import import_module

import pytest

from tests.conftest import ROOT
from tests.models.private_names import PRIVATE_NAMES

SOURCE = ROOT / "python" / "shallower"


def require(entry):
    """Fail with the name of what moved."""
    moved = f"{entry} moved: {entry.used_for}"
    try:
        place = import_module(entry.module)
    except ImportError:
        pytest.fail(moved)
    owner, _, name = entry.name.rpartition(".")
    try:
        for part in owner.split(".") if owner else ():
            place = getattr(place, part)
    except AttributeError:
        pytest.fail(moved)
    if hasattr(place, name):
        return
    # Attributes of instances and local names are found in the source of their class or function.
    parents = place.__mro__ if inspect.isclass(place) else (place,)
    assert any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", source_of(p)) for p in parents), moved


def source_of(place):
    try:
        return inspect.getsource(place)
    except (OSError, TypeError):
        return ""  # of C


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=str)
def test_a_private_name_is_where_it_was(entry):
    require(entry)


def private_uses(nodes):
    """Private attributes of other objects, and strings that name them."""
    for node in nodes:
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def own_names(nodes):
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_every_private_name_in_use_is_listed():
    trees = {
        path: [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        for path in SOURCE.rglob("*.py")
    }
    own = {name for nodes in trees.values() for name in own_names(nodes)} | {"_core"}
    listed = {part for entry in PRIVATE_NAMES for part in entry.name.split(".")}
    unlisted = {
        f"{path.relative_to(SOURCE)}: {name}"
        for path, nodes in trees.items()
        for name in private_uses(nodes)
        if re.fullmatch(r"_[a-z]\w+", name) and name not in own | listed | SUFFIXES
    }
    assert unlisted == set()


SUFFIXES = {
    "_adapter_list",
    "_patched",
    "_token_id",
    "_token_ids",
    "_command",
    "_stderr",
    "_difference_stderr",
}
"""Strings that names end in."""
