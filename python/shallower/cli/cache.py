"""``shallower cache``: inspect and clear cached results."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

from ..settings.options import Option
from ..values.estimates import format_size
from .options import Json
from .output import print_json, show

if TYPE_CHECKING:
    from ..store.store import Store


def cache_command(
    *,
    clear: Annotated[bool, Option("Remove all entries, and nothing else.")] = False,
    as_json: Json = False,
) -> None:
    """Show or clear the cache of measurements.

    A command that is given the same model, texts and settings again finds its measurements in the
    cache, and says so; with --no-cache it measures anew. The folder is SHALLOWER_CACHE, else
    shallower in XDG_CACHE_HOME, else ~/.cache/shallower.
    """
    from ..store.store import open_store

    store = open_store()
    folder = None if store.folder is None else str(store.folder)
    named = folder or "no folder: neither SHALLOWER_CACHE nor a home is set"
    if not clear:
        _show(store, named, as_json)
        return
    freed = store.clear()
    if as_json:
        print_json({"folder": folder, "cleared_bytes": freed})
    else:
        show(f"removed {format_size(freed)} from {named}")


def _show(store: "Store", named: str, as_json: bool) -> None:
    """Print what the store holds."""
    from ..reporting.story import Number, Table

    used = store.usage()
    if as_json:
        kinds = [
            {
                "kind": usage.kind,
                "entries": usage.entries,
                "bytes": usage.num_bytes,
                "oldest": _date(usage.oldest),
                "newest": _date(usage.newest),
            }
            for usage in used
        ]
        print_json({"folder": store.folder and str(store.folder), "kinds": kinds})
        return
    rows = tuple(
        (
            usage.kind,
            Number.count(usage.entries),
            Number(format_size(usage.num_bytes), usage.num_bytes),
            _date(usage.oldest)[:10],
            _date(usage.newest)[:10],
        )
        for usage in used
    )
    head = ("kind", "entries", "size", "oldest", "newest")
    show(Table("cached results", head, rows) if rows else "nothing was measured yet", named)


def _date(time: int) -> str:
    return datetime.fromtimestamp(time).astimezone().isoformat(timespec="seconds")
