"""The lint of sentences finds long ones and banned words, and reads prose alone."""

import pytest

from tests import sentences

LONG = "One " + "word " * 35 + "more."


def found(markdown):
    return [fault.partition(": ")[0] for fault in sentences.faults("a", sentences.prose(markdown))]


@pytest.mark.parametrize(
    "markdown",
    [
        f"# One\n\n{LONG}",
        f"Before.\n\n- {LONG}",
        "Text.\n\nWhat was measured before.",
        "Text.\n\nThe layers\nwait on disk.",
    ],
)
def test_faults_are_named_with_their_lines(markdown):
    assert found(markdown) == ["a:3"]


@pytest.mark.parametrize(
    "markdown",
    [
        f"```text\n{LONG}\n```\n",
        f"| {LONG} |\n|---|\n",
        f"    {LONG}\n",
        f"# {LONG}\n",
        f"<!-- {LONG} -->\n",
        f"`{LONG}`",
        "One " + "word " * 20 + "more. Two " + "word " * 20 + "more.",
        "- **One.** " + "Word " * 20 + "\n- **Two.** " + "Word " * 20,
    ],
)
def test_other_text_is_left_alone(markdown):
    assert found(markdown) == []


def test_the_help_of_all_commands_is_read():
    texts = dict(sentences.help_texts())
    assert "Held-out" in texts["shallower eval --help-all"]
    assert all(len(text) > 100 for text in texts.values())
