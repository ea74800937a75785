"""The command line: the same words as the Python interface.

Heavy things are imported by the command that needs them; ``shallower --help`` loads no
torch. An error that the user can cause ends with exit status 2 and one sentence.
"""

import sys
import warnings
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import ShallowerError
from .analyse import analyse_command
from .evaluate import eval_command
from .heal import heal_command, merge_command
from .info import info_command
from .options import quiet_bars
from .output import warn
from .patch import patch_command
from .plan import plan_command
from .prune import prune_command
from .run import demo_command, run_command
from .scan import scan_command

_UsageError: Any = typer.BadParameter.__base__
"""The base of what the parser raises, wherever typer keeps it."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find the layers a language model can do without, cut them out, measure the cost. "
    "Layers are counted from 0 and ranges are half-open.",
)
for _name, _command, _example in (
    ("scan", scan_command, "HuggingFaceTB/SmolLM2-135M --texts c4.jsonl --out scans/smol"),
    ("analyse", analyse_command, "states.safetensors --out scans/smol"),
    ("plan", plan_command, "scans/smol --n 8 --out plans/smol-8"),
    ("prune", prune_command, "HuggingFaceTB/SmolLM2-135M --drop 12:20 --out cut"),
    ("eval", eval_command, "HuggingFaceTB/SmolLM2-135M --texts c4_eval.jsonl --drop 12:20"),
    (
        "patch",
        patch_command,
        "HuggingFaceTB/SmolLM2-135M --drop 12:20 --texts c4.jsonl --out patched",
    ),
    (
        "heal",
        heal_command,
        "cut --texts c4.jsonl --eval-texts c4_eval.jsonl --steps 200 --out healed --merge",
    ),
    ("merge", merge_command, "adapters --out healed"),
    (
        "run",
        run_command,
        "HuggingFaceTB/SmolLM2-135M --texts c4.jsonl --eval-texts c4_eval.jsonl --n 1,2,4,8 "
        "--out runs/smol",
    ),
    ("demo", demo_command, "--out shallower-demo"),
    ("info", info_command, "--json"),
):
    app.command(_name, epilog=f"Example: shallower {_name} {_example}")(_command)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def main() -> None:
    """Run the command line; exit status 2 and one sentence for a user's mistake."""
    quiet_bars()
    warnings.showwarning = lambda message, *_args, **_options: warn(str(message))
    try:
        raise SystemExit(app(standalone_mode=False) or 0)
    except ShallowerError as error:
        message = " ".join(str(error).split())
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "shallower"
        message = f"{error.format_message()} (see {command} --help)"
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
