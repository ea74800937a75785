"""What a wheel must be before it is given away; run by `make release`.

``audit WHEEL`` needs the group `wheel`; ``needs`` prints what the package and its extras depend on,
``lend`` the folders of this environment's packages; ``alone`` checks that the environment has the
wheel, and nothing that compiles.
"""

import json
import os
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
MAX_GLIBC = (2, 17)  # manylinux2014
CORE = "shallower/_core.abi3.so"
COMPANIONS = (
    "shallower/_core.pyi",
    "shallower/py.typed",
    "shallower/texts/speech.jsonl",
    "shallower/texts/training.json",
)
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "ld", "zig", "cargo", "rustc")


def audit(wheel):
    """The name, the size, the contents, and the oldest Linux that loads the core."""
    from elftools.elf.elffile import ELFFile

    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
    name, tags = wheel.name.split("-abi3-")
    assert name == f"shallower-{version}-cp311", f"{wheel.name} is not {version} for Python 3.11"
    assert "manylinux2014_" in tags, f"{wheel.name} does not say manylinux2014"
    size = wheel.stat().st_size
    assert size < MAX_BYTES, f"{wheel.name} has {size} bytes, allowed are {MAX_BYTES}"

    auditwheel = Path(sys.executable).with_name("auditwheel")
    shown = subprocess.check_output([auditwheel, "show", "--json", wheel], text=True)
    seen = json.loads(shown)
    tag, symbols = seen["overall_tag"], seen["versioned_symbols"]
    kind, *glibc = tag.split("_")[:3]
    assert kind == "manylinux", f"auditwheel calls it {tag}: {symbols}"
    assert tuple(map(int, glibc)) <= MAX_GLIBC, f"auditwheel calls it {tag}: {symbols}"

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for file in (*COMPANIONS, f"shallower-{version}.dist-info/licenses/LICENSE"):
            assert file in names, f"{wheel.name} lacks {file}"
        core = archive.read(CORE)
    names_kept = ELFFile(BytesIO(core)).get_section_by_name(".symtab")
    assert names_kept is None, f"{CORE} is not stripped"
    print(f"{wheel.name}: {size:,} bytes, the core {len(core):,}, auditwheel: {tag}")


def needs():
    """Requirements, which are installed while the core is built."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = chain(project["dependencies"], *project["optional-dependencies"].values())
    print(*sorted({one for one in listed if not one.startswith(project["name"])}))


def lend():
    """Lines of a .pth file."""
    print(*(folder for folder in sys.path if folder.endswith("site-packages")), sep="\n")


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
    {"audit": audit, "needs": needs, "lend": lend, "alone": alone}[command](*map(Path, paths))
