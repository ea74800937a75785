"""The site of the documentation: its pages staged, built by Zensical, its links checked.

What lies outside ``docs/`` and is linked from a page, such as a record, comes along.
"""

import os
import posixpath
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

from tests.commands import in_this_process
from tests.conftest import ROOT

PAGES, SITE = ROOT / "target" / "pages", ROOT / "target" / "site"
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
INSTALL = "<!-- Install, of README.md -->"
"""Where the site says how the package is installed, in README's words."""
PAPERS = ("CHANGELOG.md", "CONTRIBUTING.md", "ARCHITECTURE.md")
"""Pages of the site that stand where people look for them in a repository."""


def place(path):
    """Where a file of the repository stands in the site; the home page stands for README."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def stage(root=ROOT, pages=PAGES):
    """Copy all pages, and all that they link to, to where the site is built from."""
    shutil.rmtree(pages, ignore_errors=True)
    waiting = [str(file.relative_to(root)) for file in (root / "docs").rglob("*") if file.is_file()]
    waiting += [paper for paper in PAPERS if (root / paper).is_file()]
    seen = {"README.md"}
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        to = pages / place(path)
        to.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".md"):
            text = (root / path).read_text(encoding="utf-8")
            text = _relinked(text, path, root, waiting)
            if INSTALL in text:
                section = _relinked(installing(root), "README.md", root, waiting)
                text = text.replace(INSTALL, section)
            to.write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(root / path, to)


def installing(root=ROOT):
    """What README says of how the package is installed: no other page does."""
    text = (root / "README.md").read_text(encoding="utf-8")
    return re.search(r"^## Install\n+(.*?)(?=\n+## )", text, re.M | re.S)[1]


def _relinked(text, path, root, waiting):
    """The text of a page with its links as the site has them; what it links to waits."""

    def relink(match):
        words, link = match.groups()
        target, _, anchor = link.partition("#")
        if not target or urlsplit(link).scheme:
            return match[0]
        at = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if (root / at).is_dir():  # a site has no lists of files
            return words
        if (root / at).is_file():
            waiting.append(at)
        stands = place(at)
        if (at, anchor) == ("README.md", "install"):
            stands, anchor = "install.md", ""
        to = posixpath.relpath(stands, posixpath.dirname(place(path)) or ".")
        return f"[{words}]({to}{anchor and '#' + anchor})"

    return LINK.sub(relink, text)


def write_commands(file=PAGES / "reference" / "commands.md"):
    """A page of what every command says to --help-all."""
    from shallower.cli import COMMANDS

    os.environ["COLUMNS"] = "80"
    page = ["# Commands\n\nWhat `shallower COMMAND --help-all` says.\n"]
    for words in ((), *((name,) for name in COMMANDS)):
        said = in_this_process(*words, "--help-all").out.rstrip()
        page.append(f"\n## {' '.join(('shallower', *words))}\n\n```text\n{said}\n```\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(page), encoding="utf-8")


def build():
    """Build the staged pages; return what was said where it was more than nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    expected = re.compile(r"Build (started|finished in .*)|No issues found")
    return [line for line in said if not expected.fullmatch(line.strip())] + (
        [f"exit status {done.returncode}"] if done.returncode else []
    )


class Page(HTMLParser):
    """The names in a page that a link can lead to, its links, and what it loads."""

    def __init__(self, html):
        super().__init__()
        self.names, self.links, self.loads = set(), [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        named = {name: value or "" for name, value in attrs}
        self.names |= {named[name] for name in ("id", "name") if name in named}
        if tag == "a" and "href" in named:
            self.links.append(named["href"])
        elif tag == "link" and named.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(named["href"])
        elif "src" in named:
            self.loads.append(named["src"])


def dead_links(site=SITE):
    """Links of all pages that lead nowhere, and what a page would load from elsewhere."""
    pages = {
        file: Page(file.read_text(encoding="utf-8"))
        for file in site.rglob("*.html")
        if file.name != "404.html"  # its links begin where the server puts the site
    }
    found = []
    for file, page in pages.items():
        name = file.relative_to(site)
        found += [f"{name}: {link}" for link in page.links if _is_dead(link, file, pages)]
        found += [
            f"{name} loads {link}"
            for link in page.loads
            if urlsplit(link).scheme != "data" and (
                urlsplit(link).netloc or _is_dead(link, file, pages)
            )
        ]  # fmt: skip
    return sorted(set(found))


def _is_dead(link, file, pages):
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        well_formed = parts.scheme in ("http", "https") and "." in (parts.hostname or "")
        return not (well_formed or parts.scheme == "mailto")
    to = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if to in pages:
        return bool(parts.fragment) and unquote(parts.fragment) not in pages[to].names
    return not to.is_file()


def main():
    stage()
    write_commands()
    if wrong := build() + dead_links():
        sys.exit("\n".join(wrong))
    print(f"the site is in {SITE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
