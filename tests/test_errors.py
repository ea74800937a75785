"""What errors of the system and of other packages say in ours."""

import errno
import os

import pytest

from shallower.errors import MOST_WORDS, LayersError, one_sentence, why


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
