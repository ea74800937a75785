"""Sentences that are too long, and words that only this house would use, where users read.

``make lint-words`` reads README, the how-to pages and what ``--help-all`` prints; and of the
package the texts of errors, and the public docstrings, from which the API pages are made.
"""

import ast
import inspect
import os
import re
import sys
from typing import NamedTuple

import shallower
from tests.commands import in_this_process
from tests.conftest import ROOT

PACKAGE = ROOT / "python" / "shallower"
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/install.md",
    "docs/glossary.md",
    "docs/which-command.md",
    "docs/how-to/*.md",
)
PLAIN = {
    r"texts? that (fit|choose|report)s?\b": "calibration, selection or test set",
    r"anything was chosen by": "texts that played no part in the selection",
    r"(what was|was|were) measured before": "cached",
    r"texts? unlike those": "out-of-domain text",
    r"(layer|file|store|model)s?( that)? (wait|tell|hear|speak|meet)s?\b": "what things do",
    r"goes? on (where|from)": "resumes",
    r"\bnobody waits for\b": "unused",
    r"\bsizes that nothing was decided by\b": "sizes shown only for comparison",
}
"""What not to say, as a pattern, and what to say instead."""
OF_THINGS = {
    r"\b(tells|told(?! from)|hears?|heard|meets?|met|speaks?)\b": "what things do",
    r"\b(waits|asks|asked(?! for)|(that|which|they) (wait|ask|tell))\b": "what things do",
}
"""The same where the subjects are things: in docstrings and errors."""
NOT_PROSE = re.compile(r"<!--.*?-->|<[^>\n]+>|^(?: {4}|\||#)[^\n]*$", re.S | re.M)
SHORT = re.compile(r"`[^`\n]*`|\[(?:default|required|x)[^\]]*\]")
END = re.compile(r"(?:(?<=[.!?:;])|(?<=[.!?:]\*\*))\s+(?=[A-Z*(\d`])")
ENTRY = re.compile(r"\n {4}(?=[\w*][\w*, ]*: )|(?<=:)\n {4}")
"""Where the text of one entry of ``Args`` and its like begins."""
NO_SENTENCE = re.compile(r"^Example:\n(?:(?: {4}.*)?\n)*(?: {4}.*)?|^ {4}.* = .*$", re.M)
"""Examples, and lines of formulas."""
BLOCK = re.compile(r"\n\s*\n|\n(?= *(?:-|\d+\.) )")


class Rules(NamedTuple):
    """How long a sentence may be, what it may not say, and where it ends."""

    most: int
    plain: dict[str, str]
    end: re.Pattern[str]


DOCUMENTS = Rules(35, PLAIN, END)
DOCSTRINGS = Rules(25, {**PLAIN, **OF_THINGS}, re.compile(r"(?<=[.!?;])\s+"))
ERRORS = DOCSTRINGS._replace(end=re.compile(r"(?<=[.!?;:])\s+"))
"""An error says what is wrong, a colon, and what to do about it."""


def prose(markdown):
    """A page without code, tables and headings, on the lines that it had."""
    text = NOT_PROSE.sub(_lines, re.sub(r"^ *```.*?^ *```", _lines, markdown, flags=re.S | re.M))
    return re.sub(r"!?\[([^\[\]]*)\]\([^)\s]*\)", r"\1", text)


def _lines(match):
    return "\n" * match[0].count("\n")


def sentences(text, end_of_one=END):
    """(line, sentence) of a text whose paragraphs and items of lists stand apart."""
    at = 0
    for block in [*BLOCK.finditer(text), None]:
        end = block.start() if block else len(text)
        line = text.count("\n", 0, at) + 1 + (len(text[at:end]) - len(text[at:end].lstrip("\n")))
        for sentence in end_of_one.split(SHORT.sub("Code", text[at:end]).strip()):
            if sentence:
                yield line, " ".join(sentence.split())
        at = end


def faults(name, text, rules=DOCUMENTS):
    """What is wrong with the sentences of a text."""
    for line, sentence in sentences(text, rules.end):
        count = len(re.findall(r"\w[\w'’.,%-]*", sentence))
        if count > rules.most:
            yield f"{name}:{line}: {count} words, at most {rules.most}: {sentence}"
        for pattern, plain in rules.plain.items():
            if found := re.search(pattern, sentence):
                yield f"{name}:{line}: '{found[0]}': say {plain}: {sentence}"


def help_texts():
    """(name, text) of what every command says to ``--help-all``, an option a paragraph."""
    from shallower.cli import COMMANDS

    for words in ((), *((name,) for name in COMMANDS)):
        said = in_this_process(*words, "--help-all").out
        said = re.sub(r"\n {8,}", " ", said)
        options = re.sub(
            r"^  (?:-\S+(?: \S+)?|[A-Z]+ \S+|[a-z]+)(?: {2,}| (?=[A-Z]))", "\n", said, flags=re.M
        )
        yield " ".join(("shallower", *words, "--help-all")), options


def docstrings(tree):
    """(line, text) of the docstrings of a module and of all that is public in it."""
    nodes = [node for node in tree.body if getattr(node, "name", "") in shallower.__all__]
    for node in nodes:
        nodes += [inner for inner in node.body if getattr(inner, "name", "_")[0] != "_"]
    for node in (tree, *nodes):
        if text := ast.get_docstring(node, clean=False):
            text = NO_SENTENCE.sub(_lines, inspect.cleandoc(text))
            yield node.body[0].lineno, ENTRY.sub("\n  - ", text)


def errors(tree):
    """(line, text) of the errors and warnings that are made."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Error", "Warning")):
            yield from ((one.lineno, spelled(one)) for one in node.args)


def spelled(node):
    """The text of an expression, as far as it stands in the code; else X."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(spelled, parts))
        case ast.BinOp(left=left, right=right):
            return spelled(left) + spelled(right)
        case ast.IfExp(body=body, orelse=orelse):
            return f"{spelled(body)}; {spelled(orelse)}"
    return "X"


def faults_of_code(path):
    """What is wrong with the public docstrings and the errors of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for texts, rules in ((docstrings(tree), DOCSTRINGS), (errors(tree), ERRORS)):
        for line, text in texts:
            yield from faults(path.relative_to(ROOT), "\n" * (line - 1) + text, rules)


def main():
    os.environ["COLUMNS"] = "80"
    found = [
        fault
        for path in sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})
        for fault in faults(path.relative_to(ROOT), prose(path.read_text(encoding="utf-8")))
    ]
    found += [fault for name, text in help_texts() for fault in faults(name, text)]
    found += [fault for path in sorted(PACKAGE.rglob("*.py")) for fault in faults_of_code(path)]
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
