"""The tests that a change can affect, chosen by the law: `make affected`.

``python -m tests.affected [BASE]`` prints the files and folders of tests that a change since BASE,
which is ``main``, can affect.
"""

import subprocess
import sys
from pathlib import Path

from tests import house
from tests.conftest import ROOT

HOUSE = [f"tests/test_{name}.py" for name in ("habits", "house", "public", "sizes")]
"""Quick tests of the whole package, which every change runs."""
DOCS = ["tests/docs", "tests/test_examples.py"]
ALL = ["tests"]


def floors():
    """The law, lowest first; tests on fake devices stand on all that they run, up to judgement."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for floor in house.law(text):
        yield floor
        if "judgement" in floor:
            yield ("devices",)


def tests_of(room):
    """Where the tests of a room lie."""
    places = (f"tests/{room}", f"tests/test_{room}.py")
    return [place for place in places if (ROOT / place).exists()]


def upwards(room):
    """The tests of a room, and of all that may import it."""
    height = {name: number for number, floor in enumerate(floors()) for name in floor}
    above = [name for name in height if name == room or height[name] > height[room]]
    return [place for name in above for place in tests_of(name)]


def users(module):
    """The tests that use a module of tests, also by others; all of a folder by its ``conftest``."""
    graph = house.python_graph(ROOT / "tests")
    found, new = set(), {module}
    while new:
        found |= new
        new = {name for name, imported in graph.items() if imported & found} - found
    for name in found:
        place = Path("tests", *name.split("."))
        if place.name == "conftest":
            yield str(place.parent)
        elif place.name.startswith("test_") and (ROOT / f"{place}.py").exists():
            yield f"{place}.py"


def of_file(name):
    """The tests that a change of one file can affect."""
    file, rooms = Path(name), {room for floor in floors() for room in floor}
    match file.parts:
        case ("python", "shallower", room, *_) if Path(room).stem in rooms:
            return upwards(Path(room).stem)
        case ("tests", *_, last) if last.endswith(".py") and last != "conftest.py":
            return list(users(".".join(file.with_suffix("").parts[1:])))
        case ("docs" | "notebooks", *_):
            return DOCS
        case (only,) if only.endswith(".md"):
            return DOCS
    return ALL


def affected(changed):
    """The tests that a change of some files can affect, each once and in order."""
    found = {*HOUSE, *(place for name in changed for place in of_file(name))}
    parents = {place: set(map(str, Path(place).parents)) for place in found}
    return sorted(place for place in found if not parents[place] & found)


def changed_since(base, root=ROOT):
    """The files that differ from where this branch left another, also those that are new."""
    differing = ("diff", "--name-only", "--no-renames", "--merge-base", base)
    new = ("ls-files", "--others", "--exclude-standard")
    return [name for words in (differing, new) for name in _git(root, *words)]


def _git(root, *words):
    done = subprocess.run(["git", *words], cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


if __name__ == "__main__":
    print(*affected(changed_since(*sys.argv[1:] or ["main"])))
