"""``shallower sweep``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import DryRun, Json, On, Out, Workers
from .output import print_json, show

if TYPE_CHECKING:
    from ..runs.sweep import SweepRun


def sweep_command(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="YAML with models, texts, eval_texts and settings."),
    ],
    *,
    out: Out,
    on: On = None,
    workers: Workers = None,
    print_commands: Annotated[
        bool,
        typer.Option(
            "--print-commands",
            help="Print the command line of every job, for another scheduler, and stop.",
        ),
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> int:
    """Compare criteria on models, texts and sizes from one file.

    Each job is a command in a process of its own. The same command asks for the jobs that are not
    done, and writes the page of all. The exit status is 1 if one failed.
    """
    from ..runs.sweep import SweepRun
    from ..runs.sweep_file import read_sweep

    run = SweepRun(read_sweep(file), out, workers, on or "local")
    if print_commands or dry_run:
        _say_jobs(run, as_json, commands=print_commands)
        return 0
    from ..runs.report import save_report

    done = run.run()
    page, story = save_report(out)
    if as_json:
        print_json(
            {**done.to_json(), **story.data, "jobs": done.to_json()["jobs"], "page": str(page)}
        )
    else:
        show(story, f"wrote {out}", f"page: {page}")
    return 0 if done.is_complete else 1


def _say_jobs(run: "SweepRun", as_json: bool, *, commands: bool) -> None:
    """Print the command lines of all jobs, or what is done of them."""
    if as_json:
        print_json({"dry_run": True, "jobs": [job.to_json() for job in run.jobs]})
    elif commands:
        show(*(job.command for job in run.jobs))
    else:
        does = {True: "is done", False: "would run"}
        show(*(f"{does[job.state == 'done']}: {job.name}" for job in run.jobs))
        show(f"would write {run.out}")
