"""The lint of sentences finds what it should in public docstrings and errors, at its line."""

import ast

from tests import sentences

LONG = " ".join(["word"] * 26)
CODE = f'''"""A module."""


def scan():
    """A text that tells.

    Args:
        texts: short.
        model: {LONG}

    Example:
        >>> {LONG}
    """


def _hidden(what):
    """It tells, too."""
    raise ModelError(
        f"the text {{what}} waits: "
        f"load it"
    )
'''


def faults(read, rules):
    """The line and the first words of every fault."""
    found = [
        fault
        for line, text in read(ast.parse(CODE))
        for fault in sentences.faults("f", "\n" * (line - 1) + text, rules)
    ]
    return [tuple(fault.split(":")[1:3]) for fault in found]


def test_faults_of_code():
    docstrings = [("5", " 'tells'"), ("9", " 27 words, at most 25")]
    assert faults(sentences.docstrings, sentences.DOCSTRINGS) == docstrings
    assert faults(sentences.errors, sentences.ERRORS) == [("19", " 'waits'")]
