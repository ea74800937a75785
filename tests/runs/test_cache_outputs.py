"""Outputs that the cache remembers: found where they are intact, copied, or not known."""

import os
import shutil
import time

import pytest

from shallower.errors import OutputError
from shallower.runs import outputs
from shallower.runs.cache import Cache
from shallower.runs.outputs import Output
from tests.cli.documents import tree


@pytest.fixture(params=[outputs.SMALL_BYTES, 0], ids=["small files", "large files"])
def size(request, monkeypatch):
    monkeypatch.setattr(outputs, "SMALL_BYTES", request.param)
    return request.param


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def output(cache, out, inputs=None, **options):
    return Output(cache, "cut", out, lambda: inputs or {"n": 1}, **options)


def fill(folder):
    (folder / "inside").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"weights" * 1000)
    (folder / "inside" / "config.json").write_text("{}")
    (folder / "empty").write_text("")
    return folder


def test_an_intact_folder_is_found_and_copied(cache, tmp_path, size):
    one, two = fill(tmp_path / "one"), tmp_path / "two"
    assert output(cache, one).find() is None
    assert output(cache, one).keep({"report": [1]}) == {"report": [1]}
    known = output(cache, one).find()
    assert (known.value, known.is_there) == ({"report": [1]}, True)
    looked = output(cache, two).look_up()
    assert not looked.is_there
    assert not two.exists()
    assert output(cache, two).find().made == known.made
    assert tree(two) == tree(one)
    assert output(cache, two).find().is_there
    shutil.rmtree(one)  # the copy is remembered by itself
    assert not output(cache, tmp_path / "three").find().is_there
    assert tree(tmp_path / "three") == tree(two)
    assert output(cache, tmp_path / "three", {"n": 2}).find() is None


@pytest.mark.parametrize("change", ["content", "gone", "link", "folder"])
def test_what_was_changed_is_not_known(cache, tmp_path, size, change):
    one = fill(tmp_path / "one")
    output(cache, one).keep({})
    path = one / "weights.bin"
    time.sleep(0.02)  # another time of change
    if change == "content":
        path.write_bytes(b"Weights" * 1000)
    else:
        path.rename(tmp_path / "moved")
    if change == "link":
        path.symlink_to(tmp_path / "moved")
    if change == "folder":
        path.mkdir()
    before = tree(one)
    assert output(cache, one).find() is None
    assert output(cache, one).find(overwrite=True) is None
    assert output(cache, tmp_path / "two").find() is None
    assert tree(one) == before


def test_what_lies_beside_does_not_matter_and_is_not_copied(cache, tmp_path, size):
    one = fill(tmp_path / "one")
    output(cache, one).keep({})
    (one / "notes.txt").write_text("dear to someone")
    assert output(cache, one).find().is_there
    output(cache, tmp_path / "two").find()
    assert not (tmp_path / "two" / "notes.txt").exists()


def test_nothing_is_replaced_unless_told_so(cache, tmp_path, size):
    one, two = fill(tmp_path / "one"), tmp_path / "two"
    output(cache, one).keep({})
    two.mkdir()
    (two / "dear").write_text("to someone")
    assert output(cache, two).find() is None
    assert (two / "dear").read_text() == "to someone"
    assert output(cache, two).find(overwrite=True) is not None
    assert tree(two) == tree(one)


def test_named_parts_are_copied_beside_others(cache, tmp_path, size):
    names = ("inside", "weights.bin", "missing")
    one, two = fill(tmp_path / "one"), tmp_path / "two"
    output(cache, one, names=names).keep({})
    two.mkdir()
    (two / "dear").write_text("to someone")
    assert not output(cache, two, names=names).find().is_there
    copied = tree(two)
    assert copied.pop("dear") == b"to someone"
    assert copied == {key: value for key, value in tree(one).items() if key != "empty"}
    three = tmp_path / "three"
    (three / "weights.bin").mkdir(parents=True)
    assert output(cache, three, names=names, claimed=("inside",)).look_up() is not None
    with pytest.raises(OutputError, match=r"weights\.bin"):
        output(cache, three, names=names, claimed=("inside",)).find()


def test_a_file_is_an_output_too(cache, tmp_path, size):
    one, two = tmp_path / "one.bin", tmp_path / "two.bin"
    one.write_bytes(b"states")
    output(cache, one).keep({})
    assert output(cache, one).find().is_there
    assert not output(cache, two).find().is_there
    assert two.read_bytes() == b"states"


def test_content_that_is_kept_needs_no_place(cache, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    (one / "scan").write_bytes(b"scan")
    options = {"names": ("scan", "map"), "claimed": ("scan",), "keep_content": True}
    output(cache, one, **options).keep({})
    shutil.rmtree(one)
    assert not output(cache, two, **options).find().is_there
    assert tree(two) == {"scan": b"scan"}
    (two / "scan").write_bytes(b"changed")
    assert output(cache, two, **options).find() is None
    assert output(cache, two, **options).find(overwrite=True) is not None
    assert tree(two) == {"scan": b"scan"}


def test_what_is_bound_to_its_place_is_not_copied(cache, tmp_path, size):
    one = fill(tmp_path / "one")
    output(cache, one).keep({})
    assert output(cache, one, movable=False).find().is_there
    assert output(cache, tmp_path / "two", movable=False).find() is None


def test_nothing_is_hashed_for_a_place_that_is_taken_by_something_else(cache, tmp_path):
    taken = fill(tmp_path / "taken")
    asked = Output(cache, "cut", taken, lambda: pytest.fail("hashed"))
    assert asked.find() is None
    assert (
        Output(Cache(None), "cut", tmp_path / "new", lambda: pytest.fail("hashed")).find() is None
    )


def test_names_that_lead_out_of_a_folder_are_refused(cache, tmp_path):
    one = fill(tmp_path / "one")
    mark = outputs._mark(one / "empty")
    for name in ("../one/empty", str(one / "empty")):
        place = {"path": str(one), "files": {name: mark}}
        cache.put("cut", {"n": 1}, {"value": {}, "places": [place]})
        with pytest.raises(OutputError, match="leads out of its folder"):
            output(cache, tmp_path / "two").find()


def test_files_are_copied_whatever_the_file_system_offers(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(300_000))

    def unsupported(*_):
        raise OSError("not here")

    def a_part(old, new, count, real=os.copy_file_range):
        if os.lseek(new, 0, os.SEEK_CUR) > 100_000:
            raise OSError("no more")
        return real(old, new, min(count, 70_000))

    for number, copy in enumerate((os.copy_file_range, unsupported, a_part)):
        monkeypatch.setattr(os, "copy_file_range", copy)
        outputs._copy_file(source, tmp_path / str(number))
        assert (tmp_path / str(number)).read_bytes() == source.read_bytes()
