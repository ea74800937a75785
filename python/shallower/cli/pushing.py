"""``--push``: the option of the commands that make a model, and what they print of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import show

if TYPE_CHECKING:
    from ..runs.push import Push

PushTo = Annotated[
    str | None,
    typer.Option(
        "--push",
        metavar="USER/NAME",
        help="Push what is made to this repository of the hub, which is created where there is "
        "none; with the token of HF_TOKEN or of hf auth login.",
    ),
]
Private = Annotated[
    bool, typer.Option("--private", help="Let a repository that --push creates be private.")
]


def wanted_push(repository: str | None, *, private: bool) -> "Push | None":
    """Read where a result is to be pushed, and refuse what the hub would refuse; None for nowhere.

    OutputError: no such place, no token, or no right to write there; ``--private`` alone.
    """
    from ..errors import OutputError

    if repository is None:
        if private:
            raise OutputError("--private goes with --push: nothing is pushed without it")
        return None
    from ..runs.push import Push

    return Push(repository, private).check()


def planned_push(push: "Push | None") -> dict[str, Any]:
    """Give what a dry run says of a push."""
    if push is None:
        return {}
    return {"push": f"{push.repository}{', private if it is created' if push.private else ''}"}


def pushed(push: "Push | None", folder: Path) -> dict[str, Any]:
    """Push a folder where that is asked for, and give its address under ``pushed``."""
    return {} if push is None else {"pushed": push.carry_out(folder)}


def say_pushed(push: "Push | None", folder: Path) -> None:
    """Push a folder where that is asked for, and print its address."""
    show(*(f"pushed to {url}" for url in pushed(push, folder).values()))
