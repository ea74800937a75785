"""``shallower eval``."""

from typing import TYPE_CHECKING, Any

from ..models.source import ModelSource
from .options import (
    BatchSize,
    DeviceMap,
    DeviceMemory,
    Drop,
    DryRun,
    Dtype,
    GgufFile,
    Json,
    MaxLength,
    MaxTexts,
    Model,
    NoCache,
    PlanPath,
    TextsSource,
    TrustRemoteCode,
    load,
    named_layers,
    read_texts,
)
from .output import print_json, say_dry_run, say_known, show

if TYPE_CHECKING:
    from ..runs.evaluate import MeasuredLoss
    from ..values.loss import Loss
    from ..values.memory import MemoryPlan
    from ..values.plan import Plan


def eval_command(
    model: Model,
    *,
    texts: TextsSource,
    drop: Drop = None,
    plan: PlanPath = None,
    dtype: Dtype = "auto",
    max_length: MaxLength = 256,
    batch_size: BatchSize = "auto",
    max_texts: MaxTexts = None,
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    device_memory: DeviceMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    no_cache: NoCache = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure the next-token loss, before and after a cut."""
    from ..runs.cache import open_cache
    from ..runs.evaluate import EvalJob
    from ..values.tokens import Tokens, parse_batch_size

    tokens = Tokens(max_length, parse_batch_size(batch_size))
    held_out = list(read_texts(texts, max_texts))
    named = None if drop is None and plan is None else named_layers(drop, plan)
    job = EvalJob(
        source=ModelSource(model, dtype, device_map, gguf_file, trust_remote_code),
        texts=held_out,
        layers=named,
        tokens=tokens,
        device_memory=device_memory,
        cache=open_cache(no_cache or dry_run),
    )
    wanted = job.plan
    if dry_run:
        say_dry_run(_described(job.source, texts, wanted, job.memory(job.source)), as_json)
        return
    measured = job.known() or job.measure(*load(job.source))
    losses = {name: one.loss for name, one in measured.items()}
    _say(losses, wanted, measured["base"].model.dtype, as_json=as_json)
    say_known_losses(measured)


def say_known_losses(measured: "dict[str, MeasuredLoss]") -> None:
    """Say on standard error which losses were measured before."""
    made = [one.made for one in measured.values() if one.made]
    if made:
        what = "" if len(made) == len(measured) else "one of the losses was "
        say_known(min(made), what=what)


def _described(
    source: ModelSource, texts: str, wanted: "Plan | None", memory: "MemoryPlan"
) -> dict[str, Any]:
    from ..values.layers import ranges

    described: dict[str, Any] = {"eval": str(source)}
    if wanted:
        described["drop"] = ranges(wanted.dropped)
    return {**described, "texts": texts, "memory": memory}


def _say(losses: "dict[str, Loss]", wanted: "Plan | None", dtype: str, *, as_json: bool) -> None:
    from ..values.layers import ranges

    lost = losses["cut"].minus(losses["base"]) if "cut" in losses else None
    if as_json:
        described: dict[str, Any] = {name: loss.to_json() for name, loss in losses.items()}
        if lost:
            described["difference"] = lost.to_json()
        described["dtype"] = dtype
        if wanted:
            described["drop"] = [block.to_json() for block in wanted.blocks]
        print_json(described)
        return
    for name, loss in losses.items():
        layers = f"without {ranges(wanted.dropped)}" if wanted and name == "cut" else "all layers"
        show(
            f"{layers}: {loss} nats a token ({loss.normalized:.4f} of ln vocabulary), "
            f"{loss.num_tokens} tokens of {loss.num_texts} texts"
            + (f", {loss.num_rejected} texts rejected" if loss.num_rejected else "")
        )
    if lost:
        tie = "; a tie, within two standard errors" if lost.tied else ""
        show(f"difference: {lost} nats a token, paired by text{tie}")
    show(f"weights: {dtype}")
