"""What the site's reader of docstrings is told of ours: Sphinx's roles, and `Example`."""

import re

import griffe

import shallower

ROLE = re.compile(r":(?:attr|class|func|meth):`[~.]?([\w.]+)`")


def as_markdown(text):
    """A docstring with links in place of roles, and its examples as Google's style names them."""

    def link(match):
        name = match[1].removeprefix("shallower.")
        of, _, member = name.partition(".")
        public = of in shallower.__all__ and (not member or hasattr(getattr(shallower, of), member))
        return f"[`{name}`][shallower.{name}]" if public else f"`{name}`"

    return re.sub(r"^( *)Example:$", r"\1Examples:", ROLE.sub(link, text), flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Docstrings as Markdown, before they are read."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
