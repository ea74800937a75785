"""The page of a story: one HTML file that needs no network, Markdown and JSON beside it."""

import base64
import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...errors import OutputError
from ...storage import write_file
from ..charts.drawing import Drawing
from ..story import STORY_FORMAT, PromptSample, Section, Story, Table, text_of

_TEMPLATES = files(__package__) / "templates"


def to_html(story: Story) -> str:
    """Write a story as one HTML page with style, script, figures and numbers.

    All words are escaped, and its policy lets no browser load anything or run another script.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined
    from markupsafe import Markup

    names = ("report.html.j2", "parts.html.j2")
    texts = {name: _TEMPLATES.joinpath(name).read_text("utf-8") for name in names}
    environment = Environment(
        loader=DictLoader(texts),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_TEMPLATES.joinpath(name).read_text("utf-8") for name in _INLINED)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(names[0]).render(
        story=story,
        style=Markup(style),
        script=Markup(script),
        script_hash=digest,
        figures={one.name: Markup(one.inline()) for one in story.drawings},
        numbers=Markup(_in_script(story.to_json())),
        hover=Markup(_in_script({one.name: _hover(one) for one in story.drawings})),
    )


_INLINED = ("report.css", "report.js")


def write_page(story: Story, page: Path) -> None:
    """Write the page, Markdown and JSON beside it, and ``figures``, in place of what is there."""
    written = [page, *_beside(page)]
    content = json.dumps(story.to_json(), indent=2, ensure_ascii=False) + "\n"
    texts = to_html(story), to_markdown(story), content
    # JSON first: by it the rest is known as ours, even if this is cut short.
    for path, text in reversed(list(zip(written, texts, strict=True))):
        write_file(path, text.encode())
    for drawing in story.drawings:
        drawing.save(page.parent / "figures")


def _beside(page: Path) -> tuple[Path, Path]:
    """The places of Markdown and JSON."""
    return page.with_suffix(".md"), page.with_suffix(".json")


def shows_figures(page: Path) -> bool:
    """Whether the page that is there shows figures; refuses Markdown and JSON of no page."""
    words, numbers = _beside(page)
    found = numbers if numbers.exists() else words
    if not found.exists():
        return False
    try:
        data = json.loads(numbers.read_bytes())
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or data.get("format") != STORY_FORMAT:
        raise OutputError(
            f"{found} is there already, and no page has written it: give the page another name "
            f"(out, --out)"
        )
    return bool(data.get("figures"))


def _hover(drawing: Drawing) -> dict[str, Any]:
    """The texts of a figure's places, short."""
    if drawing.grid is None:
        return {"marks": drawing.marks}
    grid = [round(one, 2) for one in drawing.grid]
    return {"marks": drawing.marks, "grid": grid, "rows": drawing.rows}


def _in_script(value: Any) -> str:
    """JSON that can stand in a script element: it holds no sign that HTML knows."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


# Markdown
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
