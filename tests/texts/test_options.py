"""Items of a task come out of a file as they are, or the error names the file and the line."""

import pytest

from shallower import TextsError
from shallower.texts.options import OptionItem, options_fingerprint, read_options
from tests.written import write_prompts

GOOD = {"context": "The sky is", "options": ["wet", "blue"], "answer": 1}


@pytest.fixture
def write(tmp_path):
    """Write JSON lines from a list; gives the path as a string."""
    return lambda records: str(write_prompts(tmp_path / "options.jsonl", *records))


def test_items_come_as_they_are(write):
    three = {"context": "", "options": [" a", "b ", "ü"], "answer": 2, "id": "x"}
    found = read_options(write([GOOD, three]))
    assert found == [
        OptionItem("The sky is", ("wet", "blue"), 1),
        OptionItem("", (" a", "b ", "ü"), 2),
    ]
    assert [item.line for item in found] == [1, 2]
    assert len(set(found + read_options(write([three, GOOD])))) == 2


@pytest.mark.parametrize("context", ["query", "question"])
def test_other_names_of_the_fields(write, context):
    record = {context: "The sky is", "choices": ["wet", "blue"], "answer": 1}
    assert read_options(write([record])) == read_options(write([GOOD]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ...}, "there is no field answer$"),
        ({"answer": 2}, "the index of the right option, an integer from 0 to 1, got 2$"),
        ({"answer": -1}, "from 0 to 1, got -1$"),
        ({"answer": "B"}, 'from 0 to 1, got "B"$'),
        ({"answer": True}, r"got true; write true as the index of its option, as 1 of \[no, yes\]"),
        ({"options": ...}, r"there is no field options \(or choices\)$"),
        ({"options": ["one"]}, "a list of at least 2 strings, got a list of 1$"),
        ({"options": "two"}, 'a list of at least 2 strings, got "two"$'),
        ({"options": {"text": ["a", "b"]}}, "a list of at least 2 strings, got an object$"),
        ({"options": ["one", 2]}, "option 1 must be a string that is not blank, got 2$"),
        ({"options": ["a", "\ud800"]}, "option 1 .* got a string that is not UTF-8$"),
        ({"context": ...}, r"there is no field context \(or query or question\)$"),
        ({"context": ["one"]}, "the context must be a string, got a list of 1$"),
        ({"context": "\udfff"}, "the context must be a string, got a string that is not UTF-8$"),
        ({"question": "?"}, "context and question mean the same: write all of it into context"),
        ({"choices": []}, "options and choices mean the same: write all of it into options"),
    ],
)
def test_a_line_that_is_no_item_is_named(write, change, message):
    record = {name: value for name, value in {**GOOD, **change}.items() if value is not ...}
    source = write([GOOD, record])
    with pytest.raises(TextsError, match=f"^{source}, line 2: .*{message}"):
        read_options(source)


@pytest.mark.parametrize(("line", "name"), [(3, "3"), (["a"], "a list of 1"), (None, "null")])
def test_a_line_that_is_no_object_is_named(write, line, name):
    with pytest.raises(TextsError, match=f"line 1: expected a JSON object .*, got {name}"):
        read_options(write([line]))


def test_a_fingerprint_is_of_the_content_alone(write):
    items = read_options(write([GOOD]))
    renamed = {"other": 1, "query": "The sky is", "choices": ["wet", "blue"], "answer": 1}
    assert options_fingerprint(read_options(write([renamed]))) == options_fingerprint(items)
    for change in ({"answer": 0}, {"context": "The sky is "}, {"options": ["wet", "blue", "red"]}):
        assert options_fingerprint(read_options(write([{**GOOD, **change}]))) != (
            options_fingerprint(items)
        )
    assert options_fingerprint(items * 2) != options_fingerprint(items)
