"""How commands read texts: the first before anything else, and every one once."""

import sys

import pytest

from tests.commands import in_a_process
from tests.conftest import write_jsonl

SECONDS = 3
CODE = """
import sys, time
from shallower import cli
for number in range(3):
    try:
        cli.main(["scan", sys.argv[1], "--texts", f"bad{number}.jsonl", "--out", "out"])
    except SystemExit as ended:
        assert ended.code == 2
print(time.process_time())
"""


def test_wrong_texts_are_refused_in_little_time(folder, tiny):
    for number, content in enumerate(['{"txt": "one"}\n', "one\n", ""]):
        (folder / f"bad{number}.jsonl").write_text(content)
    done = in_a_process(sys.executable, "-c", CODE, tiny, cwd=folder)
    assert done.status == 0, done.err
    said = done.err.splitlines()
    assert [f"bad{number}.jsonl" in line for number, line in enumerate(said)] == [True] * 3
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
