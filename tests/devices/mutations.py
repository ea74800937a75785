"""Every place of the package that moves a tensor to a device, and the package without one of them.

A move is ``x.to(where)`` where ``where`` is no dtype, ``x.cpu()``, or ``device=where`` where torch
makes a tensor; not a copy that is kept in the CPU's memory, nor one made there. Without it, ``x``
stays where it is (in the dtype that it is moved to), and a new tensor is made on the CPU. A
function is changed in place, by the code of its changed source, so that whoever knows it meets the
change. Streams are taken out of their order in the same way.
"""

import ast
import copy
import importlib
import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import shallower

SOURCE = Path(shallower.__file__).parent


@dataclass(frozen=True)
class Move:
    """A place where a tensor is moved, or made, on a device.

    Attributes:
        file: the module's file, from the package on.
        function: the qualified name of the function or method at the top that it is in.
        index: which of the calls of that file it is.
        text: the call.
    """

    file: str
    function: str
    index: int
    text: str

    def __str__(self):
        return f"{self.file}: {self.function}: {self.text}"


def is_move(call):
    """Whether a call moves a tensor to a device, or makes one there."""
    function, named = call.func, {word.arg: word.value for word in call.keywords}
    if not isinstance(function, ast.Attribute):
        return False
    if function.attr == "to":
        words = [ast.unparse(argument) for argument in call.args]
        to_dtype = words and (words[0].startswith("torch.") or "dtype" in words[0])
        if "copy" in named and words == ["'cpu'"]:
            return False
        return "device" in " ".join(words) or (len(words) == 1 and not to_dtype)
    if function.attr == "cpu":
        return not call.args
    made = isinstance(function.value, ast.Name) and function.value.id == "torch"
    return made and "device" in named and not isinstance(named["device"], ast.Constant)


def is_order(call):
    """Whether a call lets streams or the host wait for others, or lets a copy wait for nobody."""
    name = getattr(call.func, "attr", "")
    return name in ORDERS or any(word.arg == "non_blocking" for word in call.keywords)


ORDERS = ("record", "wait_event", "synchronize", "pin_memory")


def stayed(call):
    """The call without its move: what it was called on, or the CPU; or without its order."""
    if call.func.attr in ("cpu", "pin_memory"):
        return call.func.value
    if call.func.attr in ORDERS:
        return ast.Constant(None)
    if is_order(call) and not is_move(call):
        kept = [word for word in call.keywords if word.arg != "non_blocking"]
        return ast.Call(call.func, call.args, kept)
    if call.func.attr != "to":
        changed = copy.copy(call)
        changed.keywords = [word for word in call.keywords if word.arg != "device"]
        return changed
    where, *rest = call.args
    if not isinstance(where, ast.Constant) and "device" not in ast.unparse(where):
        rest = [ast.Attribute(where, "dtype", ast.Load())]  # of a tensor
    kept = [word for word in call.keywords if word.arg in ("dtype", "copy")]
    if kept and not rest:
        rest = [ast.Attribute(call.func.value, "dtype", ast.Load())]
    return ast.Call(call.func, rest, kept) if rest or kept else call.func.value


def moves(wanted=is_move):
    """All moves of the package, or other calls."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        numbers = {id(node): i for i, node in enumerate(_calls(tree))}
        name = str(file.relative_to(SOURCE))
        for function, node in _tops(tree):
            found += [
                Move(name, function, numbers[id(call)], ast.unparse(call))
                for call in _calls(node)
                if wanted(call)
            ]
    return found


def _calls(tree):
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _tops(tree):
    """(qualified name, node) of the functions and methods that are in no other."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


class _Without(ast.NodeTransformer):
    def __init__(self, call):
        self.call = call

    def visit_Call(self, node):
        if node is self.call:
            return stayed(node)
        return self.generic_visit(node)


def function_of(move):
    """The function that a move is in, under all that is wrapped around it."""
    owner = importlib.import_module(f"shallower.{move.file[:-3].replace('/', '.')}")
    *classes, name = move.function.split(".")
    for step in classes:
        owner = vars(owner)[step]
    function = vars(owner)[name]
    if isinstance(function, property):
        function = function.fget
    return inspect.unwrap(getattr(function, "__func__", function))


@contextmanager
def noting(every):
    """A set that each function with a move comes into, by its name and file, whenever it runs."""
    ran, kept = set(), []
    for file, name in {(move.file, move.function) for move in every}:
        tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
        node = dict(_tops(tree))[name]
        node.body.insert(0, ast.parse(f"__ran__.add({(file, name)!r})").body[0])
        function = function_of(Move(file, name, 0, ""))
        kept.append((function, function.__code__))
        function.__globals__["__ran__"] = ran
        function.__code__ = _find(
            compile(ast.fix_missing_locations(tree), str(SOURCE / file), "exec"), name
        )
    try:
        yield ran
    finally:
        for function, code in kept:
            function.__code__ = code
            function.__globals__.pop("__ran__", None)


@contextmanager
def without(move):
    """The package without a move, as long as the body runs."""
    file = SOURCE / move.file
    tree = ast.parse(file.read_text(encoding="utf-8"))
    call = list(_calls(tree))[move.index]
    tree = ast.fix_missing_locations(_Without(call).visit(tree))
    module = compile(tree, str(file), "exec", dont_inherit=True)
    function = function_of(move)
    code = function.__code__
    function.__code__ = _find(module, move.function)
    try:
        yield
    finally:
        function.__code__ = code


def _find(code, name):
    """The code of a function within other code, by its qualified name."""
    for one in code.co_consts:
        if isinstance(one, CodeType):
            found = one if one.co_qualname == name else _find(one, name)
            if found is not None:
                return found
    return None
