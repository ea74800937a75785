"""What the commands print: text and tables for people, JSON for machines, warnings."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import MissingExtraError
from ..similarity import Scan


def show(*parts: Any) -> None:
    """Print text as it is, and tables drawn."""
    console = Console()
    for part in parts:
        if isinstance(part, str):
            print(part)
        else:
            console.print(part)


def print_json(value: Any) -> None:
    """Print one JSON value."""
    print(json.dumps(value, indent=2))


def say_dry_run(described: dict[str, Any], as_json: bool) -> None:
    """Print what would be done."""
    if as_json:
        print_json({"dry_run": True, **described})
        return
    for name, value in described.items():
        show(f"would {name}: {value}" if name == "write" else f"{name}: {value}")


def warn(message: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {message}", file=sys.stderr)


def rejected(scanned: Scan) -> list[str]:
    """A line for every rejected sample that is named."""
    return [f"rejected {rejection}" for rejection in scanned.rejections]


def draw(scanned: Scan, out: Path) -> list[Path]:
    """Write the heat map of a scan if it can be drawn; gives the files written."""
    from ..figures import save_heat_map

    if "angular" not in scanned.metrics or scanned.num_layers < 2:
        return []
    path = out / "heat_map.png"
    try:
        save_heat_map(scanned, path, scanned.model.name if scanned.model else "")
    except MissingExtraError as error:
        warn(str(error))
        return []
    return [path]
