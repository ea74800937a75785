"""The page in a real browser: it renders, says values under the pointer, and asks nobody."""

import os
import shutil

import pytest

from shallower.reporting.report import report
from tests.reporting.comparisons import compared, comparison, curve
from tests.reporting.stories import HOSTILE, made_run, write
from tests.reporting.test_models import several

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None and os.environ.get("CI") != "true":
    pytest.skip("no chromium here: `make browser` installs it", allow_module_level=True)

pytestmark = pytest.mark.slow

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "CI has no chromium: `make browser` installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of each kind, and one whose words are hostile."""
    folder = tmp_path_factory.mktemp("pages")
    made_run(folder / "run")
    made_run(folder / "hostile", 18, name=HOSTILE, prompt=HOSTILE)
    write(folder / "comparison", "comparison.json", comparison(models=(compared(),)))
    write(folder / "curve", "comparison.json", curve(), command="shallower curve MODEL --out CURVE")
    write(folder / "several", "comparison.json", several())
    return {path.name: report(path) for path in folder.iterdir()}


@pytest.fixture
def opened(browser, pages):
    """Open a page; at the end nothing was said on the console and nothing was asked for."""
    contexts, said, asked = [], [], []

    def open_page(kind, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages[kind].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("kind", ["run", "comparison", "curve", "several"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
def test_a_page_can_be_read(opened, kind, width, scheme):
    page = opened(kind, width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    figures = page.locator(".drawing svg").all()
    assert len(figures) >= {"run": 5, "comparison": 2, "curve": 3, "several": 9}[kind]
    for figure in figures:
        box = figure.bounding_box()
        assert box["width"] > 250
        assert box["height"] > 80
        smallest = figure.evaluate(
            "svg => Math.min(...[...svg.querySelectorAll('text')]"
            ".map(text => parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a))"
        )
        assert smallest >= 8.5
    paper, ink = (
        page.evaluate(f"getComputedStyle(document.body).{name}")
        for name in ("backgroundColor", "color")
    )
    dark = "rgb(20, 23, 27)", "rgb(233, 237, 241)"
    assert ((paper, ink) == dark) == (scheme == "dark")


@pytest.mark.parametrize("kind", ["run", "comparison", "curve", "several"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened, kind, scheme):
    page = opened(kind, 375 if scheme == "dark" else 1280, color_scheme=scheme)
    found = Axe().run(page).response["violations"]
    assert [
        (one["id"], [node["html"][:200] for node in one["nodes"][:3]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ] == []


def test_the_first_screen_says_which_layers_go_and_what_it_costs(opened):
    page = opened("run")
    for place, words in (
        (".sentence", "Drop layers [12, 16)"),
        (".strip", "12 to 15"),
        (".steps .chosen", "patched"),
        (".steps .chosen .more", "+0."),
        (".unit + p", "perplexity is"),
    ):
        found = page.locator(place).first
        assert words in found.inner_text()
        box = found.bounding_box()
        assert box["y"] + box["height"] < 900, words
    assert page.locator(".layers .gone").count() == 4
    assert page.locator(".layers span").count() == 30


def test_values_are_said_under_the_pointer(opened):
    page = opened("run")
    hover = page.locator("#hover")
    assert hover.is_hidden()
    for name, told in (("heat_map_raw", "n = "), ("least_distance", "n = 3, [")):
        svg = page.locator(f'.drawing[data-name="{name}"] svg')
        svg.scroll_into_view_if_needed()
        x, y = svg.evaluate(
            """(svg, name) => {
                const of = marks[name];
                const [x, y] = of.grid
                    ? [of.grid[0] + 2.5 * of.grid[2], of.grid[1] - 3.5 * of.grid[3]]
                    : of.marks[2];
                const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
                return [at.x, at.y];
            }""",
            name,
        )
        page.mouse.move(x, y)
        assert hover.is_visible()
        assert told in hover.inner_text()
    said = page.evaluate("marks.least_distance.marks[2][2]")
    assert hover.inner_text() == said
    page.mouse.move(2, 2)
    assert hover.is_hidden()


def test_a_cell_says_the_distance_of_its_block(opened):
    page = opened("run")
    svg = page.locator('.drawing[data-name="heat_map_raw"] svg')
    svg.scroll_into_view_if_needed()
    x, y, value = svg.evaluate(
        """svg => {
            const of = marks.heat_map_raw, [left, bottom, width, height] = of.grid;
            const at = new DOMPoint(left + 5.5 * width, bottom - 3.5 * height);
            const there = at.matrixTransform(svg.getScreenCTM());
            return [there.x, there.y, of.rows[3][5]];
        }"""
    )
    page.mouse.move(x, y)
    assert page.locator("#hover").inner_text() == f"n = 4, layers [5, 9): {value:.4f}"


def test_tables_are_sorted_by_a_click(opened):
    page = opened("comparison")
    table = page.locator("table.sortable").filter(has_text="layer forwards").first
    column = "table => [...table.tBodies[0].rows].map(row => Number(row.cells[3].dataset.value))"
    before = table.evaluate(column)
    button = table.get_by_role("button", name="loss", exact=True)
    button.click()
    assert table.evaluate(column) == sorted(before) != before
    button.click()
    assert table.evaluate(column) == sorted(before, reverse=True)
    assert table.locator("th[aria-sort=descending]").count() == 1


def test_bars_of_the_cost_have_one_length_and_say_what_they_show(opened):
    for width in (390, 1280):
        page = opened("run", width)
        tracks = [one.bounding_box() for one in page.locator(".steps .bar").all()]
        assert len(tracks) == 3
        assert len({(one["x"], one["width"]) for one in tracks}) == 1
        assert tracks[0]["width"] > 60
        assert "extra loss" in page.locator(".unit").inner_text()


@pytest.mark.parametrize("kind", ["run", "comparison", "curve", "several"])
def test_numbers_stand_below_one_another(opened, kind):
    page = opened(kind)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    aligned = page.evaluate(
        """() => [...document.querySelectorAll('table')].flatMap(table =>
            [...table.querySelectorAll('td')]
                .filter(cell => /^[+−-]?[0-9.]+( |$)/.test(cell.textContent))
                .flatMap(cell => [cell, table.tHead.rows[0].cells[cell.cellIndex]])
                .map(cell => getComputedStyle(cell).textAlign))"""
    )
    assert len(aligned) > 20
    assert {*aligned} == {"right"}


def test_a_table_that_goes_on_says_so(opened):
    wide, narrow = opened("run", 1280), opened("run", 390)
    assert wide.locator(".wider").count() == 0
    hint = "one => getComputedStyle(one, '::before').content"
    table = narrow.locator(".scroll", has_text="deepest, patched").first
    assert "goes on to the right" in table.evaluate(hint)
    # Where no script runs, the edge behind which it goes on has a shadow.
    assert "gradient" in table.evaluate("one => getComputedStyle(one).backgroundImage")


def test_lines_of_a_sample_keep_their_indentation(opened):
    page = opened("hostile")
    said = page.locator(".sample dd").first
    assert said.evaluate("one => getComputedStyle(one).whiteSpace") == "pre-wrap"


def test_hostile_words_do_nothing(opened):
    page = opened("hostile")
    assert page.evaluate("window.struck") is None
    assert page.get_by_text("<script>window.struck = true</script>").first.is_visible()


def test_a_page_is_whole_without_script_and_in_print(opened):
    page = opened("run", 375, java_script_enabled=False)
    assert page.get_by_text("Drop layers [12, 16)").is_visible()
    assert page.locator(".drawing svg").first.is_visible()
    assert page.locator("table").filter(has_text="proposed by").first.is_visible()
    assert page.locator("#hover").is_hidden()
    page.emulate_media(media="print", color_scheme="dark")
    colours = page.locator("body").evaluate("body => getComputedStyle(body).color")
    assert colours == "rgb(0, 0, 0)"


def test_pages_are_small(pages):
    for kind, page in pages.items():
        assert page.stat().st_size < 1_000_000, kind
