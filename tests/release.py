"""What must be so before a version is tagged; run by `make release-check`.

Each check takes paths and gives sentences on what is wrong. ``python -m tests.release TARGET…``
runs all of them and has `make` build the targets, and prints every sentence, or what to do next.
"""

import re
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path

from tests.wheel import STABLE

ROOT = Path(__file__).resolve().parents[1]
NAME = "shallower"

PAPERS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md")
INSTALLING = (*PAPERS, "notebooks/*.ipynb")
INSTALLS = re.compile(
    rf"""pip install (?:-\S+ )*[\\"']*(?P<what>\.|{NAME})(?P<extras>\[[\w,]*\])?(?![\w/.-])"""
)
"""A command that installs this package: a clone, or what an index has."""
RELEASED = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>\S+))?[ \t]*$", re.MULTILINE)
SAID = re.compile(rf"\b{NAME}(?:==| v?|-)(\d+\.\d+\.\d+)\b")


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
    """Whether all wheels were audited, and one of them is for every Python since 3.11."""
    files = sorted(folder.glob("*.whl"))
    if not any(file.name.startswith(f"{NAME}-{version}-{STABLE[0]}-") for file in files):
        yield f"{folder} has no wheel {NAME}-{version}-cp311-abi3-….whl: 'make release' builds it"
    since = max((file.stat().st_mtime_ns for file in folder.glob(".audited*")), default=0)
    for file in files:
        if file.stat().st_mtime_ns > since:
            yield f"{file.name} was not audited: 'make release' does it"


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
