"""What must be so before a version is tagged; run by `make release-check`.

Each check takes paths and gives sentences on what is wrong. ``python -m tests.release TARGET…``
runs all of them and has `make` build the targets, and prints every sentence, or what to do next.
"""

import re
import subprocess
import sys
import tomllib
import zipfile
from datetime import date
from email.parser import HeaderParser
from itertools import product
from pathlib import Path

from tests.wheel import EXACT, STABLE

ROOT = Path(__file__).resolve().parents[1]
NAME = "shallower"
TAGS = [tuple(one.split("-")) for one in (*STABLE, *EXACT)]
ABI3 = TAGS[0]
"""The wheel that every Python since 3.11 loads; the others may lie beside it."""

PAPERS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md")
INSTALLING = (*PAPERS, "notebooks/*.ipynb")
INSTALLS = re.compile(
    rf"""pip install (?:-\S+ )*[\\"']*(?P<what>\.|{NAME})(?P<extras>\[[\w,]*\])?(?![\w/.-])"""
)
"""A command that installs this package: a clone, or what an index has."""
RELEASED = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>\S+))?[ \t]*$", re.MULTILINE)
SAID = re.compile(rf"\b{NAME}(?:==| v?|-)(\d+\.\d+\.\d+)\b")
USES = re.compile(r"""(?<![\w-])uses["']?\s*:\s*["']?([^\s"'#,}]*)""")
PINNED = re.compile(r"[\w.-]+(?:/[\w.-]+)+@[0-9a-f]{40}|docker://\S+@sha256:[0-9a-f]{64}|\./\S*")


def version_of(root):
    """The version that Cargo.toml gives to all of it."""
    return tomllib.loads((root / "Cargo.toml").read_text())["package"]["version"]


def dirt(root):
    """What no commit has, and a tag that is elsewhere."""
    changed = _git(root, "status", "--porcelain").splitlines()
    if changed:
        names = ", ".join(line[3:] for line in changed[:5])
        yield f"the tree is dirty: {names}{', …' if len(changed) > 5 else ''}; commit or remove it"
    tag = f"v{version_of(root)}"
    if _git(root, "tag", "--list", tag) and _git(root, "tag", "--points-at", "HEAD", tag) == "":
        yield f"the tag {tag} is on another commit: give this one a new version"


def changelog(root):
    """An entry for the version, dated, with something in it, and nothing that waits for another."""
    version, text = version_of(root), (root / "CHANGELOG.md").read_text(encoding="utf-8")
    found = {match["version"]: match for match in RELEASED.finditer(text)}
    if _below(found.get("Unreleased"), text):
        yield f"CHANGELOG.md: move what is under [Unreleased] to [{version}]"
    entry = found.get(version)
    if entry is None:
        yield f"CHANGELOG.md has no entry '## [{version}] - YYYY-MM-DD'"
        return
    if _day(entry["date"]) is None:
        yield f"CHANGELOG.md: [{version}] has no date: write '## [{version}] - YYYY-MM-DD'"
    if not _below(entry, text):
        yield f"CHANGELOG.md: there is nothing under [{version}]"


def versions(root):
    """Whether all say the version, and the citation the day, of Cargo.toml and the changelog."""
    version = version_of(root)
    locked = tomllib.loads((root / "Cargo.lock").read_text())["package"]
    said = {"Cargo.lock": [one["version"] for one in locked if one["name"] == NAME]}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    if "version" not in project.get("dynamic", []):
        said["pyproject.toml"] = [project.get("version")]
    cited = (root / "CITATION.cff").read_text(encoding="utf-8")
    said["CITATION.cff"] = [_cited("version", cited)]
    for path in sorted({path for pattern in PAPERS for path in root.glob(pattern)}):
        found = SAID.findall(path.read_text(encoding="utf-8"))
        said[str(path.relative_to(root))] = found or [version]
    for place, numbers in said.items():
        for number in dict.fromkeys(numbers or [None]):
            if number != version:
                yield f"{place} says version {number}, Cargo.toml {version}"
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    days = {match["version"]: match["date"] for match in RELEASED.finditer(text)}
    if _day(days.get(version)) and _cited("date-released", cited) != days[version]:
        yield f"CITATION.cff: date-released is not {days[version]}, the day of the changelog"


def installs(root, *, is_published=True):
    """Whether README alone tells how to install the package, and from where a release lies."""
    for path in sorted({path for pattern in INSTALLING for path in root.glob(pattern)}):
        name = str(path.relative_to(root))
        for line in path.read_text(encoding="utf-8").splitlines():
            found = INSTALLS.search(line)
            if found and name != "README.md":
                yield f"{name} has '{found[0]}': link to Install in README.md, which alone says it"
            elif found and is_published and found["what"] == ".":
                yield (
                    f"README.md installs a clone, and the tag publishes this version: write "
                    f"pip install '{NAME}{found['extras'] or ''}'"
                )


def wheels(folder, version):
    """Names, tags and metadata of the wheels; one of them is for every Python since 3.11."""
    files = sorted(folder.glob("*.whl"))
    if not any(tuple(file.stem.split("-")[2:4]) == ABI3 for file in files):
        yield f"{folder} has no wheel {NAME}-{version}-cp311-abi3-….whl: 'make release' builds it"
    since = max((file.stat().st_mtime_ns for file in folder.glob(".audited*")), default=0)
    for file in files:
        if file.stat().st_mtime_ns > since:
            yield f"{file.name} was not audited: 'make release' does it"
        yield from (f"{file.name} {wrong}" for wrong in _wheel(file, version))


def _wheel(file, version):
    name, *more = file.stem.split("-")
    if (name, len(more)) != (NAME, 4):
        yield f"is not called {NAME}-VERSION-PYTHON-ABI-PLATFORM.whl"
        return
    number, python, abi, platform = more
    if number != version:
        yield f"is of version {number}, Cargo.toml says {version}"
    if (python, abi) not in TAGS:
        allowed = " or ".join("-".join(pair) for pair in sorted(TAGS))
        yield f"is {python}-{abi}, expected {allowed}"
    if platform.startswith("linux_"):
        yield f"is for {platform}, which loads on this Linux alone: expected manylinux or musllinux"
    try:
        with zipfile.ZipFile(file) as archive:
            inside = f"{NAME}-{number}.dist-info"
            about = HeaderParser().parsestr(archive.read(f"{inside}/METADATA").decode())
            built = HeaderParser().parsestr(archive.read(f"{inside}/WHEEL").decode())
            cores = [one for one in archive.namelist() if one.startswith(f"{NAME}/_core.")]
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        yield f"cannot be read: {error}"
        return
    if (about["Name"], about["Version"]) != (NAME, version):
        yield f"calls itself {about['Name']} {about['Version']}, expected {NAME} {version}"
    tags = {
        "-".join(tag) for tag in product(*(part.split(".") for part in (python, abi, platform)))
    }
    if set(built.get_all("Tag", [])) != tags:
        yield f"is tagged {', '.join(built.get_all('Tag', []))} inside, unlike its name"
    core = [one for one in cores if one.endswith((".so", ".pyd"))]
    if (python, abi) == ABI3 and core not in ([f"{NAME}/_core.abi3.so"], [f"{NAME}/_core.pyd"]):
        yield f"holds {', '.join(core) or 'no core'}, expected {NAME}/_core.abi3.so"


def pinned(root):
    """Whether every action of every workflow is named by the 40 hex digits of its commit."""
    github = root / ".github"
    for path in sorted({*github.rglob("*.yml"), *github.rglob("*.yaml")}):
        if "ISSUE_TEMPLATE" in path.parts:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for action in unpinned(line):
                yield (
                    f"{path.relative_to(root)}, line {number}: {action or 'an action'} is not "
                    f"pinned: name it by the 40 hex digits of a commit, OWNER/NAME@COMMIT"
                )


def unpinned(line):
    """The actions of a workflow's line that are named by something that may move."""
    if line.lstrip().startswith("#"):
        return []
    return [one for one in USES.findall(line) if not PINNED.fullmatch(one)]


def site(folder):
    """Whether the documentation lies where `make docs` builds it."""
    if not (folder / "index.html").is_file():
        yield f"{folder} has no index.html: 'make docs' builds the documentation"


def made(targets, root):
    """Targets of make that fail, with the last of what they print."""
    for target in targets:
        make = ["make", "--no-print-directory", target]
        print(f"make {target} …", file=sys.stderr, flush=True)
        done = subprocess.run(
            make, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            yield "\n    ".join([f"'make {target}' fails:", *lines[-5:]])


def failures(root, targets=()):
    """All that keeps a tree from being released; targets are built between the other checks."""
    yield from dirt(root)
    yield from changelog(root)
    yield from versions(root)
    yield from installs(root)
    yield from pinned(root)
    yield from made(targets, root)
    yield from site(root / "target" / "site")
    yield from wheels(root / "dist", version_of(root))


def _git(root, *words):
    return subprocess.check_output(["git", "-C", root, *words], text=True).strip("\n")


def _below(entry, text):
    """What stands between a release's line and the next one, without empty headings."""
    if entry is None:
        return ""
    rest = text[entry.end() :]
    following = RELEASED.search(rest)
    body = rest[: following.start()] if following else rest
    return "\n".join(line for line in body.splitlines() if line.strip() and line[0] not in "#[")


def _day(text):
    try:
        return date.fromisoformat(text or "")
    except ValueError:
        return None


def _cited(key, text):
    found = re.search(rf"^{key}:\s*[\"']?([^\s\"'#]+)", text, re.MULTILINE)
    return found and found[1]


def main(targets):
    """Print all that is wrong, or what to do next."""
    found = list(failures(ROOT, targets))
    for one in found:
        print(f"- {one}")
    if found:
        sys.exit(f"not ready: {len(found)} of the above to mend")
    tag = f"v{version_of(ROOT)}"
    print(f"{NAME} {tag[1:]} is ready; next:")
    print(f"    git tag --annotate {tag} --message '{NAME} {tag[1:]}'\n    git push origin {tag}")


if __name__ == "__main__":
    main(sys.argv[1:])
