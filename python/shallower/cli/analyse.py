"""``shallower analyse``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..settings.options import Option
from ..settings.stages import ScanSettings
from ..values.files import HEAT_MAP_FILE, SCAN_FILE
from .options import Out, Way
from .output import reuse, say_dry_run, say_scan

if TYPE_CHECKING:
    from ..store.done import Output
    from ..store.store import Store


def analyse_command(
    *,
    states: Annotated[
        Path,
        typer.Argument(
            metavar="STATES",
            help="A .safetensors or .npy file of hidden states, (samples, L+1, D).",
        ),
    ],
    out: Out,
    tensor: Annotated[
        str | None,
        Option(
            "Tensor in a .safetensors file; hidden_states by default, or else the only one "
            "of three axes.",
            "NAME",
            "measures",
        ),
    ] = None,
    settings: Annotated[ScanSettings, "metrics", "threads", "keep_samples"],
    cka_batch: Annotated[
        int | None,
        Option("Also find linear CKA, from minibatches of N samples, 4 to 1024.", "N", "measures"),
    ] = None,
    way: Way,
) -> None:
    """Compare all layers by hidden states in a file, without a model.

    Memory is constant. Writes scan.safetensors and, where matplotlib is installed,
    heat_map.png, for plan.
    """
    from ..reporting.charts.heat_map import draw_heat_map
    from ..scanning.analyse import analyse_states
    from ..scanning.builder import check_metrics
    from ..scanning.states_file import StatesFile
    from ..storage import check_apart, check_free, claimed

    path = out / SCAN_FILE
    check_apart(path, [states])
    asked: dict[str, Any] = {
        "tensor": tensor,
        "metrics": check_metrics(settings.metrics),
        "keep_samples": settings.keep_samples,
        "cka_batch": cka_batch,
    }
    output = _output(way.open_store(), states, out, **asked)
    if reuse(output, lambda _: _say_again(out, way.as_json)):
        return
    for name in (SCAN_FILE, HEAT_MAP_FILE):
        check_free(out / name, way.overwrite)
    if way.dry_run:
        with StatesFile(states, tensor) as file:
            described = {
                "analyse": str(states),
                "samples": file.shape[0],
                "states": file.shape[1],
                "width": file.shape[2],
                "bytes": file.num_bytes,
                "write": [str(path)],
            }
        say_dry_run(described, way.as_json)
        return
    with claimed(path, way.overwrite):
        scanned = analyse_states(states, threads=settings.threads, **asked)
        scanned.save(path)
    written = [path, *draw_heat_map(scanned, out)]
    output.keep({})
    say_scan(scanned, written, way.as_json)


def _output(store: "Store", states: Path, out: Path, **settings: Any) -> "Output":
    """The scan of a file, as the store remembers it.

    The file is known by its place and time of change: to hash it would take longer than the scan.
    """
    from ..store.done import Output
    from ..store.inputs import file_inputs, made_by

    def inputs() -> dict[str, Any] | None:
        file = file_inputs(states)
        return None if file is None else {"states": file, **settings, "made_by": made_by()}

    return Output(store, "analyse", out, inputs, names=(SCAN_FILE, HEAT_MAP_FILE))


def _say_again(out: Path, as_json: bool) -> None:
    """Print a scan from its folder."""
    from ..scanning.scan import Scan

    written = [path for path in (out / SCAN_FILE, out / HEAT_MAP_FILE) if path.is_file()]
    say_scan(Scan.load(written[0]), written, as_json)
