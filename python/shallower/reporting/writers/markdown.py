"""A story as Markdown, for a model card or an issue."""

import re

from ..charts.drawing import Drawing
from ..story import PromptSample, Section, Story, Table, text_of


def to_markdown(story: Story) -> str:
    """Write a story as Markdown, with the figures as links to their files."""
    parts = [f"# {_plain(story.title)}", _plain(story.sentence)]
    parts += [f"- {_plain(strip.name)}: {_plain(strip.words)}" for strip in story.strips]
    if story.steps:
        rows = tuple((step.name, step.loss, step.more) for step in story.steps)
        head = ("model", "loss, nats a token", "more than the whole model")
        parts.append(_table(Table("", head, rows)))
    if story.cost:
        parts.append(_plain(story.cost))
    parts += [f"- {_plain(fact.name)}: {_plain(text_of(fact.value))}" for fact in story.savings]
    if story.warnings:
        parts += ["## Warnings", *(f"- {_plain(warning)}" for warning in story.warnings)]
    for section in story.sections:
        parts += _section(section)
    return "\n\n".join(part for part in parts if part).replace("\n\n- ", "\n- ") + "\n"


def _section(section: Section) -> list[str]:
    parts = [f"## {_plain(section.title)}", *map(_plain, section.lines)]
    if section.facts:
        rows = tuple((fact.name, fact.value, fact.source) for fact in section.facts)
        parts.append(_table(Table("", ("what", "value", "from"), rows)))
    parts += [_drawing(drawing) for drawing in section.drawings]
    for table in section.tables:
        parts += [f"**{_plain(table.title)}**", _table(table), _plain(table.note)]
    parts += [_sample(sample) for sample in section.samples]
    if section.commands:
        lines = "\n".join(section.commands).splitlines()
        parts.append("\n".join(f"    {line}" for line in lines))
    return parts


def _table(table: Table) -> str:
    lines = ["| " + " | ".join(_plain(name) for name in table.head) + " |"]
    lines.append("|" + "---|" * len(table.head))
    for place, row in enumerate(table.rows):
        cells = [_plain(text_of(cell)) for cell in row]
        if place == table.marked:
            cells[0] = f"**{cells[0]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _drawing(drawing: Drawing) -> str:
    return f"![{_plain(drawing.title)}](figures/{drawing.name}.png)\n\n{_plain(drawing.text)}"


def _sample(sample: PromptSample) -> str:
    """A quoted prompt, and what is said as code, whose lines and indentation stay."""
    lines = [f"> **{_plain(sample.prompt)}**", ">"]
    for name, text in sample.continued.items():
        lines += [f"> {name}:", ">", *(f">     {line}" for line in text.splitlines()), ">"]
    return "\n".join(lines[:-1])


def _plain(text: str) -> str:
    """Any text on one line, none of whose signs mean anything in Markdown or HTML."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)
