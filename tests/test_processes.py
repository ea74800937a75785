"""A place is written by one process at a time, with all that lies in it."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shallower import OutputError
from shallower.processes import check_alone, held
from shallower.storage import claimed, new_folder, resumable_folder
from tests.folders import tree, tree_of_ours


def elsewhere(work):
    """Begin some work as another process would, which has no claims of this one."""
    with ThreadPoolExecutor(1) as other:

        def begin():
            with work():
                return True

        return other.submit(begin).result()


REFUSED = {
    "it": lambda: held(Path("out")),
    "into it": lambda: held(Path("out"), inside=True),
    "in it": lambda: held(Path("out/file")),
    "far below": lambda: held(Path("out/far/below/file")),
    "into a link to it": lambda: held(Path("link"), inside=True),
    "by a link to it": lambda: held(Path("link/file")),
    "around it": lambda: held(Path(), inside=True),
    "look": lambda: check_alone(Path("out/file")),
}
FREE = {
    "beside it": lambda: held(Path("beside")),
    "of a longer name": lambda: held(Path("out.more/file")),
    "elsewhere": lambda: held(Path("other/out")),
}


@pytest.mark.parametrize("inside", [False, True])
def test_who_holds_a_place_holds_what_lies_in_it_and_around_it(tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("out")
    with held(Path("out"), inside=inside):
        before = tree(tmp_path)
        for name, work in REFUSED.items():
            with pytest.raises(OutputError, match=f"process {os.getpid()} .* is writing "):
                pytest.fail(f"{name}: {elsewhere(work)}")
        assert all(map(elsewhere, FREE.values()))
        assert tree(tmp_path) == before
    for work in list(REFUSED.values())[:-1]:
        assert elsewhere(work)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_commands_that_write_a_file_each_share_a_folder(tmp_path):
    with claimed(tmp_path / "out" / "scan"):
        for name in ("eval", "deep/eval"):
            assert elsewhere(lambda name=name: claimed(tmp_path / "out" / name))
        for whole in (new_folder, lambda out: held(out, inside=True)):
            with pytest.raises(OutputError, match="is writing it"):
                elsewhere(lambda whole=whole: whole(tmp_path / "out"))


def test_work_may_write_folders_within_its_own(tmp_path):
    with resumable_folder(tmp_path / "new", "job") as folder:
        with new_folder(folder / "part") as part:
            (part / "file").write_bytes(b"a")
        with held(tmp_path / "files", inside=True), new_folder(tmp_path / "files" / "cut") as cut:
            (cut / "file").write_bytes(b"b")
    assert tree_of_ours(tmp_path / "files" / "cut") == {"file": b"b"}
    assert (tmp_path / "new" / "part" / "file").read_bytes() == b"a"
