"""``shallower analyse``."""

from pathlib import Path
from typing import Annotated

import typer

from .options import DryRun, Json, KeepSamples, Metrics, Out, Overwrite, Threads, metric_names
from .output import say_dry_run, say_scan


def analyse_command(
    states: Annotated[
        Path,
        typer.Argument(
            metavar="STATES",
            help="A .safetensors or .npy file of hidden states, (samples, L+1, D).",
        ),
    ],
    *,
    out: Out,
    tensor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Tensor in a .safetensors file; hidden_states by default, or else the only one "
            "of three axes.",
        ),
    ] = None,
    metrics: Metrics = "angular,cosine",
    threads: Threads = None,
    keep_samples: KeepSamples = False,
    cka_batch: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Also find linear CKA, from minibatches of N samples, 4 to 1024."
        ),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compare all layers by hidden states in a file, without a model.

    Memory is constant. Writes scan.safetensors and, where matplotlib is installed,
    heat_map.png, for plan. States that scan --keep-states wrote give the same scan again.
    """
    from ..reporting.figures import draw_heat_map
    from ..scanning.analyse import analyse_states
    from ..scanning.states_file import StatesFile
    from ..storage import check_free
    from ..values.files import SCAN_FILE

    path = out / SCAN_FILE
    check_free(path, overwrite)
    names = metric_names(metrics)
    if dry_run:
        with StatesFile(states, tensor) as file:
            described = {
                "analyse": str(states),
                "samples": file.shape[0],
                "states": file.shape[1],
                "width": file.shape[2],
                "bytes": file.num_bytes,
                "write": [str(path)],
            }
        say_dry_run(described, as_json)
        return
    scanned = analyse_states(
        states, names, threads=threads, keep_samples=keep_samples, cka_batch=cka_batch,
        tensor=tensor,
    )  # fmt: skip
    scanned.save(path)
    say_scan(scanned, [path, *draw_heat_map(scanned, out)], as_json)
