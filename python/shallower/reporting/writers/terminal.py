"""Results on a terminal, in 80 columns: tables drawn by rich, sentences as they are."""

import textwrap
from collections.abc import Iterator
from shutil import get_terminal_size
from typing import TYPE_CHECKING

from ..story import Cell, Number, PromptSample, Section, Story, Table, text_of

if TYPE_CHECKING:
    from rich import table as rich_table
    from rich.text import Text

Part = str | Table | Section | Story
"""What can be shown."""

_AIRY = 7
"""Columns that have two spaces between them; more have one."""

_NARROW, _BROAD = 9, 17
"""The width of ranges of layers where room is scarce, that of one range, and else."""

_LAYERS = "drop"
"""The column of the layers: it and those before it are shown at any width."""

_ARROW = "→ "


def show(*parts: Part) -> None:
    """Print sentences, tables, sections, and of whole stories tables, samples and a summary."""
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


def _sample_lines(sample: PromptSample) -> Iterator[str]:
    yield sample.prompt
    for name, text in sample.continued.items():
        yield f"  {name}: {text}"


def _table_lines(table: Table) -> "Iterator[Text | rich_table.Table]":
    """The headline, the table, what was left out and the note, by which no column is made wider."""
    from rich.text import Text

    if table.title:
        yield Text(f"\n{table.title}", "bold")
    places, bare, is_airy = _fitting(table)
    yield _drawn(table, places, bare, is_airy)
    hidden = [
        name
        for place, name in enumerate(table.head)
        if place not in places and name not in table.wide
    ]
    if hidden:
        yield Text(f"Not shown at this width: {', '.join(hidden)}.", "dim")
    if table.note:
        yield Text(table.note, "dim")


def _fitting(table: Table) -> tuple[list[int], set[int], bool]:
    """The columns that fit, those of them without errors, and whether two spaces part them.

    Where there is no room spaces go first, then errors, from the right, then columns, the widest
    first. The layers and what stands before them stay, and verdicts, whose column has no name.
    """
    places = [place for place, name in enumerate(table.head) if name not in table.wide]
    bare = {place for place in places if table.head[place] in table.bare}
    room = get_terminal_size().columns

    def fits(gap: int) -> bool:
        return sum(_least(table, place, place in bare) + gap for place in places) <= room

    if len(places) <= _AIRY and fits(2):
        return places, bare, True
    for place in reversed(places):
        if fits(1):
            break
        if all(isinstance(row[place], Number) for row in table.rows):
            bare.add(place)
    first = table.head.index(_LAYERS) + 1 if _LAYERS in table.head else 1
    others = [place for place in places if place >= first and table.head[place]]
    widths = {place: _least(table, place, place in bare) for place in others}
    for place in sorted(others, key=lambda place: (widths[place], place), reverse=True):
        if fits(1):
            break
        places.remove(place)
    return places, bare, False


def _least(table: Table, place: int, is_bare: bool, width: int = _NARROW) -> int:
    """The least width of a column: of its longest word, and of numbers and layers, whole."""
    arrow = 0 if table.marked is None or place else len(_ARROW)
    widths = [len(word) for word in table.head[place].split()]
    for row in table.rows:
        text = _plain(row[place], is_bare, width)
        whole = isinstance(row[place], Number) or "\xa0" in text_of(row[place])
        widths += [arrow + len(part) for part in (text.splitlines() if whole else text.split())]
    return max(widths, default=0)


def _drawn(table: Table, places: list[int], bare: set[int], is_airy: bool) -> "rich_table.Table":
    from rich import box
    from rich import table as rich_table
    from rich.text import Text

    room, parting = get_terminal_size().columns, 2 * len(places) if is_airy else len(places) - 1
    wide = sum(_least(table, place, place in bare, _BROAD) for place in places)
    width = _BROAD if (is_airy or room > 100) and wide + parting <= room else _NARROW
    spare = room - parting - sum(_least(table, place, place in bare, width) for place in places)
    drawn = rich_table.Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1) if is_airy else 0,
        collapse_padding=True,
        show_header=any(table.head),
    )
    columns = [[_plain(row[place], place in bare, width) for row in table.rows] for place in places]
    heads = [_head(table.head[place], texts) for place, texts in zip(places, columns, strict=True)]
    if table.marked is not None:
        columns[0][table.marked] = f"{_ARROW}{columns[0][table.marked]}"
    least = [_least(table, place, place in bare, width) for place in places]
    wanted = [
        max(len(line) for text in (head, *texts) for line in text.splitlines() or [""])
        for head, texts in zip(heads, columns, strict=True)
    ]
    widths = _shared(least, wanted, spare)  # rich would take it from words that are whole
    widths[0] += is_airy  # rich forgets its left space
    for place, head, column_width in zip(places, heads, widths, strict=True):
        cells = [row[place] for row in table.rows]
        is_number = bool(cells) and all(isinstance(cell, Number) for cell in cells)
        is_ranges = any("\xa0" in text_of(cell) for cell in cells)
        drawn.add_column(
            Text(head),
            justify="right" if is_number else "left",
            no_wrap=is_number or is_ranges,
            overflow="fold",
            width=column_width,
        )
    for number, row in enumerate(table.rows):
        texts = [column[number] for column in columns]
        following = table.rows[number + 1 : number + 2]
        ends = table.is_grouped and bool(following) and following[0][0] != row[0]
        drawn.add_row(*map(Text, texts), end_section=ends)
    return drawn


def _shared(least: list[int], wanted: list[int], spare: int) -> list[int]:
    """Widths between the least and the wanted ones: who wants little has it, the others alike."""
    more = [max(0, want - have) for have, want in zip(least, wanted, strict=True)]
    widths = list(least)
    modest = sorted(range(len(more)), key=more.__getitem__)
    for left, place in zip(range(len(more), 0, -1), modest, strict=True):
        given = min(more[place], max(0, spare) // left)
        widths[place] += given
        spare -= given
    return widths


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
