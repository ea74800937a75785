"""The public names: their parameters and their docstrings."""

import inspect
import re

import pytest

import shallower

DUNDERS = ("__call__",)


def public():
    """(name, function) of every public function, and of the public methods of public classes."""
    for name in shallower.__all__:
        value = getattr(shallower, name)
        if inspect.isfunction(value) or inspect.isbuiltin(value):
            yield name, value
        elif inspect.isclass(value) and not issubclass(value, (Exception, Warning)):
            for inner, member in vars(value).items():
                if not inner.startswith("_") or inner in DUNDERS:
                    function = getattr(member, "__func__", member)
                    if inspect.isfunction(function):
                        yield f"{name}.{inner}", function


PUBLIC = dict(public())
FUNCTIONS = [name for name in PUBLIC if "." not in name]
"""Described in full; a method's names and types are enough beside its sentence."""


def parameters(function):
    """The parameters of a function, ``self`` and ``cls`` aside."""
    found = inspect.signature(function).parameters.values()
    return [one for one in found if one.name not in ("self", "cls")]


def section(text, title):
    """The indented lines under a heading of Google's style."""
    match = re.search(rf"^{title}:\n((?:[ ]+.*\n|\n)+)", f"{text}\n", re.MULTILINE)
    return match[1] if match else ""


def documented(text):
    """The names under ``Args``."""
    names = re.findall(r"^ {4}(?=\S)(.+?)(?: \(.*?\))?:", section(text, "Args"), re.MULTILINE)
    return {name.strip(" *") for group in names for name in group.split(",")}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_method_has_a_sentence(name):
    assert inspect.getdoc(PUBLIC[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_described(name):
    function = PUBLIC[name]
    text = inspect.getdoc(function)
    assert documented(text) == {one.name for one in parameters(function)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_returned_is_described(name):
    function = PUBLIC[name]
    returned = inspect.signature(function).return_annotation
    assert returned is not inspect.Signature.empty
    if returned in (None, "None"):
        return
    text = inspect.getdoc(function)
    assert section(text, "Returns") or section(text, "Yields"), "no Returns"


@pytest.mark.parametrize("name", shallower.__all__)
def test_the_first_line_stands_alone(name):
    value = getattr(shallower, name)
    if isinstance(value, (str, dict)):  # the version, and the table of criteria
        return
    first = inspect.getdoc(value).splitlines()[0]
    assert first.endswith("."), first
    assert not re.match(r"What |How |Its |Whether ", first), first
