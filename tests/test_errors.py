"""What errors of the system and of other packages say in ours."""

import errno
import os
import pickle
import re

import pytest

from shallower import errors
from shallower.errors import (
    MOST_WORDS,
    PAGES,
    ExpertsError,
    LayersError,
    MissingExtraError,
    ModelError,
    one_sentence,
    why,
)
from tests.commands import in_this_process
from tests.conftest import ROOT


def of_the_system(code, *names):
    return OSError(code, os.strerror(code), *names)


def test_the_system_speaks_in_words_and_names_a_file_once():
    missing = of_the_system(errno.ENOENT, "a/b")
    assert why(missing, "a/b") == "no such file or directory"
    assert why(missing, "a") == "no such file or directory: a/b"
    assert why(of_the_system(errno.ENOSPC)) == "no space left on device"
    assert one_sentence(missing) == "FileNotFoundError: no such file or directory: a/b"


def test_other_packages_end_with_a_whole_sentence():
    lines = "It is one of: \n(1) a file, \n(2) one to convert or \n(3) a class. \nInstall it."
    assert (
        why(ValueError(lines))
        == "It is one of: (1) a file, (2) one to convert or (3) a class. Install it."
    )
    long = why(ValueError("This is one. " + "word " * 200 + "end."))
    assert long == "This is one."
    endless = why(ValueError("word " * 200))
    assert endless.endswith("word …")
    assert len(endless) <= MOST_WORDS + 2


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyError("n"), "it has no 'n'"), (ValueError(), "ValueError"), (LayersError("a\nb"), "a b")],
)
def test_an_error_is_never_empty_and_on_one_line(error, said):
    assert why(error) == said


# The pages that help.
SOURCE = ROOT / "python" / "shallower"
SEEN = {
    topic
    for path in SOURCE.rglob("*.py")
    for topic in re.findall(
        r'see=(?:None if [\w.]+ else )?"(\w+)"', path.read_text(encoding="utf-8")
    )
}


def test_an_error_names_its_page_beside_its_text():
    error = ModelError("it is too large", see="streaming")
    assert str(error) == "it is too large"
    assert error.page == "docs/how-to/scan-a-70b.md"
    assert error.__notes__ == ["see docs/how-to/scan-a-70b.md"]
    assert pickle.loads(pickle.dumps(error)).__notes__ == error.__notes__
    assert ModelError("it is not there").page is None
    assert not hasattr(ModelError("it is not there"), "__notes__")


def test_some_kinds_have_a_page_always():
    assert MissingExtraError("peft", "heal", "healing").page == "docs/requirements.md"
    assert ExpertsError("there is no expert 9").page == "docs/how-to/experts.md"


def test_every_page_is_named_by_an_error_and_every_error_names_one():
    assert {*SEEN, *errors._ABOUT.values()} == PAGES.keys()
    for kind in errors._ABOUT:
        assert issubclass(getattr(errors, kind), errors.ShallowerError)


@pytest.mark.skipif(not (ROOT / "docs" / "how-to").is_dir(), reason="the pages are not here yet")
@pytest.mark.parametrize("about", PAGES)
def test_every_page_exists(about):
    assert (ROOT / errors.DOCS.format(PAGES[about])).is_file()


def test_the_command_line_ends_the_sentence_with_the_page(tmp_path):
    done = in_this_process("prune", tmp_path, "--drop", "1", "--out", "cut.gguf")
    assert done.error.endswith("or a folder as out (--out) (see docs/how-to/gguf.md)")
