"""The page of a story: one HTML file that needs no network, Markdown and JSON beside it."""

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...errors import OutputError
from ...storage import write_file
from ..charts.drawing import Drawing
from ..story import STORY_FORMAT, Story
from .markdown import to_markdown

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
    marks = [[mark.x, mark.y, mark.text] for mark in drawing.marks]
    cells = drawing.cells
    if cells is None:
        return {"marks": marks}
    grid = [round(one, 2) for one in (cells.left, cells.bottom, cells.width, cells.height)]
    return {"marks": marks, "grid": grid, "rows": cells.rows}


def _in_script(value: Any) -> str:
    """JSON that can stand in a script element: it holds no sign that HTML knows."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
