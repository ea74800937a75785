"""Find the source of Rust's standard library, of the version of ``rustc``, for another target.

``python tests/rust_src.py`` prints its folder: that of the toolchain (``rustup component add
rust-src``), or the one that it unpacks from Debian's package into ``target/rust-src``. Without one
it ends with a sentence. ``make wheel-arm`` uses it where rustup cannot fetch a target.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SUITES = ("trixie-backports", "sid")  # they have every version of a year, side by side
UNPACKED = Path(__file__).resolve().parents[1] / "target" / "rust-src"


def output(*words, **options):
    """What a program prints; SystemExit with its last line if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        last = (done.stderr.strip() or "it failed").splitlines()[-1]
        raise SystemExit(f"{words[0]}: {last}")
    return done.stdout


def library_of(folder, version):
    """The folder of the library in an unpacked package."""
    return folder / "usr" / "src" / f"rustc-{version}" / "library"


def fetch(version):
    """Download and unpack Debian's package of a version, beside the system's own lists."""
    for program in ("apt-get", "apt-cache", "dpkg-deb"):
        if not shutil.which(program):
            raise SystemExit(f"no source of Rust {version}: rustup component add rust-src")
    sites = output("apt-get", "indextargets", "--format", "$(SITE)", "Origin: Debian").split()
    if not sites:
        raise SystemExit(f"no source of Rust {version}: rustup component add rust-src")
    with tempfile.TemporaryDirectory(prefix="rust-src-") as name:
        here = Path(name)
        for folder in ("lists/partial", "cache/archives/partial", "parts"):
            (here / folder).mkdir(parents=True)
        lines = [f"deb {sites[0]} {suite} main\n" for suite in SUITES]
        (here / "sources.list").write_text("".join(lines), encoding="utf-8")
        (here / "status").touch()
        settings = {
            "Dir::Etc::SourceList": here / "sources.list",
            "Dir::Etc::SourceParts": here / "parts",
            "Dir::State::Lists": here / "lists",
            "Dir::State::Status": here / "status",
            "Dir::Cache": here / "cache",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        }
        (here / "apt.conf").write_text(
            "".join(f'{key} "{value}";\n' for key, value in settings.items()), encoding="utf-8"
        )
        apt = {"env": {**os.environ, "APT_CONFIG": str(here / "apt.conf")}, "cwd": here}
        output("apt-get", "update", **apt)
        listed = re.findall(r"\| (\S+) \|", output("apt-cache", "madison", "rust-src", **apt))
        found = next((one for one in listed if one.startswith(f"{version}+")), None)
        if found is None:
            raise SystemExit(f"Debian has no source of Rust {version}: {', '.join(listed)}")
        output("apt-get", "download", f"rust-src={found}", **apt)
        shutil.rmtree(UNPACKED, ignore_errors=True)
        UNPACKED.mkdir(parents=True)
        output("dpkg-deb", "--extract", next(here.glob("*.deb")), UNPACKED)


def main():
    """Print the folder, and fetch it before if it is not there."""
    sysroot = Path(output("rustc", "--print", "sysroot").strip())
    version = re.search(r"^release: (\S+)", output("rustc", "-vV"), re.MULTILINE)[1]
    own = sysroot / "lib" / "rustlib" / "src" / "rust" / "library"
    if not own.is_dir():
        own = library_of(UNPACKED, version)
        if not own.is_dir():
            fetch(version)
    print(own)


if __name__ == "__main__":
    sys.exit(main())
