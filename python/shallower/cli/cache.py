"""``shallower cache``: what was measured before."""

from datetime import datetime
from typing import Annotated

import typer

from .options import Json
from .output import print_json, show


def cache_command(
    *,
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove all entries, and nothing else.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what was measured before, or remove it.

    A command that is given the same model, texts and settings again finds its result in the
    cache, and says so; with --no-cache it measures anew. The folder is SHALLOWER_CACHE, else
    shallower in XDG_CACHE_HOME, else ~/.cache/shallower.
    """
    from ..reporting.tables import cache_table
    from ..runs.cache import open_cache
    from ..values.memory import format_size

    cache = open_cache()
    folder = None if cache.folder is None else str(cache.folder)
    named = folder or "no folder: neither SHALLOWER_CACHE nor a home is set"
    if clear:
        freed = cache.clear()
        if as_json:
            print_json({"folder": folder, "cleared_bytes": freed})
        else:
            show(f"removed {format_size(freed)} from {named}")
        return
    used = cache.usage()
    if as_json:
        kinds = [
            {
                "kind": usage.kind, "entries": usage.entries, "bytes": usage.num_bytes,
                "oldest": _date(usage.oldest), "newest": _date(usage.newest),
            }
            for usage in used
        ]  # fmt: skip
        print_json({"folder": folder, "kinds": kinds})
        return
    rows = [
        (usage.kind, usage.entries, format_size(usage.num_bytes), _date(usage.oldest)[:10],
         _date(usage.newest)[:10])
        for usage in used
    ]  # fmt: skip
    show(*([cache_table(rows)] if rows else ["nothing was measured yet"]), named)


def _date(time: float) -> str:
    return datetime.fromtimestamp(time).astimezone().isoformat(timespec="seconds")
