"""The one door of cuts: on disk, in memory, or a GGUF file directly.

A cut is planned first (:func:`plan_prune`), with every refusal made, and then carried out.
torch is loaded only where a model is.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import (
    InMemoryOnlyError,
    MissingExtraError,
    ModelError,
    OutputError,
    naming_extras,
)
from ..models.dtypes import DeviceMap, Dtype, check_dtype
from ..progress import BytesProgress, track
from ..storage import check_apart, check_free, check_room, claimed
from ..values.files import PLAN_FILE
from ..values.layers import drop_option, ranges
from ..values.plan import Plan
from .checkpoint import prepare
from .exports import export_files
from .from_hub import open_on_hub
from .gguf import plan_gguf, prepare_gguf
from .plans import (
    NamedExperts,
    NamedLayers,
    agreed_plan,
    experts_path,
    load_experts,
    load_plan,
    plan_file,
)
from .request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Way = Literal["disk", "memory", "gguf"]

_SAVED = ("config.json", "generation_config.json", "model*.safetensors", "tokenizer*")
"""The files that transformers writes, as patterns: how many shards is not known before."""


def prune(
    source: str | Path,
    what: NamedLayers | str | Path,
    out: str | Path,
    *,
    experts: NamedExperts | None = None,
    overwrite: bool = False,
    dtype: Dtype | None = None,
    max_shard_size: int | str | None = None,
    device_map: DeviceMap = None,
    gguf_file: str | None = None,
    as_gguf: bool = False,
    trust_remote_code: bool = False,
    verify: bool = False,
    text_only: bool = False,
    progress: BytesProgress | bool | None = None,
) -> Plan:
    """Drop layers or experts from a model, and save a standard checkpoint with the plan beside it.

    A folder of safetensors is cut on disk, without loading it, unless ``dtype`` is another
    than the stored one; after an interruption the same call continues. So is a hub model of
    safetensors, of which only what stays is fetched. A GGUF file is cut directly into a GGUF file.
    Any other model is loaded, cut in memory and saved.

    Args:
        source: a local folder, a hub id, or a ``.gguf`` file.
        what: a plan, the path of a saved one or of its folder, or blocks, ranges or indices to
            drop, 0-based; ``()`` if only ``experts`` go. Or :class:`ForStates`, which drops all
            layers that some hidden states do not need. These states are compared with those of the
            whole model, to the bit, after a stock reload. A cut that differs is not kept.
        out: a folder that does not exist yet, or is empty; or a ``.gguf`` file, which only a GGUF
            file is cut into.
        experts: routed experts that go of the layers that stay: by layer, 0-based, their indices;
            a text of them, as ``0:3,5;1:2,7``, or a file with a layer a line; or a plan that drops
            nothing else, or its folder. As many of every layer that has any.
        overwrite: replace an earlier output at ``out``, once the new files are complete.
        dtype: of the weights; by default as stored in safetensors, else bfloat16.
        max_shard_size: bytes of tensors in a file at most, as a number or as ``5GB``, which is
            the default; for cuts on disk.
        device_map: where the model is loaded, as transformers takes it.
        gguf_file: a GGUF file in the folder or repository ``source``.
        as_gguf: ``out`` is a folder, which gets ``NAME.gguf`` and a ``README.md`` as the hub shows
            it; for a GGUF file.
        trust_remote_code: run code that comes with the model.
        verify: reload the cut with stock transformers and compare its logits with those of the
            source without its layers; a hub model is fetched whole, as for states.
        text_only: save the text part alone, as the causal class of its family, which is loaded:
            without towers, heads of more tokens and their config.
        progress: a function of the bytes copied and the bytes in all, or whether to show a bar;
            by default if standard error is a terminal.

    Returns:
        The plan that was carried out, as it is saved in ``shallower_plan.json``.

    Raises:
        LayersError: a layer that is not there, is named twice, or is the last one left.
        ExpertsError: experts that are not there, or that a router cannot do without.
        PlanError: a plan that is damaged, or was made for another model.
        ModelError: a model that is not there, is damaged or incomplete, or cannot be described
            without these layers; options that do not go together; with ``verify``, logits that
            differ; with :class:`ForStates`, a state that does.
        OutputError: something is at ``out`` already, or it cannot be written to.
        MissingExtraError: a package is needed that is not installed.

    Example:
        >>> plan = sh.prune("HuggingFaceTB/SmolLM2-135M", [range(12, 20)], "smol-cut")
        >>> len(plan.survivors)
        22
        >>> again = sh.prune("model.gguf", plan.blocks, "cut.gguf")
        >>> plan = sh.prune("mixture", (), "mixture-cut", experts={0: [3, 5], 1: [2, 7]})
    """
    planned = plan_prune(
        source,
        what,
        out,
        experts=experts,
        overwrite=overwrite,
        dtype=dtype,
        max_shard_size=max_shard_size,
        device_map=device_map,
        gguf_file=gguf_file,
        as_gguf=as_gguf,
        trust_remote_code=trust_remote_code,
        verify=verify,
        text_only=text_only,
        progress=progress,
    )
    return planned.run(progress).plan


@naming_extras("a cut that loads the model")
def plan_prune(  # noqa: D417
    source: str | Path,
    what: NamedLayers | str | Path,
    out: str | Path,
    *,
    experts: NamedExperts | None = None,
    progress: BytesProgress | bool | None = None,
    **options: Any,
) -> "PlannedPrune":
    """Plan what :func:`prune` would do, and write nothing.

    Args:
        source, what, out, experts: as for :func:`prune`.
        progress: whether to show what is fetched to plan, of a hub model.
        **options: all other arguments of :func:`prune`.

    Returns:
        The planned work, its way and the files; ``run()`` carries it out.

    Raises:
        LayersError, ExpertsError, PlanError, ModelError, OutputError, MissingExtraError: as
            :func:`prune`, except what needs the weights.
    """
    local = Path(source).expanduser()
    request = Request(
        # A folder by its own name, also where it is named ``.`` or by a link.
        source=str(local.resolve() if local.is_dir() else source),
        named=str(source),
        out=Path(out),
        show=False if callable(progress) else progress,
        **options,
    )
    if request.dtype is not None:
        check_dtype(request.dtype)
    reads: list[Path | None] = [Path(source, request.gguf_file or "")]
    if isinstance(what, str | Path):
        reads.append(plan_file(what))
        what = load_plan(what)
    if isinstance(experts, str | Path):
        reads.append(experts_path(experts))
        experts = load_experts(experts)
    check_apart(request.out, reads)
    if local.suffix == ".gguf" and not request.to_gguf and find_spec("torch") is None:
        file = request.out.with_name(f"{request.out.name}.gguf")
        cheaper = f"(--out {file} cuts the file itself, without it)"
        raise MissingExtraError("torch", "gguf", f"a GGUF file as the folder {out} {cheaper}")
    make = _plan_gguf if request.to_gguf else _plan_folder
    planned = make(request, what, experts)
    for file in planned.files:
        check_apart(file, reads)
    check_room(request.out, planned.num_bytes)
    if planned.loads_model and find_spec("torch") is None:
        raise MissingExtraError("torch", "model", _loading_for(planned.plan))
    return planned


def _loading_for(plan: Plan) -> str:
    """What a model is loaded for; of states with the way out."""
    if not plan.states:
        return "dtype (--dtype) or verify (--verify)"
    drop = drop_option(plan.blocks)
    return f"comparing states (--for-states; --drop {drop} makes the same cut, not compared)"


@dataclass(frozen=True, slots=True)
class Pruned:
    """The outcome of a cut."""

    plan: Plan  # with the identity of the model
    written: tuple[Path, ...]  # the folder, or all files of a GGUF cut
    difference: float | None = None  # of the logits, the greatest, if verified

    def to_json(self) -> dict[str, Any]:
        """The plan and its outcome as plain JSON values."""
        written = [str(path) for path in self.written]
        return {
            **self.plan.to_json(),
            "max_logits_difference": self.difference,
            "written": written[0] if len(written) == 1 else written,
        }


@dataclass(frozen=True, slots=True)
class PlannedPrune:
    """A cut that is planned, with every refusal made that needs no weights."""

    way: Way
    plan: Plan
    files: tuple[Path, ...]  # to be written; in memory, patterns of their names
    num_bytes: int  # of weights; in memory about, and 0 without torch
    _request: Request
    _write: Callable[..., None] | None = None
    fetch_bytes: int = 0  # of weights still on the hub; all if the cut is verified

    @property
    def loads_model(self) -> bool:
        """True if the model is loaded, which takes torch and memory."""
        return self.way == "memory" or self._request.verify or bool(self.plan.states)

    def to_json(self) -> dict[str, Any]:
        """The planned work as plain JSON values."""
        size = {"bytes": self.num_bytes} if self.num_bytes else {}
        fetch = {"fetch_bytes": self.fetch_bytes} if self.fetch_bytes else {}
        experts = self.plan.experts
        dropped = {} if experts is None else {"drop_experts": str(experts)}
        why = {"why": self.plan.why} if self.plan.states else {}
        return {
            "prune": self._request.named,
            "drop": ranges(self.plan.dropped),
            "keep": ranges(self.plan.survivors),
            **dropped,
            **why,
            **size,
            **fetch,
            "write": [str(path) for path in self.files],
        }

    def run(self, progress: BytesProgress | bool | None = None) -> Pruned:
        """Make the cut, and verify what was asked for; raises what :func:`prune` does."""
        with claimed(self._request.out, self._request.overwrite, self.num_bytes):
            return self._run(progress)

    def _run(self, progress: BytesProgress | bool | None) -> Pruned:
        request, plan, on_disk = self._request, self.plan, self.way == "disk"
        show = False if callable(progress) else progress
        # Before the cut: what cannot be loaded is found before the work.
        loaded = request.load(progress) if self.loads_model and not on_disk else None
        check = self._states_check(loaded, progress) if plan.states else lambda _: None
        if self._write is not None:
            self._write(overwrite=request.overwrite, progress=progress, check=check)
        elif loaded is not None:
            with track("save the cut", show=show):
                plan = request.cut_in_memory(*loaded, plan, check=check)
        written = self.files if request.out.suffix == ".gguf" else (request.out,)
        if not request.verify:
            return Pruned(plan, written)
        from .saving import verify_checkpoint

        cut = self.files[0] if self.way == "gguf" else request.out
        loaded = loaded or request.load(progress, as_stored=on_disk)
        with track("verify the cut", show=show):
            return Pruned(plan, written, verify_checkpoint(*loaded, cut, layers=plan))

    def _states_check(
        self, loaded: "tuple[PreTrainedModel, Any] | None", progress: BytesProgress | bool | None
    ) -> Callable[[Path], None]:
        """Read the states of the whole model, which may be loaded already; gives what compares."""
        from .saving import states_check

        whole = loaded[0] if loaded else self._request.load_alone(progress)
        show, out = self._request.show, self._request.out
        return states_check(whole, self.plan.states, out=out, show=show)


def _plan_gguf(request: Request, layers: NamedLayers, experts: NamedExperts | None) -> PlannedPrune:
    """A GGUF file into a GGUF file."""
    refused = {
        "dtype": request.dtype,
        "max_shard_size": request.max_shard_size,
        "device_map": request.device_map,
        "trust_remote_code": request.trust_remote_code or None,
        "text_only": request.text_only or None,
    }
    path = request.gguf_path
    for name, value in refused.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}"
            raise ModelError(
                f"{name}={value!r} or {option} does not go with a GGUF file as out (--out), which "
                f"is cut without being loaded: leave it out, or name a folder as out",
                see="gguf",
            )
    if experts is not None:
        layers = plan_gguf(path, layers, experts)
    cut = prepare_gguf(path, layers, request.out)
    cut.check_free(request.overwrite)
    return PlannedPrune("gguf", cut.plan, tuple(cut.files), cut.num_bytes, request, cut.write)


def _plan_folder(
    request: Request, layers: NamedLayers, experts: NamedExperts | None
) -> PlannedPrune:
    """Into a folder of safetensors: on disk where that can be, else in memory."""
    out = request.out
    check_free(out, request.overwrite)
    remote = open_on_hub(request)
    stored = request if remote is None else replace(request, source=str(remote.folder))
    with ExitStack() as refused:
        if remote is not None and not remote.goes_on:
            refused.callback(remote.remove)
        cut = None
        with suppress(InMemoryOnlyError):
            if stored.on_disk:
                cut = prepare(
                    stored.source,
                    layers,
                    experts=experts,
                    label=request.named,
                    max_shard_size=request.max_shard_size,
                    trust_remote_code=request.trust_remote_code,
                    fetch=None if remote is None else remote.fetch,
                )
        refused.pop_all()
    if cut is not None:
        files = tuple(out / name for name in cut.files)
        write = partial(cut.write, out) if remote is None else partial(remote.make, cut, out)
        left = 0
        if remote is not None:
            whole = sum(remote.sizes.values())  # which is loaded to be compared
            left = remote.missing_bytes(cut.reads) + whole * request.verify
            left = whole if cut.plan.states else left
        loaded = replace(request, dtype=stored.stored_plainly)  # from there, to verify the cut
        return PlannedPrune("disk", cut.plan, files, cut.num_bytes, loaded, write, left)
    if remote is not None:
        remote.remove()
    plan = agreed_plan(
        request.named,
        request.count_layers(),
        layers,
        experts=experts,
        count_experts=request.count_experts,
    )
    if request.max_shard_size is not None:
        raise OutputError(
            "max_shard_size or --max-shard-size goes with a folder of safetensors that is cut as "
            "it is stored: leave it out, or leave out dtype (--dtype)"
        )
    files = tuple(out / name for name in (*_SAVED, PLAN_FILE, *export_files(plan)))
    num_bytes = request.saved_bytes(plan) if find_spec("torch") else 0
    return PlannedPrune("memory", plan, files, num_bytes, request)
