"""What the site's reader of docstrings is told of ours: Sphinx's roles, `Example`, and options."""

import re
from importlib import import_module

import griffe

import shallower
from shallower.values.options import options_of

ROLE = re.compile(r":(?:attr|class|func|meth):`[~.]?([\w.]+)`")


def as_markdown(text):
    """A docstring with links in place of roles, and its examples as Google's style names them."""

    def link(match):
        name = match[1].removeprefix("shallower.")
        of, _, member = name.partition(".")
        public = of in shallower.__all__ and (not member or hasattr(getattr(shallower, of), member))
        return f"[`{name}`][shallower.{name}]" if public else f"`{name}`"

    return re.sub(r"^( *)Example:$", r"\1Examples:", ROLE.sub(link, text), flags=re.MULTILINE)


def options_in(cls):
    """The fields of a class, as its source has them, that are options of a command."""
    calls = {name: one.value for name, one in cls.members.items() if one.is_attribute}
    return {
        name: call.arguments
        for name, call in calls.items()
        if isinstance(call, griffe.ExprCall) and str(call.function) == "option"
    }


class Docstrings(griffe.Extension):
    """Docstrings as Markdown, before they are read; settings with the help of their options."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_class(self, *, cls, **_):
        own = options_in(cls)
        for name, (default, *_) in own.items():
            cls.members[name].value = default
        if own:
            options = options_of(getattr(import_module(cls.module.path), cls.name))
            lines = [f"    {name}: {one.sentence}" for name, one in options.items()]
            cls.docstring.value += "\n".join(["\n\nAttributes:", *lines])
