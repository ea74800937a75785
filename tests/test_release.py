"""A tree that is ready is released, and one that is not is told all that is wrong with it."""

import shutil
import subprocess
import sys

import pytest

from tests import release
from tests.conftest import ROOT

CHANGELOG = """# Changelog

## [Unreleased]

## [0.2.0] - 2026-11-30

### Added

- Cuts of experts.

## [0.1.0] - 2026-11-25

- A beginning.

[0.2.0]: https://example.org/v0.2.0
"""


ABI3 = "shallower-0.2.0-cp311-abi3-manylinux2014_x86_64.whl"


def write_wheel(folder, name=ABI3):
    """A wheel that was audited."""
    folder.mkdir(exist_ok=True)
    (folder / name).touch()
    (folder / ".audited").touch()


def git(tree, *words):
    known = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", tree, *known, *words], check=True, capture_output=True)


def commit(tree):
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--allow-empty", "--message", "All")


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A repository that is ready for 0.2.0."""
    folder = tmp_path_factory.mktemp("ready")
    files = {
        ".gitignore": "/dist\n/target\n",
        "Cargo.toml": '[package]\nname = "shallower"\nversion = "0.2.0"\n',
        "Cargo.lock": '[[package]]\nname = "half"\nversion = "2.7.0"\n\n'
        '[[package]]\nname = "shallower"\nversion = "0.2.0"\n',
        "pyproject.toml": '[project]\nname = "shallower"\ndynamic = ["version"]\n',
        "CHANGELOG.md": CHANGELOG,
        "CITATION.cff": 'cff-version: 1.2.0\nversion: 0.2.0\ndate-released: "2026-11-30"\n',
        "README.md": "pip install shallower==0.2.0\n",
        "docs/install.md": "shallower 0.2.0 needs Python 3.11.0, shallower-lint 3.0.0 nothing.\n",
        "target/site/index.html": "",
        "Makefile": "fine:\n\t@echo well\nbroken:\n\t@echo a link is dead && false\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init", "--quiet", "--template=")
    commit(folder)
    return folder


@pytest.fixture
def tree(ready, tmp_path):
    """The same, to be changed, with a wheel that has been audited."""
    shutil.copytree(ready, tmp_path, dirs_exist_ok=True)
    write_wheel(tmp_path / "dist")
    return tmp_path


def change(tree, name, old, new):
    text = (tree / name).read_text()
    assert old in text
    (tree / name).write_text(text.replace(old, new))
    commit(tree)


def test_a_tree_that_is_ready_passes(tree):
    write_wheel(tree / "dist", "shallower-0.2.0-cp311-abi3-manylinux2014_aarch64.whl")
    write_wheel(tree / "dist", "shallower-0.2.0-cp314-cp314t-macosx_11_0_arm64.whl")
    git(tree, "tag", "v0.2.0")
    assert list(release.failures(tree, ["fine"])) == []


CHANGES = {
    "no entry": (
        ("CHANGELOG.md", "## [0.2.0] - 2026-11-30", "## [0.3.0] - 2026-11-30"),
        "CHANGELOG.md has no entry '## [0.2.0] - YYYY-MM-DD'",
    ),
    "no date": (
        ("CHANGELOG.md", "[0.2.0] - 2026-11-30", "[0.2.0] - soon"),
        "[0.2.0] has no date",
    ),
    "left out": (
        ("CHANGELOG.md", "[Unreleased]\n", "[Unreleased]\n\n- More.\n"),
        "move what is under [Unreleased] to [0.2.0]",
    ),
    "citation": (
        ("CITATION.cff", "\nversion: 0.2.0", "\nversion: 0.1.0"),
        "CITATION.cff says version 0.1.0, Cargo.toml 0.2.0",
    ),
    "another day": (("CITATION.cff", "30", "29"), "date-released is not 2026-11-30"),
    "a clone": (
        ("README.md", "shallower==0.2.0", "'.[all]'"),
        "README.md installs a clone, and the tag publishes this version: write pip install 'shall",
    ),
    "another page installs": (
        ("docs/install.md", "nothing.", "'pip install --quiet \"shallower[all]\"'."),
        "docs/install.md has 'pip install --quiet \"shallower[all]': link to Install in README.md",
    ),
    "python": (
        ("pyproject.toml", 'dynamic = ["version"]', 'version = "0.2.1"'),
        "pyproject.toml says version 0.2.1",
    ),
}


@pytest.mark.parametrize(("changed", "expected"), CHANGES.values(), ids=CHANGES)
def test_what_is_not_ready_is_told(tree, changed, expected):
    change(tree, *changed)
    (found,) = release.failures(tree)
    assert expected in found


def test_no_page_but_readme_tells_how_to_install_this_package():
    """What a release changes is one place; until then no index has the package."""
    assert list(release.installs(ROOT, is_published=False)) == []


def test_a_version_that_was_given_away_is_told(tree):
    git(tree, "tag", "v0.2.0")
    commit(tree)
    (found,) = release.failures(tree)
    assert found == "the tag v0.2.0 is on another commit: give this one a new version"


def test_a_wheel_that_came_after_the_audit_is_told(tree):
    (tree / "dist" / ".audited").unlink()
    (found,) = release.failures(tree)
    assert found == f"{ABI3} was not audited: 'make release' does it"


def test_all_is_told_at_once_and_then_what_to_do(tree, monkeypatch, capsys):
    monkeypatch.setattr(release, "ROOT", tree)
    release.main(["fine"])
    assert "git push origin v0.2.0" in capsys.readouterr().out

    change(tree, "CHANGELOG.md", "- Cuts of experts.\n", "")
    change(tree, "Cargo.lock", "0.2.0", "0.1.0")
    (tree / "left.py").write_text("")
    (tree / "dist" / ABI3).unlink()
    (tree / "target" / "site" / "index.html").unlink()
    with pytest.raises(SystemExit, match="not ready: 6 of the above"):
        release.main(["broken"])
    printed = capsys.readouterr().out
    for word in (
        "dirty", "nothing under [0.2.0]", "Cargo.lock says version 0.1.0, Cargo.toml 0.2.0",
        "make broken", "no wheel", "target/site has no index.html",
    ):  # fmt: skip
        assert word in printed
    assert "git push" not in printed


def test_our_own_versions_agree():
    assert [*release.versions(ROOT)] == []


def test_the_check_is_a_command_that_needs_no_package(tree):
    words = [sys.executable, "-S", "-c", "from tests import release; print(release.NAME)"]
    assert subprocess.check_output(words, cwd=ROOT, text=True) == "shallower\n"
