"""The page of a report: its words, its numbers, and what hostile words cannot do in it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from shallower.reporting.stories.comparison import comparison_story
from shallower.reporting.story import (
    Fact,
    ModelState,
    Number,
    PromptSample,
    Section,
    Story,
    Strip,
    Table,
    without_items,
)
from shallower.reporting.writers.page import to_html, to_markdown
from tests.reporting.comparisons import curve
from tests.reporting.stories import HOSTILE


def story(word="plain"):
    table = Table(
        word, (word, "n"), ((word, Number.of(1.5, 0.25, 2)), (word, Number.of(None))), word, 0
    )
    section = Section(
        word, (word,), (Fact(word, word, word),), (table,),
        samples=(PromptSample(word, {word: word}),), commands=(word,),
    )  # fmt: skip
    return Story(
        "run", word, word, (Strip(word, 4, (1, 2), word),),
        (ModelState(word, Number.of(1.0), word, 0.5),), word,
        (Fact(word, Number.share(0.25), word),), (word,), (section,),
        {"words": word, "by_text": [1, 2], "x": float("nan")},
    )  # fmt: skip


class Elements(HTMLParser):
    """The elements of a page, their attributes, and the text of each script."""

    def __init__(self):
        super().__init__()
        self.found, self.scripts, self._inside = [], [], False

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def parsed(page):
    elements = Elements()
    elements.feed(page)
    return elements


def test_a_sample_keeps_its_lines_in_markdown():
    code = "def f(x):\n    return x"
    of_code = replace(story().sections[0], samples=(PromptSample("go on", {"cut": code}),))
    text = to_markdown(replace(story(), sections=(of_code,)))
    assert ">     def f(x):\n>         return x\n" in text + "\n"


def test_what_was_found_comes_before_settings(told):
    titles = [section.title for section in told[0].sections]
    assert titles.index("Settings") == titles.index("Every number, and where it is from") - 1
    assert titles.index("Settings") > 0


def test_hostile_words_make_no_element():
    plain, hostile = (parsed(to_html(story(word))) for word in ("plain", HOSTILE))
    assert [tag for tag, _ in hostile.found] == [tag for tag, _ in plain.found]
    assert not any(name.startswith("on") for _, attrs in hostile.found for name in attrs)
    numbers = json.loads(hostile.scripts[0])
    assert numbers["title"] == numbers["data"]["words"] == HOSTILE


@pytest.fixture(scope="module")
def told():
    """The story of a curve of a hostile model, and its page."""
    story = comparison_story(curve(HOSTILE))
    return story, to_html(story)


def test_hostile_words_make_nothing_in_a_figure(told):
    _, page = told
    assert "<script>window" not in page
    assert "<img" not in page
    assert page.count("<script") == 3


def test_no_page_names_a_place_elsewhere(told):
    _, page = told
    loaded = [
        value
        for _, attrs in parsed(page).found
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href", "action", "data") and not value.startswith("#")
    ]
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert "url(http" not in page
    assert "@import" not in page


def test_the_policy_allows_our_script_alone():
    import base64
    import hashlib

    elements = parsed(to_html(story()))
    (policy,) = (attrs["content"] for tag, attrs in elements.found if attrs.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(elements.scripts[-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_identifiers_are_unique_and_all_references_are_met(told):
    _, page = told
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(names)) == len(names)
    used = re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', page)
    used += [(name, "") for names in re.findall(r'aria-labelledby="([^"]+)"', page)
             for name in names.split()]  # fmt: skip
    assert used
    assert {one or other for one, other in used} <= set(names)


def test_figures_have_the_colours_and_fonts_of_the_page(told):
    _, page = told
    svg = page[page.index("<svg") : page.rindex("</svg>")]
    assert "var(--ink)" in svg
    assert "DejaVu Sans'," not in svg.replace("'DejaVu Sans', sans-serif", "")
    assert "#1b1f24" not in svg
    assert "<metadata>" not in svg


def test_what_json_has_not_is_null_and_what_is_long_is_left_out():
    data = story().to_json()["data"]
    assert data == {"words": "plain", "x": None}
    spoken = {"acceptance": 0.5, "by_prompt": {"scores": [0.5]}}
    assert without_items([spoken]) == [{"acceptance": 0.5}]
    healing = {"recipe": {"steps": 60}, "steps": [{"step": 0, "loss": 4.0}] * 60}
    assert without_items(healing) == {"recipe": {"steps": 60}}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Number.of(3.14159, 0.25, 2), "3.14 ± 0.25"),
        (Number.of(-0.5, sign=True), "-0.500"),
        (Number.of(0.5, float("nan"), sign=True), "+0.500"),
        (Number.of(float("nan"), 1.0), "–"),
        (Number.of(None), "–"),
        (Number.share(0.125, 1), "12.5 %"),
        (Number.share(None), "–"),
        (Number.count(12345), "12,345"),
        (Number.count(None), "–"),
    ],
)
def test_numbers_are_written(number, text):
    assert number.text == text


def test_markdown_has_the_same_words_and_no_signs_of_its_own(told):
    written = to_markdown(story("a|b*c<d>`e`"))
    assert "# a\\|b\\*c&lt;d&gt;\\`e\\`" in written
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 4) for line in rows)
    assert "1.50 ± 0.25" in written
    assert "<script" not in to_markdown(told[0])
