"""What the site's reader of docstrings is told of ours: Sphinx's roles, `Example`, and options."""

import re
from importlib import import_module
from typing import get_args

import griffe

import shallower
from shallower.settings.options import Group, options_of

ROLE = re.compile(r":(?:attr|class|func|meth):`[~.]?([\w.]+)`")


def as_markdown(text):
    """A docstring with links in place of roles, and its examples as Google's style names them."""

    def link(match):
        name = match[1].removeprefix("shallower.")
        of, _, member = name.partition(".")
        public = of in shallower.__all__ and (not member or hasattr(getattr(shallower, of), member))
        return f"[`{name}`][shallower.{name}]" if public else f"`{name}`"

    return re.sub(r"^( *)Example:$", r"\1Examples:", ROLE.sub(link, text), flags=re.MULTILINE)


def calls(default):
    """Whether the default of a field is a call that makes an option."""
    if not isinstance(default, griffe.ExprCall):
        return False
    return str(default.function).removeprefix("option.") in get_args(Group)


class Docstrings(griffe.Extension):
    """Docstrings as Markdown, before they are read; settings with the help of their options."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_class(self, *, cls, **_):
        made = cls.members.get("__init__")
        options = [one for one in made.parameters if calls(one.default)] if made else []
        for one in options:
            one.default = one.default.arguments[0]
        if options:
            found = options_of(getattr(import_module(cls.module.path), cls.name))
            lines = [f"    {name}: {one.sentence}" for name, one in found.items()]
            cls.docstring.value += "\n".join(["\n\nAttributes:", *lines])
