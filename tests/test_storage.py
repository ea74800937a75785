"""A file or folder appears whole or not at all."""

import errno
import fcntl
import os
import re
import shutil
import stat
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower import OutputError
from shallower.processes import partial_folder
from shallower.storage import (
    RECORD,
    check_free,
    new_folder,
    resumable_folder,
    write_file,
)
from tests.folders import full_disk, record, tree, tree_of_ours

NOBODY = 65534


class BodyError(Exception):
    """What the body of a ``with`` raises in these tests."""


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def file_mode_mask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def forbidden(tmp_path):
    """A folder that this process may not look into, root or not."""
    folder = tmp_path / "forbidden"
    folder.mkdir()
    folder.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o700)


@pytest.fixture
def occupied(tmp_path):
    """A file, a folder that was written here, and symlinks to each and to nowhere, by name."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_bytes(b"kept")
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "old").write_bytes(b"old")
    record(tmp_path / "elsewhere", "kept")
    record(tmp_path / "folder", "inner/old")
    (tmp_path / "to_folder").symlink_to("elsewhere")
    (tmp_path / "to_file").symlink_to("elsewhere/kept")
    (tmp_path / "to_nowhere").symlink_to("nowhere")
    return tmp_path


OCCUPIED = ["file", "folder", "to_folder", "to_file", "to_nowhere"]


@given(content=st.binary(max_size=2000))
def test_a_file_holds_what_was_written(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("files")
    write_file(folder / "a" / "b" / "file", content)
    assert tree(folder) == {"a": None, "a/b": None, "a/b/file": content}


@pytest.mark.parametrize("name", ["to_file", "to_nowhere"])
def test_a_file_is_written_where_a_symlink_was(occupied, name):
    write_file(occupied / name, b"new")
    assert (occupied / name).read_bytes() == b"new"
    assert not list(occupied.glob(".*"))


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0])
def test_a_file_has_the_permissions_of_a_new_file(tmp_path, mask):
    with file_mode_mask(mask):
        write_file(tmp_path / "file", b"new")
    assert permissions(tmp_path / "file") == 0o666 & ~mask


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with full_disk(), pytest.raises(OutputError, match="file"):
        write_file(tmp_path / "file", bytes(5000))
    assert tree(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize(
    "name", ["folder", "to_folder", "file/below", "file/far/below", "x" * 300, "a\0b"]
)
def test_a_place_for_no_file_is_refused(occupied, name):
    before = tree(occupied)
    with pytest.raises(OutputError):
        write_file(occupied / name, b"new")
    assert tree(occupied) == before


def test_a_file_in_a_forbidden_folder_is_refused(forbidden):
    with pytest.raises(OutputError):
        write_file(forbidden / "file", b"new")


def test_readers_see_the_old_file_or_the_new_one(tmp_path):
    contents = [bytes([fill]) * 100_000 for fill in range(20)]
    path = tmp_path / "file"
    write_file(path, contents[0])
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        write_file(path, content)
    done.set()
    reader.join()
    assert seen <= set(contents)


def test_writers_of_one_file_leave_the_whole_of_one(tmp_path):
    contents = [bytes([fill]) * 100_000 for fill in range(6)]
    path = tmp_path / "file"
    writers = [threading.Thread(target=write_file, args=(path, content)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def fill(folder):
    """A body: two files, one of them private and deeper."""
    (folder / "top").write_bytes(b"top")
    (folder / "sub").mkdir()
    (folder / "sub" / "deep").write_bytes(b"deep")
    (folder / "sub" / "deep").chmod(0o600)


FILLED = {"top": b"top", "sub": None, "sub/deep": b"deep"}


def test_a_folder_appears_when_the_body_is_done(tmp_path):
    path = tmp_path / "a" / "b" / "out"
    with new_folder(path) as partial:
        fill(partial)
        assert not path.exists()
    assert tree_of_ours(path) == FILLED
    assert tree_of_ours(path.parent).keys() == {"out", *(f"out/{name}" for name in FILLED)}


def test_a_process_that_is_killed_while_it_tidies_up_is_in_nobodys_way(tmp_path, monkeypatch):
    def begin(folder, **_):
        next(Path(folder).rglob("journal")).unlink()

    with monkeypatch.context() as killed, resumable_folder(tmp_path / "new", "job") as folder:
        fill(folder)
        (folder.parent / "kept").mkdir()
        killed.setattr(shutil, "rmtree", begin)
    shutil.rmtree(tmp_path / "new")
    with resumable_folder(tmp_path / "new", "job") as folder:
        fill(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("work", [new_folder, lambda path: resumable_folder(path, "job")])
def test_what_a_killed_process_left_goes_with_the_next_work(tmp_path, work):
    (tmp_path / ".out.partial.0123abcd").write_bytes(b"half")
    (tmp_path / ".out.partial.abcd0123").mkdir()
    fill(tmp_path / ".out.partial.abcd0123")
    others = ["out.partial.0123abcd", ".other.partial.0123abcd", ".out.replaced.0123abcd"]
    for name in others:
        (tmp_path / name).mkdir()
    with work(tmp_path / "out") as folder:
        fill(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as partial:
        fill(partial)
    assert tree_of_ours(tmp_path / "out") == FILLED
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("error", [BodyError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_body_that_fails_leaves_nothing(tmp_path, error, overwrite):
    with pytest.raises(error), new_folder(tmp_path / "out", overwrite) as partial:  # noqa: PT012
        fill(partial)
        raise error
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", OCCUPIED)
def test_a_body_that_fails_keeps_what_was_there(occupied, name):
    before = tree(occupied)
    with pytest.raises(BodyError), new_folder(occupied / name, overwrite=True) as partial:  # noqa: PT012
        fill(partial)
        raise BodyError
    assert tree(occupied) == before


WORK = [
    lambda path, overwrite=False: new_folder(path, overwrite),
    lambda path, overwrite=False: resumable_folder(path, "job", overwrite),
]


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("name", OCCUPIED)
def test_what_is_there_is_refused_before_the_body_runs(occupied, name, work):
    before = tree(occupied)
    with pytest.raises(OutputError, match="overwrite"), work(occupied / name):
        pytest.fail("the body ran")
    with pytest.raises(OutputError, match="overwrite"):
        check_free(occupied / name)
    assert tree(occupied) == before


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("name", OCCUPIED)
def test_overwriting_replaces_and_leaves_nothing_else(occupied, name, work):
    others = {path.name for path in occupied.iterdir()}
    with work(occupied / name, True) as partial:
        fill(partial)
    assert not (occupied / name).is_symlink()
    assert tree_of_ours(occupied / name) == FILLED
    assert {path.name for path in occupied.iterdir()} == others
    assert (occupied / "elsewhere" / "kept").read_bytes() == b"kept"


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("foreign", ["thesis.txt", ".git/HEAD", "inner/thesis.txt", "inner/a/b"])
@pytest.mark.parametrize("name", ["folder", "to_folder"])
def test_what_was_not_written_here_is_never_replaced(occupied, work, name, foreign):
    (occupied / name / foreign).parent.mkdir(parents=True, exist_ok=True)
    (occupied / name / foreign).write_bytes(b"dear to someone")
    named = {".git/HEAD": ".git/", "inner/a/b": "inner/a/"}.get(foreign, foreign)
    named = "inner/" if name == "to_folder" and "inner" in foreign else named
    before, words = tree(occupied), f"wrote {re.escape(named)} there; choose another place"
    with pytest.raises(OutputError, match=words):
        check_free(occupied / name, overwrite=True)
    with pytest.raises(OutputError, match=words), work(occupied / name, True):
        pytest.fail("the body ran")
    assert tree(occupied) == before


@pytest.mark.parametrize("work", WORK)
def test_what_comes_into_a_folder_meanwhile_is_never_replaced(occupied, work):
    path, words = occupied / "folder", "wrote thesis there"
    with pytest.raises(OutputError, match=words), work(path, True) as new:  # noqa: PT012
        fill(new)
        (path / "thesis").write_bytes(b"dear to someone")
    assert (path / "thesis").read_bytes() == b"dear to someone"
    assert (path / "inner" / "old").read_bytes() == b"old"


@pytest.mark.parametrize("damaged", [b"", b"[]", b"{", b'{"files": 1}', b'{"files": [1, null]}'])
def test_a_folder_without_a_sound_record_is_not_ours(tmp_path, damaged):
    for index in range(5):
        (tmp_path / f"file{index}").write_bytes(b"mine")
    (tmp_path / RECORD).write_bytes(damaged)
    with pytest.raises(OutputError, match=r"file0, file1(, file2)? and [23] more there"):
        check_free(tmp_path, overwrite=True)


def test_a_folder_that_filled_meanwhile_is_kept(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(OutputError), new_folder(path) as partial:  # noqa: PT012
        fill(partial)
        path.mkdir()
        (path / "theirs").write_bytes(b"theirs")
    assert tree(tmp_path) == {"out": None, "out/theirs": b"theirs"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["file/below", "file/far/below", "x" * 300, "a\0b", "/"])
def test_a_place_for_no_folder_is_refused(occupied, name, overwrite):
    before = tree(occupied)
    with pytest.raises(OutputError), new_folder(occupied / name, overwrite):
        pytest.fail("the body ran")
    assert tree(occupied) == before


@pytest.mark.parametrize("mask", [0o022, 0o027, 0])
def test_all_files_of_a_folder_have_the_permissions_of_new_files(tmp_path, mask):
    with file_mode_mask(mask), new_folder(tmp_path / "out") as partial:
        fill(partial)
    assert permissions(tmp_path / "out") == 0o777 & ~mask
    assert permissions(tmp_path / "out" / "top") == 0o666 & ~mask
    assert permissions(tmp_path / "out" / "sub" / "deep") == 0o666 & ~mask


def test_files_that_a_folder_only_links_to_keep_their_permissions(tmp_path):
    (tmp_path / "private").write_bytes(b"private")
    (tmp_path / "private").chmod(0o600)
    with new_folder(tmp_path / "out") as partial:
        (partial / "link").symlink_to(tmp_path / "private")
    assert permissions(tmp_path / "private") == 0o600


# Folders whose work goes on.
def half_done(path, job="job", **files):
    """Leave what a body that fails leaves."""
    with suppress(BodyError), resumable_folder(path, job) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        raise BodyError
    assert not path.exists()


def test_a_body_that_fails_goes_on_from_what_it_left(tmp_path):
    path = tmp_path / "new"
    half_done(path, a=b"a")
    assert partial_folder(path) == tmp_path / ".new.partial"
    with resumable_folder(path, "job") as folder:
        assert tree(folder) == {"a": b"a"}
        (folder / "b").write_bytes(b"b")
        assert not path.exists()
    assert tree_of_ours(tmp_path) == {"new": None, "new/a": b"a", "new/b": b"b"}


def test_what_another_job_or_another_place_left_is_discarded(tmp_path):
    half_done(tmp_path / "new", a=b"a")
    with resumable_folder(tmp_path / "new", "other") as folder:
        assert tree(folder) == {}
    alike = ["x" * 220 + end for end in "ab"]
    half_done(tmp_path / alike[0], a=b"a")
    with resumable_folder(tmp_path / alike[1], "job") as folder:
        assert tree(folder) == {}


def test_a_body_that_leaves_nothing_leaves_nothing(tmp_path):
    half_done(tmp_path / "new")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("stranger", ["folder", "file"])
def test_a_stranger_in_the_place_of_the_work_is_kept(tmp_path, stranger):
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / stranger).write_bytes(b"mine")
    before = tree(tmp_path)
    with (
        pytest.raises(OutputError, match="in the way"),
        resumable_folder(tmp_path / "new", "job"),
    ):
        pytest.fail("the body ran")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["link", "file"])
def test_the_work_goes_on_in_a_folder_alone(tmp_path, kind):
    (tmp_path / "elsewhere").mkdir()
    if kind == "link":
        (tmp_path / ".new.partial").symlink_to("elsewhere")
    else:
        (tmp_path / ".new.partial").write_bytes(b"mine")
    before = tree(tmp_path)
    with pytest.raises(OutputError), resumable_folder(tmp_path / "new", "job"):
        pytest.fail("the body ran")
    assert tree(tmp_path) == before


def test_a_death_before_the_journal_was_written_is_no_obstacle(tmp_path):
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / ".journal.0123.partial").write_bytes(b"j")
    with resumable_folder(tmp_path / "new", "job") as folder:
        (folder / "a").write_bytes(b"a")
    assert tree_of_ours(tmp_path) == {"new": None, "new/a": b"a"}


def test_a_death_after_the_renaming_is_no_obstacle(tmp_path):
    half_done(tmp_path / "new", a=b"a")
    record(tmp_path / ".new.partial" / "folder", "a")
    (tmp_path / ".new.partial" / "folder").rename(tmp_path / "new")
    with resumable_folder(tmp_path / "new", "job", overwrite=True) as folder:
        assert tree(folder) == {}
        (folder / "b").write_bytes(b"b")
    assert tree_of_ours(tmp_path) == {"new": None, "new/b": b"b"}


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with resumable_folder(tmp_path / "new", "job") as folder:
        (folder / "a").write_bytes(b"a")
    with new_folder(tmp_path / "other") as folder:
        (folder / "b").write_bytes(b"b")
    assert tree_of_ours(tmp_path) == {"new": None, "new/a": b"a", "other": None, "other/b": b"b"}
