"""What was written here is replaced; what somebody has changed since is not."""

import pytest

from shallower import OutputError, storage
from shallower.storage import RECORD, check_free, new_folder, rewrite


@pytest.mark.parametrize("size", [3, storage._MARKED, 3 * storage._MARKED])
def test_a_file_that_was_edited_is_not_ours_any_more(tmp_path, size):
    path = tmp_path / "out"
    with new_folder(path) as new:
        (new / "inner").mkdir()
        (new / "inner" / "file").write_bytes(bytes(size))
        (new / "card").write_bytes(b"card")
    check_free(path, overwrite=True)
    rewrite(path / "card", b"card with results")
    check_free(path, overwrite=True)
    (path / "inner" / "file").write_bytes(bytes(size - 1) + b"x")
    with pytest.raises(OutputError, match=r"wrote inner/file \(as it is now\) there; choose"):
        check_free(path, overwrite=True)
    (path / "inner" / "file").write_bytes(bytes(size))
    (path / "card").write_bytes(b"my own words")
    rewrite(path / "card", b"my own words with results")  # which makes it no more ours
    with pytest.raises(OutputError, match=r"wrote card \(as it is now\) there"):
        check_free(path, overwrite=True)


def test_a_record_of_names_alone_is_still_read(tmp_path):
    (tmp_path / "file").write_bytes(b"ours")
    (tmp_path / RECORD).write_bytes(b'{"files": ["file"]}')
    check_free(tmp_path, overwrite=True)
