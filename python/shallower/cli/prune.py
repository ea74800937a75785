"""``shallower prune``: a folder on disk or in memory, a GGUF file directly."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..artifacts import Plan
from ..errors import ModelError, OutputError
from ..report import plan_table, ranges
from ..storage import check_free
from .options import (
    CutOut,
    DeviceMap,
    Drop,
    DryRun,
    DtypeName,
    GgufFile,
    Json,
    Model,
    Overwrite,
    PlanPath,
    TrustRemoteCode,
    load,
    wanted_plan,
)
from .output import print_json, say_dry_run, show

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prune_command(
    model: Model,
    out: CutOut,
    drop: Drop = None,
    plan: PlanPath = None,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(help="Of the weights; by default as stored in a folder, else bfloat16."),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Bytes in a file of weights at most, 5GB by default; without --dtype."),
    ] = None,
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Reload with stock transformers and compare the logits."),
    ] = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Drop layers, and save a standard checkpoint with the plan beside it.

    A folder of safetensors is cut on disk, without loading it, unless --dtype asks for
    another dtype than the stored one; when interrupted, the same command goes on.
    With an --out that ends in .gguf, a GGUF file is cut directly, without loading it.
    """
    if out.suffix == ".gguf":
        path = _gguf_source(model, gguf_file)
        _refuse_options(
            {
                f"--dtype {dtype}": dtype is not None,
                "--max-shard-size": max_shard_size is not None,
                "--device-map": device_map is not None,
                "--trust-remote-code": trust_remote_code,
                "--verify": verify,
            }
        )
        _prune_gguf(path, out, drop, plan, overwrite, dry_run, as_json)
        return
    on_disk = _is_cut_on_disk(model, dtype, gguf_file)
    if on_disk:
        from ..checkpoint import count_stored_layers

        total = count_stored_layers(model, trust_remote_code)
    else:
        from ..models.loading import count_layers

        total = count_layers(model, gguf_file, trust_remote_code)
    wanted = wanted_plan(model, drop, plan, total)
    check_free(out, overwrite)
    if out.exists() and Path(model).exists() and out.samefile(model):
        raise OutputError(f"{out} is the model itself: name another folder for the cut")
    described = {"drop": ranges(wanted.dropped), "keep": ranges(wanted.survivors)}
    dry = {"prune": model, **described, "write": [str(out)]}
    loaded = None
    if on_disk:
        from ..checkpoint import prepare

        size = max_shard_size or "5GB"
        cut = prepare(model, wanted.blocks, size, wanted, trust_remote_code)
        if dry_run:
            say_dry_run({**dry, "bytes": cut.num_bytes}, as_json)
            return
        wanted = cut.plan
        cut.write(out, overwrite)
        dtype = _plain_dtype(model)
    elif max_shard_size is not None:
        raise OutputError(
            "--max-shard-size goes with a folder of safetensors that is cut as it is stored: leave "
            "it out, or leave out --dtype"
        )
    elif dry_run:
        say_dry_run(dry, as_json)
        return
    else:
        dtype = dtype or "bfloat16"
        loaded = load(model, dtype, device_map, gguf_file, trust_remote_code)
        wanted = _prune_in_memory(*loaded, out, wanted, overwrite)
    difference = None
    if verify:
        from ..pipeline import verify_checkpoint

        loaded = loaded or load(model, dtype, device_map, gguf_file, trust_remote_code)
        text = "The quick brown fox jumps over the lazy dog, and then it does so again."
        difference = verify_checkpoint(*loaded, out, wanted.blocks, text)
    if as_json:
        print_json({**wanted.to_json(), "max_logits_difference": difference, "written": str(out)})
    else:
        checked = [] if difference is None else [f"logits differ by at most {difference:.2g}"]
        show(plan_table(wanted), *checked, f"wrote {out}")


def _is_cut_on_disk(model: str, dtype: DtypeName | None, gguf_file: str | None) -> bool:
    from ..checkpoint import is_checkpoint, stored_dtype

    if gguf_file is not None or not is_checkpoint(model):
        return False
    return dtype is None or dtype == stored_dtype(model)


def _plain_dtype(model: str) -> DtypeName:
    """What a folder's weights are loaded in as they are stored."""
    from ..checkpoint import stored_dtype

    stored = stored_dtype(model)
    plain: tuple[DtypeName, ...] = ("float32", "float16")
    return next((dtype for dtype in plain if dtype == stored), "bfloat16")


def _prune_in_memory(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    out: Path,
    plan: Plan,
    overwrite: bool,
) -> Plan:
    from ..models.identity import identify
    from ..pruning import save_model, without_layers

    identity = identify(model)
    plan.check_model(identity)
    if plan.model is None:
        plan = replace(plan, model=identity)
    with without_layers(model, plan.blocks):
        save_model(model, tokenizer, out, plan, overwrite)
    return plan


def _gguf_source(model: str, gguf_file: str | None) -> Path:
    """The GGUF file to cut directly."""
    path = Path(model).expanduser() / gguf_file if gguf_file else Path(model).expanduser()
    if path.suffix != ".gguf":
        raise ModelError(
            f"{model} is no .gguf file, and only such a one is cut into a .gguf file: name a "
            f"local file, or a folder as --out"
        )
    return path


def _refuse_options(given: dict[str, bool]) -> None:
    """Refuse options that mean nothing where no model is loaded."""
    for name in (name for name, is_given in given.items() if is_given):
        raise ModelError(
            f"{name} does not go with a .gguf file as --out, which is cut without being loaded: "
            f"leave it out, or name a folder as --out"
        )


def _prune_gguf(
    source: Path,
    out: Path,
    drop: str | None,
    plan: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    from ..gguf import count_gguf_layers, plan_gguf, plan_path, prune_gguf
    from ..progress import track

    wanted = wanted_plan(str(source), drop, plan, count_gguf_layers(source))
    written = [str(out), str(plan_path(out))]
    if dry_run:
        plan_gguf(source, wanted.blocks, wanted)
        for path in written:
            check_free(Path(path), overwrite)
        described = {"drop": ranges(wanted.dropped), "keep": ranges(wanted.survivors)}
        say_dry_run({"prune": str(source), **described, "write": written}, as_json)
        return
    with track("cutting, %", 100) as advance:
        percent = 0

        def progress(done: int, total: int) -> None:
            nonlocal percent
            advance(done * 100 // total - percent)
            percent = done * 100 // total

        prune_gguf(source, wanted.blocks, out, overwrite, wanted, progress)
    if as_json:
        print_json({**wanted.to_json(), "written": written})
    else:
        show(plan_table(wanted), *(f"wrote {path}" for path in written))
