"""Sentences that are too long, and words that only this house would use, where users read.

``make lint-words`` reads README, the pages that say how to do something, and what commands say to
``--help-all``.
"""

import os
import re
import sys

from tests.commands import in_this_process
from tests.conftest import ROOT

MOST_WORDS = 35
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
NOT_PROSE = re.compile(r"<!--.*?-->|<[^>\n]+>|^(?: {4}|\||#)[^\n]*$", re.S | re.M)
SHORT = re.compile(r"`[^`\n]*`|\[(?:default|required|x)[^\]]*\]")
END = re.compile(r"(?:(?<=[.!?:;])|(?<=[.!?:]\*\*))\s+(?=[A-Z*(\d`])")
BLOCK = re.compile(r"\n\s*\n|\n(?= *(?:-|\d+\.) )")


def prose(markdown):
    """A page without code, tables and headings, on the lines that it had."""
    text = NOT_PROSE.sub(_lines, re.sub(r"^ *```.*?^ *```", _lines, markdown, flags=re.S | re.M))
    return re.sub(r"!?\[([^\[\]]*)\]\([^)\s]*\)", r"\1", text)


def _lines(match):
    return "\n" * match[0].count("\n")


def sentences(text):
    """(line, sentence) of a text whose paragraphs and items of lists stand apart."""
    at = 0
    for block in [*BLOCK.finditer(text), None]:
        end = block.start() if block else len(text)
        line = text.count("\n", 0, at) + 1 + (len(text[at:end]) - len(text[at:end].lstrip("\n")))
        for sentence in END.split(SHORT.sub("Code", text[at:end]).strip()):
            if sentence:
                yield line, " ".join(sentence.split())
        at = end


def faults(name, text):
    """What is wrong with the sentences of a text."""
    for line, sentence in sentences(text):
        count = len(re.findall(r"\w[\w'’.,%-]*", sentence))
        if count > MOST_WORDS:
            yield f"{name}:{line}: {count} words, at most {MOST_WORDS}: {sentence}"
        for pattern, plain in PLAIN.items():
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


def main():
    os.environ["COLUMNS"] = "80"
    found = [
        fault
        for path in sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})
        for fault in faults(path.relative_to(ROOT), prose(path.read_text(encoding="utf-8")))
    ]
    found += [fault for name, text in help_texts() for fault in faults(name, text)]
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
