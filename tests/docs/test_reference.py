"""The reference: every public name stands in it once; docstrings become Markdown."""

import re
from collections import Counter

import pytest

import shallower as sh
from tests.conftest import ROOT

PAGES = (ROOT / "docs" / "reference").glob("*.md")
ELSEWHERE = {"_core.__version__": "__version__", "judgement.criteria.criteria": "criteria"}
"""Names that no type checker is told of, where they are defined."""


def test_every_public_name_has_one_place():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = re.findall(r"^::: shallower\.(\S+)$", text, re.MULTILINE)
    assert Counter(ELSEWHERE.get(name, name) for name in named) == Counter(sh.__all__)


def test_the_front_page_names_twelve_functions_where_they_stand():
    folder = ROOT / "docs" / "reference"
    text = (folder / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\((.+)#shallower\.(\w+)\) \|", text, re.MULTILINE)
    assert len({name for name, *_ in rows}) == 12
    for name, page, anchor in rows:
        assert name == anchor
        assert callable(getattr(sh, name))
        assert f"::: shallower.{name}\n" in (folder / page).read_text(encoding="utf-8")


def test_roles_become_links_to_what_is_public():
    docstrings = pytest.importorskip("tests.docstrings", reason="needs the group docs")
    said = docstrings.as_markdown(
        "By :func:`scan`, :meth:`Scan.plan`, :class:`Decoder`, :func:`shallower.patch`.\n\n"
        "    Example:\n        >>> 1\n"
    )
    assert said == (
        "By [`scan`][shallower.scan], [`Scan.plan`][shallower.Scan.plan], `Decoder`, "
        "[`patch`][shallower.patch].\n\n    Examples:\n        >>> 1\n"
    )
