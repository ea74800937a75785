"""Run a command that builds for another target of Rust, as ``make wheel-arm`` and ``test-arm`` do.

``python tests/cross.py TARGET COMMAND…`` takes the standard library that rustup has installed for
the target, or else has Cargo build it from its source: the toolchain's (``rustup component add
rust-src``), or that of Debian's package of the same version, which it unpacks into
``target/rust-src``. Where there is neither it says in a line why the command is skipped.
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


def build_std(sysroot):
    """Variables by which Cargo builds the standard library; SystemExit where it has no source."""
    version = re.search(r"^release: (\S+)", output("rustc", "-vV"), re.MULTILINE)[1]
    source = sysroot / "lib" / "rustlib" / "src" / "rust" / "library"
    if not source.is_dir():
        source = library_of(UNPACKED, version)
        if not source.is_dir():
            fetch(version)
    return {
        "RUSTC_BOOTSTRAP": "1",
        "CARGO_UNSTABLE_BUILD_STD": "std,panic_unwind,test",
        "__CARGO_TESTS_ONLY_SRC_ROOT": str(source),
    }


def main(target, *command):
    """Run the command, or say why not."""
    sysroot = Path(output("rustc", "--print", "sysroot").strip())
    more = {}
    if not (sysroot / "lib" / "rustlib" / target / "lib").is_dir():
        try:
            more = build_std(sysroot)
        except SystemExit as error:
            print(f"skipped: what is built for {target} needs 'rustup target add' ({error})")
            return
    os.execvpe(command[0], command, {**os.environ, **more})


if __name__ == "__main__":
    main(*sys.argv[1:])
