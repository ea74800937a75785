"""What a wheel must be before it is given away; run by `make release`.

``audit WHEEL…`` needs the group `wheel`, and Cargo; ``needs`` prints what the package and its
extras depend on, ``lend`` the folders of this environment's packages; ``small`` checks that an
install without extras has no torch and is small, ``alone`` that an environment has the wheel, and
nothing that compiles; ``licences`` writes the licences of the crates in the wheel.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from io import BytesIO
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 5_000_000
MAX_INSTALLED = 300_000_000
MAX_GLIBC = (2, 17)  # manylinux2014
STABLE = ("cp311-abi3", "cp315-abi3.abi3t")  # loaded by that Python and all later ones
EXACT = ("cp314-cp314t",)  # free threading had no stable interface then
PLATFORMS = {  # of the tag, and Rust's name of the target
    r"manylinux2014_x86_64\.manylinux_2_17_x86_64": "x86_64-unknown-linux-gnu",
    r"manylinux2014_aarch64\.manylinux_2_17_aarch64": "aarch64-unknown-linux-gnu",
    r"musllinux_1_2_x86_64": "x86_64-unknown-linux-musl",
    r"musllinux_1_2_aarch64": "aarch64-unknown-linux-musl",
    r"macosx_\d+_\d+_arm64": "aarch64-apple-darwin",
    r"macosx_\d+_\d+_x86_64": "x86_64-apple-darwin",
    r"win_amd64": "x86_64-pc-windows-msvc",
}
THIRD_PARTY = "LICENSE-THIRD-PARTY"
COMPANIONS = (
    "shallower/_core.pyi",
    "shallower/py.typed",
    "shallower/texts/speech.jsonl",
    "shallower/texts/training.json",
)
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "ld", "zig", "cargo", "rustc")


def audit(*wheels):
    """The name, the size, the contents, the crates, and the oldest Linux that loads the core."""
    assert wheels, "no wheel was named"
    for wheel in wheels:
        print(f"{wheel.name}: {check(wheel)}")


def check(wheel):
    """What is worth knowing of a wheel; AssertionError where it is not as it must be."""
    version = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["package"]["version"]
    target = target_of(wheel.name, version)
    size = wheel.stat().st_size
    assert size < MAX_BYTES, f"{wheel.name} has {size} bytes, allowed are {MAX_BYTES}"
    words = [f"{size:,} bytes"]
    with zipfile.ZipFile(wheel) as archive:
        info = f"shallower-{version}.dist-info"
        names = archive.namelist()
        licences = [f"{info}/licenses/{name}" for name in ("LICENSE", THIRD_PARTY)]
        for file in (*COMPANIONS, *licences):
            assert file in names, f"{wheel.name} lacks {file}"
        cores = [name for name in names if re.fullmatch(r"shallower/_core\.[^/]*(so|pyd)", name)]
        assert len(cores) == 1, f"{wheel.name} has {len(cores)} cores: {cores}"
        core = archive.read(cores[0])
        boms = [
            name for name in names if re.fullmatch(rf"{info}/sboms/[^/]+\.cyclonedx\.json", name)
        ]
        assert len(boms) == 1, f"{wheel.name} has {len(boms)} lists of its crates (SBOM)"
        crates = check_crates(json.loads(archive.read(boms[0])), linked(target))
        text = archive.read(licences[1]).decode("utf-8")
        for name, number in crates:
            assert f"\n{name} {number}: " in text, (
                f"{THIRD_PARTY} lacks {name} {number}: make licences"
            )
    words += [f"the core {len(core):,}", f"{len(crates)} crates"]
    if "linux" in target:
        words.append(check_linux(wheel, core))
    return ", ".join(words)


def target_of(name, version):
    """Rust's target of a wheel by its name; AssertionError where it is none of those given away."""
    start = f"shallower-{version}-"
    assert name.startswith(start), f"{name} is not of version {version}"
    python, _, platform = name.removeprefix(start).removesuffix(".whl").rpartition("-")
    assert python in (*STABLE, *EXACT), (
        f"{name} is for {python}; expected {' or '.join((*STABLE, *EXACT))}"
    )
    both = ".".join(sorted(platform.split(".")))
    for tag, target in PLATFORMS.items():
        if re.fullmatch(tag, both):
            return target
    raise AssertionError(f"{name} is for {platform}; expected one of {', '.join(PLATFORMS)}")


def check_crates(bom, expected):
    """The crates that must be in a list (SBOM), each with a licence there."""
    given = {
        (one["name"], one["version"]): one.get("licenses") for one in bom.get("components", ())
    }
    for name, number in expected:
        assert (name, number) in given, f"the list of crates (SBOM) lacks {name} {number}"
        assert given[name, number], f"the list of crates (SBOM) has no licence of {name} {number}"
    return expected


def check_linux(wheel, core):
    """The oldest glibc or musl that loads a core, as auditwheel sees it; the core is stripped."""
    from elftools.elf.elffile import ELFFile

    auditwheel = Path(sys.executable).with_name("auditwheel")
    shown = subprocess.check_output([auditwheel, "show", "--json", wheel], text=True)
    seen = json.loads(shown)
    tag, symbols = seen["overall_tag"], seen["versioned_symbols"]
    kind, *numbers = tag.split("_")[:3]
    is_musl = "musllinux" in wheel.name
    assert kind == ("musllinux" if is_musl else "manylinux"), (
        f"auditwheel calls it {tag}: {symbols}"
    )
    if not is_musl:
        assert tuple(map(int, numbers)) <= MAX_GLIBC, f"auditwheel calls it {tag}: {symbols}"
    names_kept = ELFFile(BytesIO(core)).get_section_by_name(".symtab")
    assert names_kept is None, f"the core of {wheel.name} is not stripped"
    return f"auditwheel: {tag}"


def linked(target):
    """The crates whose code is in a wheel for a target of Rust ("all": for any), with versions."""
    words = ("cargo", "tree", "--locked", "--edges", "normal,no-proc-macro", "--features", "python")
    shown = subprocess.check_output(
        [*words, "--target", target, "--prefix", "none", "--format", "{p}"], cwd=ROOT, text=True
    )
    found = re.findall(r"^(\S+) v(\S+)", shown, re.MULTILINE)
    crates = sorted({one for one in found if one[0] != "shallower"})
    assert crates, f"Cargo lists no crate for {target}"
    return crates


def licences():
    """Write the licence of every crate that is in a wheel, of MIT and others the MIT one."""
    shown = subprocess.check_output(
        ["cargo", "metadata", "--locked", "--features", "python", "--format-version", "1"],
        cwd=ROOT,
        text=True,
    )
    packages = {(one["name"], one["version"]): one for one in json.loads(shown)["packages"]}
    texts = {}
    for crate in linked("all"):
        folder = Path(packages[crate]["manifest_path"]).parent
        files = sorted(folder.glob("LICENSE-MIT*")) or sorted(folder.glob("LICENSE*"))
        assert files, f"{crate[0]} {crate[1]} has no text of its licence: {folder}"
        text = "\n".join(
            line.rstrip() for line in files[0].read_text(encoding="utf-8").splitlines()
        )
        title = f"{crate[0]} {crate[1]}: {packages[crate]['license']}"
        texts.setdefault(text.strip(), []).append(title)
    head = (
        "The compiled core of shallower contains code of the crates below, and of Rust's standard\n"
        "library: MIT OR Apache-2.0, Copyright (c) The Rust Project Contributors, under the text\n"
        "of the MIT licence that stands below many times. `make licences` writes this file.\n"
    )
    rule = "\n" + "-" * 80 + "\n"
    parts = ["\n".join(titles) + f"\n\n{text}\n" for text, titles in texts.items()]
    (ROOT / THIRD_PARTY).write_text(rule.join([head, *parts]), encoding="utf-8")


def needs():
    """Requirements, which are installed while the core is built."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = chain(project["dependencies"], *project["optional-dependencies"].values())
    print(*sorted({one for one in listed if not one.startswith(project["name"])}))


def lend():
    """Lines of a .pth file."""
    print(*(folder for folder in sys.path if folder.endswith("site-packages")), sep="\n")


def small():
    """An install of the core alone, by the bytes of its packages."""
    assert find_spec("torch") is None, "torch is within reach"
    (folder,) = (Path(path) for path in sys.path if path.endswith("site-packages"))
    taken = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert taken < MAX_INSTALLED, f"the install has {taken:,} bytes, allowed are {MAX_INSTALLED:,}"
    print(f"installed without extras: {taken:,} bytes")


def alone():
    """No compiler, no Rust, and the core of this environment."""
    found = [shutil.which(program) for program in COMPILERS]
    assert not any(found), f"within reach: {found}"
    assert not {"CC", "CXX", "LD", "RUSTC", "CARGO"} & set(os.environ)
    assert find_spec("ziglang") is None, "ziglang is a compiler"

    from shallower import _core

    assert Path(_core.__file__).is_relative_to(sys.prefix), f"another core: {_core.__file__}"
    print(f"{_core.__file__}: tier {_core.tier()}")


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    commands = (audit, needs, lend, small, alone, licences)
    {one.__name__: one for one in commands}[command](*map(Path, paths))
