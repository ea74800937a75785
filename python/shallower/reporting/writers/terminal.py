"""Results on a terminal, in 80 columns: tables drawn by rich, sentences as they are."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from shutil import get_terminal_size
from typing import TYPE_CHECKING

from ..story import Cell, Number, Sample, Section, Story, Table, text_of

if TYPE_CHECKING:
    from rich import table as rich_table
    from rich.text import Text

Part = str | Table | Section | Story
"""What can be shown."""

_AIRY = 7
"""Columns that have two spaces between them; more have one."""


def show(*parts: Part) -> None:
    """Print sentences, tables, sections and whole stories: of a story its tables and samples, then
    what :func:`show_summary` prints.
    """
    from rich.console import Console

    console = Console()
    for part in parts:
        for line in _lines(part):
            if isinstance(line, str):
                print(line)
            else:
                console.print(line)


def show_summary(story: Story) -> None:
    """Print which layers go, what that costs and saves, the warnings, and all in a sentence."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for line in _summary(story):
        console.print(Text(line))


def _lines(part: Part) -> "Iterator[str | Text | rich_table.Table]":
    from rich.text import Text

    if isinstance(part, str):
        yield part
    elif isinstance(part, Table):
        yield from _table_lines(part)
    elif isinstance(part, Section):
        yield Text(f"\n{part.title}")
        yield from map(Text, part.lines)
        for table in part.tables:
            yield from _table_lines(table)
        for sample in part.samples:
            yield from ("", *_sample_lines(sample))
    else:
        yield Text(part.title)
        for section in part.sections:
            if section.tables or section.samples:
                yield from _lines(section)
        yield ""
        yield from map(Text, _summary(part))


def _summary(story: Story) -> Iterator[str]:
    yield from (f"{strip.name}: {strip.words}" for strip in story.strips)
    if story.steps:
        steps = [
            f"{step.name} {step.loss.text}{f' ({step.more})' if step.more else ''}"
            for step in story.steps
        ]
        yield f"nats a token: {' → '.join(steps)}"
    yield from filter(None, [story.cost])
    if story.savings:
        saved = ", ".join(f"{fact.name} {text_of(fact.value)}" for fact in story.savings)
        yield f"saves: {saved}"
    yield from (f"warning: {warning}" for warning in story.warnings)
    yield story.sentence


def _sample_lines(sample: Sample) -> Iterator[str]:
    yield sample.prompt
    for name, text in sample.continued.items():
        yield f"  {name}: {text}"


def _table_lines(table: Table) -> "Iterator[Text | rich_table.Table]":
    """The headline, the table and its note, by which no column is made wider."""
    from rich.text import Text

    if table.title:
        yield Text(f"\n{table.title}", "bold")
    yield _drawn(table)
    if table.note:
        yield Text(table.note, "dim")


def _drawn(table: Table) -> "rich_table.Table":
    """Draw a table, or of one that is too wide what is left of it."""
    from rich.console import Console

    console = Console()
    unbounded = console.options.update(max_width=10_000)
    is_airy = sum(name not in table.wide for name in table.head) <= _AIRY
    drawn = _at_full_width(table, is_airy)
    for narrowed in _narrowed(table):
        if console.measure(drawn, options=unbounded).minimum <= console.width:
            break
        drawn = _at_full_width(narrowed, is_airy=False)
    return drawn


def _narrowed(table: Table) -> Iterator[Table]:
    """Yield the table, then without errors, then without ever more columns of numbers: from the
    right, those that stand without errors first. Names and layers stay.
    """
    yield table
    numbers = [
        name
        for place, name in enumerate(table.head)
        if name not in table.wide and _is_number([row[place] for row in table.rows])
    ]
    staying = sorted(numbers, key=lambda name: name in table.bare)
    for count in range(len(staying), -1, -1):
        wide = (*table.wide, *staying[count:])
        yield replace(table, bare=(*table.bare, *numbers), wide=wide)


def _is_number(cells: Sequence[Cell]) -> bool:
    return bool(cells) and all(isinstance(cell, Number) for cell in cells)


def _at_full_width(table: Table, is_airy: bool) -> "rich_table.Table":
    from rich import box
    from rich import table as rich_table
    from rich.text import Text

    places = [place for place, name in enumerate(table.head) if name not in table.wide]
    width = 17 if is_airy or get_terminal_size().columns > 100 else 9
    drawn = rich_table.Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1) if is_airy else 0,
        collapse_padding=True,
        show_header=any(table.head),
    )
    columns = []
    for place in places:
        cells = [row[place] for row in table.rows]
        is_bare = table.head[place] in table.bare
        is_number = _is_number(cells)
        is_ranges = any("\xa0" in text_of(cell) for cell in cells)
        columns.append([_plain(cell, is_bare, width) for cell in cells])
        is_whole = is_number or is_ranges
        pieces = [cell.splitlines() if is_whole else cell.split() for cell in columns[-1]]
        drawn.add_column(
            Text(_head(table.head[place], columns[-1])),
            justify="right" if is_number else "left",
            no_wrap=is_whole,
            overflow="fold",
            min_width=max((len(piece) for cell in pieces for piece in cell), default=None),
        )
    for number, row in enumerate(table.rows):
        texts = [column[number] for column in columns]
        if number == table.marked:
            texts[0] = f"→ {texts[0]}"
        following = table.rows[number + 1 : number + 2]
        ends = table.is_grouped and bool(following) and following[0][0] != row[0]
        drawn.add_row(*map(Text, texts), end_section=ends)
    return drawn


def _plain(cell: Cell, is_bare: bool, width: int) -> str:
    """The text of a cell; ranges of layers are broken at a width between them, never within."""
    if isinstance(cell, Number):
        return cell.bare if is_bare else cell.text
    if "\xa0" in cell:
        cell = textwrap.fill(cell, width, break_long_words=False)
    return cell.replace("\xa0", " ")


def _head(name: str, cells: list[str]) -> str:
    """The name of a column, broken between words where its cells are narrower."""
    words = name.split()
    widest = max((len(line) for cell in cells for line in cell.splitlines()), default=80)
    return textwrap.fill(name, max(widest, *map(len, words))) if words else ""
