"""Reading the house: the law and the lists of ARCHITECTURE.md, imports, and lines of code."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter

HEAVY = {
    "torch", "transformers", "peft", "bitsandbytes", "datasets", "matplotlib", "gguf", "accelerate",
    "lm_eval",
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """What a module imports: ``name`` starts with a dot where it is of the package."""

    name: str
    at_top: bool
    only_typing: bool


def modules(package):
    """Every module of a package by its dotted name below it; the package itself is ``__init__``."""
    files = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        files[".".join(parts)] = file
    return files


@cache
def imports(package, file):
    """Everything that a file of the package imports, late or for typing only included."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = file.parent.relative_to(package.parent).parts
                base = ".".join([*folder[: len(folder) - node.level + 1], *base.split(".")])
            base = base.rstrip(".")
            names = [f"{base}.{name.name}" for name in node.names]
        else:
            continue
        for name in names:
            if name == f"{package.name}.__version__":  # the one thing that all may know of the roof
                continue
            found.append(Import(_resolve(package, name), id(node) in top, id(node) in typing))
    return found


def _resolve(package, name):
    """``.room.module`` for what is of the package, else the name of the distribution's package."""
    first, *rest = name.split(".")
    if first != package.name:
        return first
    while rest:  # the last words may be names within a module
        place = package.joinpath(*rest)
        if place.is_dir() or place.with_suffix(".py").is_file() or rest == ["_core"]:
            return "." + ".".join(rest)
        rest.pop()
    return ".__init__"


def law(text):
    """The layers of ARCHITECTURE.md's law, lowest first, each a tuple of rooms."""
    block = re.search(r"^## The law\n.*?^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, 'ARCHITECTURE.md has no fenced block after "## The law"'
    layers = []
    for line in block[1].splitlines():
        rooms = re.split(r"\s{2,}", line.strip())[0]
        if rooms:
            layers.append(tuple(re.split(r"[,\s]+", rooms)))
    return layers


def bullet(text, word):
    """The bullet of ARCHITECTURE.md whose bold head holds a word."""
    for match in re.finditer(
        r"^- \*\*(.+?)\*\*(.*?)(?=^- |^\n|\Z)", text, re.MULTILINE | re.DOTALL
    ):
        if word in match[1]:
            return match[1] + match[2]
    raise AssertionError(f"ARCHITECTURE.md has no bullet whose bold head says {word!r}")


def names_in(words):
    """The names in backticks."""
    return re.findall(r"`([\w.]+)`", words)


def under(module, places):
    """Whether a module is one of the places, or lies within one."""
    return any(module == place or module.startswith(place + ".") for place in places)


def room_of(module):
    """The name by which the law calls the room of a module."""
    return module.lstrip(".").split(".")[0]


def breaches(package, layers):
    """Imports that do not run down, as sentences: typing counts, and so does what is late."""
    height = {room: number for number, layer in enumerate(layers) for room in layer}
    found = []
    for module, file in modules(package).items():
        room = room_of(module)
        if room in ("__init__", "__main__"):  # the roof: it sees all
            continue
        if room not in height:
            found.append(f"{module}: the law does not know {room}")
            continue
        for name in sorted({one.name for one in imports(package, file) if one.name[0] == "."}):
            other = room_of(name)
            if other in (room, "_core"):
                continue
            if other not in height:
                found.append(f"{module} imports {name[1:]}, which the law does not know")
            elif height[other] == height[room]:
                found.append(f"{module} imports {name[1:]} beside it")
            elif height[other] > height[room]:
                found.append(f"{module} imports {name[1:]} above it")
    return found


def circle(graph):
    """A circle in a graph of names to names, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def python_graph(package):
    """Module to the modules that it imports, whenever it does."""
    files = modules(package)
    graph = {}
    for module, file in files.items():
        if module in ("__init__", "__main__"):
            continue
        own = module.removesuffix(".__init__")
        names = {one.name[1:] for one in imports(package, file) if one.name[0] == "."}
        graph[own] = {name for name in names if name != own and name in files}
    return graph


def num_lines(file):
    return len(file.read_text(encoding="utf-8").splitlines())


def num_statements(function):
    """Statements of a function, those within others too, its docstring aside."""
    found = sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1
    return found - (ast.get_docstring(function) is not None)


def positional(function):
    """Names of the parameters that can be given by place, ``self`` and ``cls`` aside."""
    names = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
    return [name for name in names if name not in ("self", "cls")]


def functions(tree):
    """(dotted name, node) of every function and method that is public in its module."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner
