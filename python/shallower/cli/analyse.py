"""``shallower analyse``."""

from pathlib import Path
from typing import Annotated

import typer

from ..scanning.analyse import analyse_states
from ..scanning.states_file import StatesFile
from ..storage import check_free
from ..values.files import SCAN_FILE
from .options import DryRun, Json, KeepSamples, Metrics, Out, Overwrite, Threads, metric_names
from .output import save_scan, say_dry_run, say_scan


def analyse_command(
    states: Annotated[
        Path, typer.Argument(help="A .safetensors or .npy file of states, (samples, L+1, D).")
    ],
    out: Out,
    tensor: Annotated[
        str | None,
        typer.Option(
            help="The tensor in a .safetensors file; hidden_states by default, or else the only "
            "one of three axes."
        ),
    ] = None,
    metrics: Metrics = "angular,cosine",
    threads: Threads = None,
    keep_samples: KeepSamples = False,
    cka_batch: Annotated[
        int | None,
        typer.Option(help="Also find linear CKA, from minibatches of so many samples, 4 to 1024."),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compare all layers by states in a file, in constant memory and without a model.

    Writes scan.safetensors and, where matplotlib is installed, heat_map.png, for plan. States
    that scan --keep-states wrote give the same scan again.
    """
    check_free(out / SCAN_FILE, overwrite)
    names = metric_names(metrics)
    if dry_run:
        with StatesFile(states, tensor) as file:
            described = {
                "analyse": str(states),
                "samples": file.shape[0],
                "states": file.shape[1],
                "width": file.shape[2],
                "bytes": file.num_bytes,
            }
        say_dry_run({**described, "write": [str(out / SCAN_FILE)]}, as_json)
        return
    scanned = analyse_states(states, names, threads, keep_samples, cka_batch, tensor=tensor)
    say_scan(scanned, save_scan(scanned, out), as_json)
