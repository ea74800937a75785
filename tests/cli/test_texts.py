"""How commands read texts: the first before anything else, and every one once."""

import pytest

from tests.conftest import write_jsonl


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
    for command, found in (
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
        assert read == [1, *found]  # its first line for the check
