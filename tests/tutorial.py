"""The tutorial, executed: `make tutorial` writes what its commands print below them.

A block ``sh`` is run, and the block ``text`` right behind it is its output.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import zip_longest
from pathlib import Path

from tests.commands import in_this_process
from tests.conftest import ROOT
from tests.examples import commands

PAGE = ROOT / "docs" / "tutorial.md"
PICTURES = {"scan/heat_map.png": PAGE.with_name("tutorial-heat-map.png")}
BLOCK = re.compile(
    r"^```sh\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```\n)?", re.M | re.S
)
NUMBER = re.compile(r"\d+\.\d+|\d+(?= %)")


def run(code, folder):
    """What a block prints on standard output; commands of ours are run in this process."""
    found = list(commands(code, "shallower"))
    if not found:
        shell = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", "-euc", code], cwd=folder, env=shell, check=True, text=True,
            stdout=subprocess.PIPE,
        ).stdout  # fmt: skip
    printed = ""
    for words in found:
        done = in_this_process(*words)
        assert done.status == 0, f"shallower {' '.join(words)}\n{done.err}"
        printed += done.out
    return "".join(f"{line.rstrip()}\n" for line in printed.strip("\n").splitlines())


def different(expected, found, share=0.02):
    """Pairs of lines that differ by more than the rounding of another machine explains."""

    def close(one, other):
        room = share * abs(float(one)) + 0.002 if "." in one else 3
        return abs(float(one) - float(other)) <= room

    pairs = zip_longest(expected.splitlines(), found.splitlines(), fillvalue="")
    return [
        (one, other)
        for one, other in pairs
        if NUMBER.sub("", one).split() != NUMBER.sub("", other).split()
        or not all(map(close, NUMBER.findall(one), NUMBER.findall(other)))
    ]


def outputs(folder):
    """(the block's match in the page, what it printed now), in order, in an empty folder."""
    os.environ["COLUMNS"] = "80"
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        yield block, run(block["code"], folder)


def main():
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SHALLOWER_CACHE"] = f"{folder}/cache"
        os.chdir(folder)
        for block, printed in outputs(folder):
            written = f"```sh\n{block['code']}```\n"
            written += f"\n```text\n{printed}```\n" if printed else ""
            text = text.replace(block[0], written)
        for made, picture in PICTURES.items():
            shutil.copyfile(Path(folder) / made, picture)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
