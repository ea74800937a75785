"""The site: built without a warning, whole, without a dead link or a page that none leads to."""

import re

import pytest

from tests import site
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def built():
    pytest.importorskip("zensical", reason="needs the group docs")
    site.stage()
    site.write_commands()
    return site.build()


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(built):
    assert built == []


@pytest.mark.slow
def test_no_link_of_the_site_is_dead(built):
    assert site.dead_links() == []


@pytest.mark.slow
def test_every_page_of_the_documentation_is_in_the_site_and_its_navigation(built):
    pages = {page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")}
    home = site.Page((site.SITE / "index.html").read_text(encoding="utf-8"))
    links = {link.removeprefix("./") for link in home.links}
    assert {str(page.with_suffix(".html")) for page in pages} - links == set()


def test_how_to_pages_are_in_groups_that_are_seen_at_once():
    nav = re.search(r"^  - How-to:\n((?: {6,}.*\n)+)", (ROOT / "mkdocs.yml").read_text(), re.M)[1]
    groups = re.split(r"^      - .*:\n", nav, flags=re.M)
    assert groups[0] == ""
    sizes = [group.count(".md") for group in groups[1:]]
    assert sum(sizes) == len(list((ROOT / "docs" / "how-to").glob("*.md")))
    assert max(sizes) <= 7


def installs():
    """The lines that install the package, of README."""
    return [line for line in site.installing().splitlines() if line.startswith("    pip")]


def test_pages_install_in_the_words_of_the_readme(tmp_path):
    site.stage(pages=tmp_path)
    page = (tmp_path / "install.md").read_text(encoding="utf-8")
    assert any("pip install" in line for line in installs())
    assert all(line in page for line in installs())
    assert "pip install" not in (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


def test_every_command_has_its_help_on_a_page(tmp_path, monkeypatch):
    from shallower.cli import COMMANDS

    monkeypatch.setenv("COLUMNS", "80")  # which is set for the page
    site.write_commands(tmp_path / "commands.md")
    page = (tmp_path / "commands.md").read_text(encoding="utf-8")
    assert all(f"\n## shallower {name}\n" in page for name in COMMANDS)
    assert "--max-length" in page


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<a href="b.html#there">', []),
        ('<a href="https://example.org/x">', []),
        ('<a href="c.html">', ["a.html: c.html"]),
        ('<a href="b.html#nowhere">', ["a.html: b.html#nowhere"]),
        ('<a href="https://nohost/x">', ["a.html: https://nohost/x"]),
        ('<img src="https://example.org/d.png">', ["a.html loads https://example.org/d.png"]),
        ('<link rel="stylesheet" href="//a.org/x.css">', ["a.html loads //a.org/x.css"]),
    ],
)
def test_dead_links_are_found(tmp_path, body, said):
    write(tmp_path, {"a.html": body, "b.html": '<h1 id="there">'})
    assert site.dead_links(tmp_path) == said
