"""The gallery: copy the pages of results, and draw the head of each in Chromium.

`python -m tests.gallery FOLDER` takes them from FOLDER; docs/gallery.md says how they are made.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.conftest import ROOT

GALLERY = ROOT / "docs" / "gallery"
KINDS = ("run", "comparison", "curve", "models")
LARGEST = 550_000
"""Bytes of a page at most, beside which a repository stays small."""


def main(folder):
    GALLERY.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1000, "height": 700}, color_scheme="light")
        for kind in KINDS:
            made = Path(folder) / kind / "report.html"
            assert made.stat().st_size < LARGEST, made
            shutil.copyfile(made, GALLERY / f"{kind}.html")
            page.goto(made.absolute().as_uri())
            page.screenshot(path=GALLERY / f"{kind}.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
