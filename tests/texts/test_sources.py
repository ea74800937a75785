"""Texts come out of files as they are, or the error names the file and the line."""

import json
import os
import subprocess
import sys
from operator import length_hint
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from shallower import MissingExtraError, TextsError
from shallower.texts import sources
from shallower.texts.sources import Texts, own_texts
from tests.hub import hub as hub

SEPARATORS = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\rend"


@pytest.fixture
def write(tmp_path):
    """Write bytes, text, or JSON lines from a list; gives the path as a string."""

    def written(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return written


@pytest.fixture
def parquet(tmp_path):
    def written(columns, name="texts.parquet", **options):
        path = tmp_path / name
        pq.write_table(pa.table(columns), path, **options)
        return str(path)

    return written


def records(*texts):
    return [{"text": text} for text in texts]


def test_parquet_may_hold_large_strings_in_several_row_groups(parquet):
    texts = [f"text {i}" for i in range(100)]
    source = parquet({"text": pa.array(texts, pa.large_string())}, row_group_size=7)
    assert list(Texts(source)) == texts


def test_the_three_formats_give_the_same_texts(write, parquet):
    texts = ["one", "zwei ä", "三 🚋 :train:", SEPARATORS]
    sources = (
        write("a.jsonl", records(*texts)),
        write("a.txt", "\n".join(texts)),
        parquet({"text": texts}),
    )
    assert [list(Texts(source)) for source in sources] == [texts] * 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("limit", [None, 2, 99])
def test_texts_can_be_read_again(write, name, limit):
    content = records("one", "two", "three") if name == "a.jsonl" else "one\ntwo\nthree\n"
    texts = Texts(write(name, content), limit)
    first = list(texts)
    assert first == ["one", "two", "three"][:limit]
    assert list(texts) == first


def test_texts_after_the_limit_are_not_looked_at(write):
    source = write("a.jsonl", '{"text": "one"}\nbroken\n')
    assert list(Texts(source, 1)) == ["one"]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(write, limit):
    with pytest.raises(TextsError, match=f"at least 1, got {limit}"):
        Texts(write("a.txt", "one\n"), limit)


@pytest.mark.parametrize(
    "content", ["one\r\ntwo\r\n\r\n", "one\n\n  \n\t\ntwo", "\ufeffone\ntwo\n"]
)
def test_line_ends_blank_lines_and_a_byte_order_mark_are_no_text(write, content):
    assert list(Texts(write("a.txt", content))) == ["one", "two"]
    as_json = content.replace("one", '{"text": "one"}').replace("two", '{"text": "two"}')
    assert list(Texts(write("a.jsonl", as_json))) == ["one", "two"]


def test_only_a_line_feed_ends_a_document(write):
    assert list(Texts(write("a.txt", f"{SEPARATORS}\nnext\n"))) == [SEPARATORS, "next"]
    raw = json.dumps({"text": SEPARATORS}, ensure_ascii=False)
    assert list(Texts(write("a.jsonl", f'{raw}\n{{"text": "next"}}\n'))) == [SEPARATORS, "next"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("content", ["", "\n", "  \n\r\n\t\n", "\ufeff", "\ufeff\n\n"])
def test_a_file_without_a_line_has_no_texts(write, name, content):
    texts = Texts(write(name, content))
    assert list(texts) == []
    assert texts.count() == 0


@pytest.mark.parametrize("limit", [None, 2, 3, 99])
@pytest.mark.parametrize(
    "content",
    [
        "one\ntwo\nthree",
        "one\r\n\r\ntwo\r\n \r\nthree\r\n",
        "\ufeffone\n\xa0 \u3000\ntwo\n\x85\n\u2028\n",
    ],
)
def test_count_is_the_number_of_texts(write, content, limit):
    texts = Texts(write("a.txt", content), limit)
    assert texts.count() == len(list(texts))


def test_count_stops_at_the_limit(write):
    source = write("a.txt", b"one\n" * 100_000 + b"\xff broken\n")
    assert Texts(source, 2).count() == 2
    with pytest.raises(TextsError, match="not UTF-8"):
        Texts(source).count()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("limit", [None, 3, 500])
def test_the_number_of_texts_is_estimated_without_reading_them(write, name, limit):
    content = records("one", "two") if name == "a.jsonl" else "one\n\n two \n"
    assert length_hint(Texts(write(name, content), limit)) == 2
    many = ["word " * (i % 40) + "end" for i in range(20_000)]
    texts = Texts(write(name, records(*many) if name == "a.jsonl" else "\n".join(many)), limit)
    assert length_hint(texts) == pytest.approx(min(20_000, limit or 20_000), rel=0.05)
    assert texts.count() == length_hint(texts) == min(20_000, limit or 20_000)


def test_the_number_of_texts_is_known_of_parquet_and_of_a_limit(parquet):
    source = parquet({"text": ["one", "two", "three"]})
    for limit, known in ((None, 3), (2, 2)):
        assert length_hint(Texts(source, limit)) == Texts(source, limit).count() == known
    for limit, hint in ((None, 0), (5, 5)):
        texts = Texts("allenai/c4:en:validation", limit)
        assert (length_hint(texts), texts.count()) == (hint, limit)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", [{"txt": "one"}], "line 1: no field `text`"),
        ("a.jsonl", "", "there are no texts in"),
        ("a.txt", " \n\n", "there are no texts in"),
    ],
)
def test_wrong_texts_are_found_by_a_check(write, name, content, words):
    with pytest.raises(TextsError, match=words):
        Texts(write(name, content)).check()


def test_a_broken_line_is_named(write):
    texts = iter(Texts(write("a.jsonl", '{"text": "one"}\n\n{"text": "tw')))
    assert next(texts) == "one"
    with pytest.raises(TextsError, match=r"a\.jsonl, line 3: not JSON"):
        next(texts)


@pytest.mark.parametrize(
    "record", [{"txt": "one"}, {"text": None}, {"text": 1}, {"text": ["one"]}, ["text"], "text", 1]
)
def test_a_record_without_a_string_in_text_is_named(write, record):
    texts = iter(Texts(write("a.jsonl", [{"text": "one"}, record])))
    assert next(texts) == "one"
    with pytest.raises(TextsError, match=r"a\.jsonl, line 2: no field `text` that holds a string"):
        next(texts)


@pytest.mark.parametrize(
    "line",
    ["[" * 200_000, '{"text": ' + "9" * 5000 + "}", "NaN"],
    ids=["deep", "many digits", "NaN"],
)
def test_json_that_python_cannot_take_is_a_broken_line(write, line):
    with pytest.raises(TextsError, match=r"a\.jsonl, line 1"):
        list(Texts(write("a.jsonl", line)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_bytes_that_are_not_utf8_are_refused(write, name):
    line = b'{"text": "one"}\n' if name == "a.jsonl" else b"one\n"
    with pytest.raises(TextsError, match=rf"{name}.*not UTF-8"):
        list(Texts(write(name, line * 3 + b"caf\xe9\n")))


@pytest.mark.parametrize("name", ["none.jsonl", "none.txt", "none.parquet", "no/where.txt"])
def test_a_missing_file_is_refused_at_once(tmp_path, name):
    with pytest.raises(TextsError, match=f"there is no text file .*{name}"):
        Texts(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.csv", "a", "a.jsonl.gz", "a.JSON"])
def test_another_suffix_is_refused_with_those_that_are_known(write, name):
    with pytest.raises(TextsError, match=rf"cannot read .*{name}.*\.jsonl, \.txt, \.parquet"):
        Texts(write(name, "one\n"))


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "texts.txt").mkdir()
    for source in (tmp_path, tmp_path / "texts.txt"):
        with pytest.raises(TextsError, match=str(source)):
            Texts(str(source))


@pytest.mark.parametrize("source", ["", "allenai/c4", ":", ":train", "a:", "a::b", "a:b:c:d"])
def test_what_is_neither_a_file_nor_id_and_split_is_refused_at_once(source):
    with pytest.raises(TextsError, match="cannot read texts from"):
        Texts(source)


@pytest.mark.parametrize(
    "source",
    ["x" * 5000, "x" * 5000 + ":train", "a\0b", "a\0.txt"],
    ids=["long", "long hub id", "null", "null.txt"],
)
def test_a_name_that_no_file_can_have_is_refused(source):
    with pytest.raises(TextsError, match=r"cannot read|there is no"):
        Texts(source)


def test_a_file_that_goes_away_is_an_error_of_texts(write):
    source = write("a.txt", "one\n")
    texts = Texts(source)
    Path(source).unlink()
    with pytest.raises(TextsError, match="cannot read"):
        list(texts)


def test_the_home_folder_is_found(write, tmp_path, monkeypatch):
    write("a.txt", "one\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(Texts("~/a.txt")) == ["one"]


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"text": [1, 2]}, 0),
        ({"text": [["one"], ["two"]]}, 0),
        ({"text": ["one", None]}, 1),
    ],
)
def test_a_parquet_row_without_a_string_in_text_is_named(parquet, columns, row):
    with pytest.raises(TextsError, match=rf"\.parquet, row {row}: no .*`text` that holds a string"):
        list(Texts(parquet(columns)))


def test_a_parquet_file_without_the_column_names_those_it_has(parquet):
    with pytest.raises(TextsError, match=r"no column `text`, only \['txt'\]"):
        list(Texts(parquet({"txt": ["one"]})))


@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1" + bytes(100)])
def test_a_file_that_is_no_parquet_is_refused(write, content):
    with pytest.raises(TextsError, match=r"a\.parquet"):
        list(Texts(write("a.parquet", content)))


@pytest.mark.parametrize("where", [40, -200])
def test_a_damaged_parquet_file_is_refused(parquet, write, where):
    content = bytearray(Path(parquet({"text": ["one two three"] * 100})).read_bytes())
    content[where : where + 60] = b"\xff" * 60
    with pytest.raises(TextsError, match=r"damaged\.parquet"):
        list(Texts(write("damaged.parquet", bytes(content))))


def test_parquet_strings_that_are_not_utf8_are_refused(parquet):
    texts = pa.array([b"one", b"caf\xe9"], pa.binary()).view(pa.string())
    with pytest.raises(TextsError, match=r"texts\.parquet, row 0"):
        list(Texts(parquet({"text": texts})))


@pytest.mark.parametrize("name", ["a[1].parquet", "a b#%20ä.parquet", "a?.parquet", "*.parquet"])
def test_a_parquet_file_is_found_by_its_name_and_no_pattern(parquet, name):
    parquet({"text": ["another"]}, "a1.parquet")
    assert list(Texts(parquet({"text": ["one"]}, name))) == ["one"]


def test_without_datasets_parquet_and_hub_say_what_to_install(parquet, write, monkeypatch):
    source = parquet({"text": ["one"]})
    monkeypatch.setattr("shallower.texts.sources.find_spec", lambda _: None)
    for needing in (source, "allenai/c4:en:validation"):
        with pytest.raises(MissingExtraError, match=r"datasets: pip install 'shallower\[texts\]'"):
            Texts(needing)
    assert list(Texts(write("a.txt", "one\n"))) == ["one"]


@pytest.fixture
def datasets_of_hub(hub, monkeypatch):
    """A hub with datasets, some of which cannot be read."""
    from datasets import config

    monkeypatch.setattr(config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    texts = b'{"text": "one"}\n{"text": "two"}\n'
    two = b"---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n"
    two += b"- config_name: b\n  data_files: b.jsonl\n---\n"
    hub.repos |= {
        f"datasets/me/{name}": {"README.md": b"some", **files}
        for name, files in {
            "plain": {"train.jsonl": texts},
            "script": {"script.py": b"import os"},
            "empty": {},
            "odd": {"a.xyz": b"a"},
            "configs": {"README.md": two, "a.jsonl": texts, "b.jsonl": texts},
        }.items()
    }
    hub.failing |= {
        "me/gated": (403, "GatedRepo"), "me/down": 503, "me/hanging": 0, "me/refused": 403,
    }  # fmt: skip
    return hub


def test_a_dataset_of_the_hub_is_streamed(datasets_of_hub):
    assert list(Texts("me/plain:train")) == ["one", "two"]
    assert list(Texts("me/configs:b:train", 1)) == ["one"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("me/none:train", "the hub has no such dataset that you may read: check the name, or log"),
        ("wikitxt:train", "the hub has no such dataset that you may read: check the name, or log"),
        ("no..such:train", "the hub has no such dataset that you may read: check the name, or log"),
        ("me/plain:tran", "it has no split tran: expected one of train"),
        ("me/configs:train", "name one of its configs, a, b: me/configs:CONFIG:train"),
        ("me/configs:c:train", "it has no config c: expected one of a, b"),
        ("me/script:train", "it is a script, which is not run: name a dataset of files"),
        ("me/empty:train", "it has no file: name another dataset"),
        ("me/odd:train", "it has no file that can be read: name another dataset"),
        ("me/gated:train", "the dataset is gated: ask for access on its page of the hub, and log"),
        ("me/refused:train", "the hub refuses your token: log in (hf auth login)"),
        ("me/down:train", "the hub answers with status 503: try again later"),
        ("me/hanging:train", "the hub breaks the connection off: try again later"),
    ],
)
def test_why_a_dataset_of_the_hub_cannot_be_read(
    datasets_of_hub, monkeypatch, capfd, source, reason
):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)  # between tries of huggingface_hub
    with pytest.raises(TextsError) as found:
        list(Texts(source))
    assert str(found.value).startswith(f"cannot read {source}: {reason}")
    assert "http" not in str(found.value)
    assert waited == []
    assert capfd.readouterr() == ("", "")


def test_a_hub_without_a_net_is_named_at_once(datasets_of_hub, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("shallower.texts.hub.getproxies", dict)
    with pytest.raises(TextsError, match=r"127.0.0.1:9 cannot be reached: connect to the hub, or"):
        list(Texts("me/plain:train"))
    assert waited == []


def test_a_hub_dataset_that_cannot_be_reached_is_an_error_of_texts(tmp_path):
    code = "from shallower.texts.sources import Texts; list(Texts('no/such:train'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )
    last = done.stderr.splitlines()[-1]
    said = "cannot read no/such:train: the hub is not asked (HF_HUB_OFFLINE), and the cache"
    assert last.startswith(f"shallower.errors.TextsError: {said}")


def test_our_own_texts_are_of_as_many_kinds_as_there_are():
    file = Path(sources.__file__).with_name("out_of_domain.jsonl")
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert own_texts() == [record["text"] for record in records]
    assert len(records) == len({record["kind"] for record in records}) == 32
    assert all(60 <= len(text.split()) <= 200 for text in own_texts())
