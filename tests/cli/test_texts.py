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
    once = [*range(1, 41)]
    for command, lines in (
        ("scan --out out --no-cache", once),
        ("scan --out kept", [*once, *once]),  # and once for its hash
        ("scan --out kept", []),
        ("scan --out other", once),  # whose hash is known by then
        ("eval --drop 2", once),
        ("scan --out new --max-texts 5 --dry-run --stream", once[:5]),
    ):
        read.clear()
        name, *options = command.split()
        assert shallower(name, tiny, "--texts", "texts.jsonl", *options).status == 0
        assert read == [1, *lines]  # its first line for the check
