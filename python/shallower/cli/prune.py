"""``shallower prune``: a folder on disk or in memory, a GGUF file directly."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InMemoryOnlyError, ModelError, OutputError
from ..storage import check_free
from ..values.files import PLAN_FILE
from ..values.layers import ranges
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

    from ..cutting.checkpoint import PreparedCut
    from ..values.plan import Plan


def prune_command(
    model: Model,
    out: CutOut,
    drop: Drop = None,
    plan: PlanPath = None,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(help="Dtype of the weights; as stored in a folder by default, else bfloat16."),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bytes in a file of weights at most, 5GB by default; without --dtype.",
        ),
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
    """Drop layers, and save a standard checkpoint.

    A folder of safetensors is cut on disk, without loading it, unless --dtype asks for
    another dtype than the stored one; when interrupted, the same command goes on.
    With an --out that ends in .gguf, a GGUF file is cut directly, without loading it.
    A model card, mergekit's config and llama.cpp's list of layers lie beside every cut.
    """
    if out.suffix == ".gguf":
        path = _gguf_source(model, gguf_file)
        _refuse_options(
            {
                f"--dtype {dtype}": dtype is not None,
                "--max-shard-size": max_shard_size is not None,
                "--device-map": device_map is not None,
                "--trust-remote-code": trust_remote_code,
            }
        )
        _prune_gguf(path, out, drop, plan, verify, overwrite, dry_run, as_json)
        return
    on_disk = _is_cut_on_disk(model, dtype, gguf_file)
    wanted = wanted_plan(model, drop, plan, _count(model, gguf_file, trust_remote_code, on_disk))
    check_free(out, overwrite)
    if out.exists() and Path(model).exists() and out.samefile(model):
        raise OutputError(f"{out} is the model itself: name another folder for the cut")
    described = {"drop": ranges(wanted.dropped), "keep": ranges(wanted.survivors)}
    dry = {"prune": model, **described}
    loaded = None
    cut = _prepared(model, wanted, max_shard_size, trust_remote_code) if on_disk else None
    if cut is not None:
        if dry_run:
            files = [str(out / name) for name in cut.files]
            say_dry_run({**dry, "bytes": cut.num_bytes, "write": files}, as_json)
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
        from ..cutting.cards import EXPORT_FILES

        saved = ("config.json", "generation_config.json", "model*.safetensors", "tokenizer*")
        files = [str(out / name) for name in (*saved, PLAN_FILE, *EXPORT_FILES)]
        say_dry_run({**dry, "write": files}, as_json)
        return
    else:
        dtype = dtype or (_plain_dtype(model) if on_disk else "bfloat16")
        loaded = load(model, dtype, device_map, gguf_file, trust_remote_code)
        wanted = _prune_in_memory(*loaded, out, wanted, overwrite)
    difference = None
    if verify:
        loaded = loaded or load(model, dtype, device_map, gguf_file, trust_remote_code)
        difference = _verify(*loaded, out, wanted)
    from ..reporting.tables import plan_table

    if as_json:
        print_json({**wanted.to_json(), "max_logits_difference": difference, "written": str(out)})
    else:
        show(plan_table(wanted), *_verified(difference), f"wrote {out}")


def _count(model: str, gguf_file: str | None, trust_remote_code: bool, on_disk: bool) -> int:
    if on_disk:
        from ..cutting.checkpoint import count_stored_layers

        return count_stored_layers(model, trust_remote_code)
    from ..models.loading import count_layers

    return count_layers(model, gguf_file, trust_remote_code)


def _prepared(
    model: str, plan: "Plan", max_shard_size: str | None, trust_remote_code: bool
) -> "PreparedCut | None":
    """The cut on disk; None if this model must be cut in memory."""
    from ..cutting.checkpoint import prepare

    try:
        return prepare(model, plan.blocks, max_shard_size or "5GB", plan, trust_remote_code)
    except InMemoryOnlyError:
        return None


def _verify(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", out: Path, plan: "Plan"
) -> float:
    from ..cutting.saving import verify_checkpoint

    text = "The quick brown fox jumps over the lazy dog, and then it does so again."
    return verify_checkpoint(model, tokenizer, out, plan.blocks, text)


def _verified(difference: float | None) -> list[str]:
    return [] if difference is None else [f"logits differ by at most {difference:.2g}"]


def _is_cut_on_disk(model: str, dtype: DtypeName | None, gguf_file: str | None) -> bool:
    from ..cutting.checkpoint import is_checkpoint, stored_dtype

    if gguf_file is not None or not is_checkpoint(model):
        return False
    return dtype is None or dtype == stored_dtype(model)


def _plain_dtype(model: str) -> DtypeName:
    """What a folder's weights are loaded in as they are stored."""
    from ..cutting.checkpoint import stored_dtype

    stored = stored_dtype(model)
    plain: tuple[DtypeName, ...] = ("float32", "float16")
    return next((dtype for dtype in plain if dtype == stored), "bfloat16")


def _prune_in_memory(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    out: Path,
    plan: "Plan",
    overwrite: bool,
) -> "Plan":
    from ..cutting.memory import without_layers
    from ..cutting.saving import save_model
    from ..models.identity import identify

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
    verify: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    from ..cutting.gguf import count_gguf_layers, gguf_files, plan_gguf, prune_gguf
    from ..progress import track

    wanted = wanted_plan(str(source), drop, plan, count_gguf_layers(source))
    plan_gguf(source, wanted.blocks, wanted)
    for path in gguf_files(out):
        check_free(path, overwrite)
    written = [str(path) for path in gguf_files(out)]
    if dry_run:
        described = {"drop": ranges(wanted.dropped), "keep": ranges(wanted.survivors)}
        say_dry_run({"prune": str(source), **described, "write": written}, as_json)
        return
    loaded = load(str(source), "float32", None, None, False) if verify else None
    with track("cutting, %", 100) as advance:
        percent = 0

        def progress(done: int, total: int) -> None:
            nonlocal percent
            advance(done * 100 // total - percent)
            percent = done * 100 // total

        prune_gguf(source, wanted.blocks, out, overwrite, wanted, progress)
    difference = _verify(*loaded, out, wanted) if loaded else None
    from ..reporting.tables import plan_table

    if as_json:
        done = {**wanted.to_json(), "max_logits_difference": difference, "written": written}
        print_json(done)
    else:
        show(plan_table(wanted), *_verified(difference), *(f"wrote {path}" for path in written))
