"""The options that several commands share, and what they ask for."""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import LayersError, PlanError
from ..scanning.scan import check_metrics
from ..values.files import PLAN_FILE
from ..values.layers import blocks_of, dropped_layers, parse_layers
from ..values.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DtypeName = Literal["float32", "bfloat16", "float16", "nf4", "int8"]
Model = Annotated[str, typer.Argument(help="A local folder, a hub id, or a .gguf file.")]
TextsSource = Annotated[
    str,
    typer.Option(
        help="A .jsonl file (field text), a .txt file (a document a line), a .parquet file, or a "
        "hub dataset as id:split or id:config:split."
    ),
]
Out = Annotated[Path, typer.Option(help="The folder to write to.")]
CutOut = Annotated[
    Path, typer.Option(help="The folder to write to, or a .gguf file if MODEL is one.")
]
Dtype = Annotated[DtypeName, typer.Option(help="Of the weights; nf4 and int8 by bitsandbytes.")]
DeviceMap = Annotated[
    str | None, typer.Option(help="As transformers takes it; auto by default if there is CUDA.")
]
GgufFile = Annotated[str | None, typer.Option(help="A GGUF file in MODEL's folder or repository.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run MODEL's own code.")]
MaxLength = Annotated[int, typer.Option(help="Tokens of a text at most.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Texts in one forward.", min=1)]
Samples = Annotated[int | None, typer.Option(help="Use the first so many texts.", min=1)]
Metrics = Annotated[
    str, typer.Option(help="Of angular, cosine, relative_l2, norm_ratio; comma-separated.")
]
KeepSamples = Annotated[
    bool,
    typer.Option(
        "--keep-samples",
        help="Keep the distances of every sample for plan --bootstrap: 4 bytes times samples times "
        "pairs of layers, for each metric.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of the core; all by default.", min=1)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, for machines.")]
Drop = Annotated[
    str | None, typer.Option(help="Layers to drop: indices and half-open ranges, as 3,12:20.")
]
PlanPath = Annotated[Path | None, typer.Option("--plan", help="A plan file, or its folder.")]
Sizes = Annotated[str, typer.Option("--n", help="Block sizes to try, as 1,2,4,8.")]


def load(
    model: str,
    dtype: DtypeName,
    device_map: str | None,
    gguf_file: str | None,
    trust_remote_code: bool,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a model as the options say, on the GPUs if there are any."""
    quiet()
    import torch

    from ..models.loading import load_model

    if device_map is None and torch.cuda.is_available():
        device_map = "auto"
    return load_model(model, dtype, device_map, gguf_file, trust_remote_code)


def quiet_bars() -> None:
    """No bars of tqdm where nobody looks: it asks for this once, when it is imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def quiet() -> None:
    """No bars of transformers where nobody looks, and no advice of bitsandbytes to get a kernel
    from a hub.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def metric_names(metrics: str) -> list[str]:
    """The metrics that ``--metrics`` names."""
    return check_metrics([name.strip() for name in metrics.split(",")])


def wanted_plan(model: str, drop: str | None, plan: Path | None, num_layers: int) -> Plan:
    """The plan behind ``--drop`` or ``--plan``, for a model of so many layers."""
    if (drop is None) == (plan is None):
        raise LayersError("name the layers to drop, either by --drop or by --plan")
    if plan is not None:
        path = plan / PLAN_FILE if plan.is_dir() else plan
        loaded = Plan.load(path)
        if loaded.num_layers != num_layers:
            raise PlanError(
                f"the plan {path} is for {loaded.num_layers} layers, {model} has {num_layers}"
            )
        return loaded
    return Plan(num_layers, blocks_of(dropped_layers(num_layers, parse_layers(drop or ""))))
