"""The site in a real browser: it can be read at two widths, by everyone, and asks nobody else."""

import functools
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests import site

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None and os.environ.get("CI") != "true":
    pytest.skip("no chromium here: `make browser` installs it", allow_module_level=True)

pytestmark = pytest.mark.slow

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

PAGES = ["index", "tutorial", "how-to/run", "reference/scan-and-plan", "gallery", "benchmarks"]
BROAD = [
    "install", "tutorial", "gallery", "comparison", "maths", "derivations", "how-to/eval",
    "how-to/compare",
]  # fmt: skip
"""Pages of long commands and of many columns."""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    """The site, served to this machine."""
    pytest.importorskip("zensical", reason="needs the group docs")
    site.stage()
    site.write_commands()
    assert site.build() == []
    handler = functools.partial(Quiet, directory=str(site.SITE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "CI has no chromium: `make browser` installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (480, "dark")])
def test_a_page_can_be_read_by_everyone(browser, address, name, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.set_default_timeout(60_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/{name}.html", wait_until="networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    found = Axe().run(page).response["violations"]
    assert [
        (one["id"], [node["html"][:200] for node in one["nodes"][:3]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ] == []
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith((address, "data:"))] == []


@pytest.mark.parametrize("name", BROAD)
def test_code_and_tables_fit(browser, address, name):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(f"{address}/{name}.html", wait_until="networkidle")
    cut_off = """() => [...document.querySelectorAll('.md-typeset__scrollwrap, pre > code')]
        .filter(one => one.scrollWidth > one.clientWidth + 1)
        .map(one => one.textContent.trim().slice(0, 60))"""
    assert page.evaluate(cut_off) == []
    page.close()
