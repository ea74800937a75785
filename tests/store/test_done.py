"""Outputs that the store remembers: known where they are intact, and nowhere else."""

import shutil
import time

import pytest

from shallower.store import done
from shallower.store.done import Output
from shallower.store.store import Store


@pytest.fixture(params=[done.SMALL_BYTES, 0], ids=["small files", "large files"])
def size(request, monkeypatch):
    monkeypatch.setattr(done, "SMALL_BYTES", request.param)
    return request.param


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def output(store, out, inputs=None, names=None, command="cut"):
    return Output(store, command, out, lambda: inputs or {"n": 1}, names)


def fill(folder):
    (folder / "inside").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"weights" * 1000)
    (folder / "inside" / "config.json").write_text("{}")
    (folder / "empty").write_text("")
    return folder


def test_an_intact_folder_is_known_in_its_place_alone(store, tmp_path, size, monkeypatch):
    one = fill(tmp_path / "one")
    assert output(store, one).find() is None
    days = [time.strftime("%Y-%m-%d")]
    assert output(store, one).keep({"report": [1]}) == {"report": [1]}
    days.append(time.strftime("%Y-%m-%d"))
    known = output(store, one).find()
    assert known.value == {"report": [1]}
    assert known.made[:10] in days
    monkeypatch.chdir(tmp_path)
    assert output(store, one.relative_to(tmp_path)).find() == known
    assert output(store, one, {"n": 2}).find() is None
    assert output(store, one, command="heal").find() is None
    shutil.copytree(one, tmp_path / "two")
    assert output(store, tmp_path / "two").find() is None
    output(store, one, {"n": 2}).keep({})  # the last job counts
    assert output(store, one).find() is None


@pytest.mark.parametrize("change", ["content", "gone", "link", "folder", "all gone"])
def test_what_was_changed_is_not_known(store, tmp_path, size, change):
    one = fill(tmp_path / "one")
    output(store, one).keep({})
    path = one / "weights.bin"
    time.sleep(0.02)  # another time of change
    if change == "content":
        path.write_bytes(b"Weights" * 1000)
    elif change == "all gone":
        shutil.rmtree(one)
    else:
        path.rename(tmp_path / "moved")
    if change == "link":
        path.symlink_to(tmp_path / "moved")
    if change == "folder":
        path.mkdir()
    assert output(store, one).find() is None


def test_what_lies_beside_does_not_matter(store, tmp_path, size):
    one = fill(tmp_path / "one")
    output(store, one).keep({})
    (one / "notes.txt").write_text("dear to someone")
    assert output(store, one).find()
    output(store, one, names=("inside", "missing")).keep({})
    (one / "weights.bin").write_bytes(b"changed")
    assert output(store, one).find() is None
    assert output(store, one, names=("inside", "missing")).find()


def test_a_file_is_an_output_too(store, tmp_path, size):
    one = tmp_path / "one.bin"
    one.write_bytes(b"states")
    output(store, one).keep({})
    assert output(store, one).find()
    one.write_bytes(b"statez!")
    assert output(store, one).find() is None


def test_nothing_is_hashed_for_a_place_that_holds_nothing_known(store, tmp_path):
    def unasked():
        pytest.fail("hashed")

    taken = fill(tmp_path / "taken")
    assert Output(store, "cut", taken, unasked).find() is None
    assert Output(store, "cut", tmp_path / "new", unasked).find() is None
    off = Output(Store(None), "cut", taken, unasked)
    assert off.keep({"n": 1}) == {"n": 1}
    assert off.find() is None
    untold = Output(store, "cut", taken, lambda: None)
    untold.keep({})
    assert untold.find() is None


@pytest.mark.parametrize(
    "value",
    [
        {}, {"job": 1, "marks": [], "value": {}}, {"marks": {"../taken/empty": [0, "x"]}},
        {"marks": {"/etc/passwd": [1, 2, 3]}, "value": {}}, {"marks": {}, "value": {}},
    ],
)  # fmt: skip
def test_a_record_is_not_trusted(store, tmp_path, value):
    taken = fill(tmp_path / "taken")
    one = output(store, taken)
    store.put("files", one._place, value)
    assert one.find() is None
