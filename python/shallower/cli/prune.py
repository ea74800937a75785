"""``shallower prune``: a folder on disk or in memory, a GGUF file directly."""

from pathlib import Path
from typing import Annotated, Any

from ..models.dtypes import Dtype as DtypeName
from ..models.source import ModelSource
from ..settings.options import TEXT_ONLY, Option
from ..values.estimates import disk, format_size
from .options import Cut, Loading, Model, Way
from .output import print_json, reuse, say_dry_run, show, upload_line


def prune_command(
    *,
    model: Model,
    out: Annotated[Path, Option("Folder to write to, or a .gguf file if MODEL is one.", "PATH")],
    cut: Cut,
    for_states: Annotated[
        str | None,
        Option(
            "Instead of layers, the hidden states that a pipeline reads, as 9,18,27: keep "
            "only the layers that they need, and compare them, to the bit.",
            "STATES",
        ),
    ] = None,
    dtype: Annotated[
        DtypeName | None,
        Option(
            "Dtype of the weights; by default as in safetensors, else bfloat16.", group="memory"
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        Option(
            "Bytes in a file of weights at most, 5GB by default; without --dtype.",
            "SIZE",
            "output",
        ),
    ] = None,
    as_gguf: Annotated[
        bool,
        Option("Make --out a folder for the hub: NAME.gguf and README.md.", group="output"),
    ] = False,
    verify: Annotated[
        bool, Option("Reload with stock transformers and compare the logits.")
    ] = False,
    text_only: Annotated[bool, Option(TEXT_ONLY, group="output")] = False,
    loading: Annotated[Loading, "device_map", "gguf_file", "trust_remote_code"],
    way: Way,
) -> None:
    """Drop layers or experts, and save a standard checkpoint.

    With --for-states nothing is lost: the layers go that the named hidden states do not need.
    The states of the cut are compared with those of MODEL after a stock reload.

    A folder of safetensors is cut on disk, without loading it, unless --dtype asks for
    another dtype than the stored one; when interrupted, the same command goes on.
    So is a hub model of safetensors, of which only what stays is fetched; with --verify
    or --for-states all of it.
    With an --out that ends in .gguf, or with --as-gguf, a GGUF file is cut directly,
    without loading it.
    A model card lies beside every cut; mergekit's config and llama.cpp's list of layers
    beside one of layers alone.
    """
    from ..cutting.plans import experts_path, plan_file
    from ..cutting.prune import plan_prune
    from ..storage import check_apart
    from ..store.done import cut_output

    plan = None if cut.plan is None else plan_file(cut.plan)
    check_apart(out, [plan, experts_path(cut.drop_experts or "")])
    layers, experts = cut.read_states(for_states)
    how: dict[str, Any] = {
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "as_gguf": as_gguf,
        "verify": verify,
        "text_only": text_only,
        "device_map": loading.device_map,
        "gguf_file": loading.gguf_file,
        "trust_remote_code": loading.trust_remote_code,
    }
    output = cut_output(way.open_store(), model, layers, experts=experts, out=out, **how)
    source = ModelSource(model, gguf_file=loading.gguf_file).place.expanduser()
    if reuse(output, lambda value: _end(_written_at(value, out), source, out, way.as_json), out):
        return
    planned = plan_prune(model, layers, out, experts=experts, overwrite=way.overwrite, **how)
    if way.dry_run:
        described = planned.to_json()
        say_dry_run(described if way.as_json else _with_disk(described, out), way.as_json)
        return
    _end(output.keep(planned.run().to_json()), source, out, way.as_json)


def _with_disk(described: dict[str, Any], out: Path) -> dict[str, Any]:
    """A planned cut with its disk as every dry run prints it, before its files."""
    from ..storage import free_bytes

    write, size = described.pop("write"), described.pop("bytes", 0)
    fetched = described.pop("fetch_bytes", 0)
    fetch = {"fetch": format_size(fetched)} if fetched else {}
    taken = {"disk": disk(size, free_bytes(out))} if size else {}
    return {**described, **fetch, **taken, "write": write}


def _written_at(done: dict[str, Any], out: Path) -> dict[str, Any]:
    """Name the files of an earlier cut by the place as it is given now."""
    files = done["written"]
    if isinstance(files, str):
        return {**done, "written": str(out)}
    return {**done, "written": [str(out.with_name(Path(name).name)) for name in files]}


def _end(done: dict[str, Any], source: Path, out: Path, as_json: bool) -> None:
    """Print a cut, from its JSON values."""
    if as_json:
        print_json(done)
        return
    from ..cutting.checkpoint_files import stored_bytes
    from ..reporting.stories.stages import plan_table
    from ..reporting.words import dequantised
    from ..values.plan import Plan

    difference, written = done["max_logits_difference"], done["written"]
    said = [] if difference is None else [f"logits differ by at most {difference:.2g}"]
    files = [written] if isinstance(written, str) else written
    plan = Plan.from_json(done)
    if plan.states:
        said += [plan.why, "the states are those of the whole model, to the bit"]
    if source.suffix == ".gguf" and out.is_dir() and (left := stored_bytes(out)):
        said.append(dequantised(source.name, stored_bytes(source) or 0, left, blocks=plan.blocks))
    show(plan_table(plan), *said, *(f"wrote {path}" for path in files))
    if out.suffix != ".gguf":
        show(upload_line(out))
