"""What a folder holds, and a disk that is full."""

import json
import resource
from contextlib import contextmanager

from shallower.storage import RECORD, RESULT_RECORD


def tree(folder):
    """Everything below a folder: its kind and content by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = None if path.is_dir() else path.read_bytes()
    return found


def tree_of_ours(folder):
    """Everything below a folder but the records, which name all files beside and below them."""
    found = tree(folder)
    for name in [name for name in found if name.endswith(RECORD)]:
        inside = name.removesuffix(RECORD)
        files = {one for one, content in found.items() if content is not None}
        below = {one.removeprefix(inside) for one in files if one.startswith(inside)}
        below -= {RECORD, RESULT_RECORD}
        assert [*json.loads(found[name])["files"]] == sorted(below), name
    found = {name: content for name, content in found.items() if not name.endswith(RECORD)}
    return without_result_record(found)


def without_result_record(found):
    """A tree without the record of how it was made, which commands write."""
    return {name: content for name, content in found.items() if RESULT_RECORD not in name}


def record(folder, *names):
    """Make a folder that such files were written into."""
    (folder / RECORD).write_text(json.dumps({"files": names}))


@contextmanager
def full_disk(num_bytes=1000):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
