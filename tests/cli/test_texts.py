"""How commands read texts: the first before anything else, and every one once."""

import sys

import pytest

from tests.commands import in_a_process
from tests.conftest import write_jsonl

SECONDS = 3
CODE = """
import sys, time
from shallower import cli
try:
    cli.main()
finally:
    print(time.process_time())
"""


@pytest.mark.parametrize("content", ['{"txt": "one"}\n', "one\n", ""])
def test_wrong_texts_are_refused_in_little_time(folder, tiny, content):
    (folder / "bad.jsonl").write_text(content)
    command = ["scan", tiny, "--texts", "bad.jsonl", "--out", "out"]
    done = in_a_process(sys.executable, "-c", CODE, *command, cwd=folder)
    assert done.status == 2
    assert "bad.jsonl" in done.err
    assert float(done.out) < SECONDS


@pytest.mark.slow
def test_a_file_of_texts_is_read_once(folder, tiny, monkeypatch, shallower):
    from shallower.texts import sources

    read = []
    lines = sources.numbered_lines

    def counting(*file):
        for number, line in lines(*file):
            read.append(number)
            yield number, line

    monkeypatch.setattr(sources, "numbered_lines", counting)
    write_jsonl(folder / "texts.jsonl", [f"w{i} w2 w3" for i in range(40)])
    command = ("scan", tiny, "--texts", "texts.jsonl", "--out")
    assert shallower(*command, "out", "--no-cache").status == 0
    assert read == [1, *range(1, 41)]  # its first line for the check
    read.clear()
    assert shallower(*command, "kept").status == 0
    assert read == [1, *range(1, 41), *range(1, 41)]  # and once for its hash
    read.clear()
    assert shallower(*command, "kept").status == 0
    assert read == [1]
    read.clear()
    assert shallower(*command, "other").status == 0
    assert read == [1, *range(1, 41)]  # whose hash is known by then
    read.clear()
    assert shallower("eval", tiny, "--texts", "texts.jsonl", "--drop", "2").status == 0
    assert read == [1, *range(1, 41)]
    read.clear()
    limited = ("--max-texts", 5, "--dry-run", "--stream")
    assert shallower("scan", tiny, "--texts", "texts.jsonl", "--out", "new", *limited).status == 0
    assert read == [1, *range(1, 6)]
