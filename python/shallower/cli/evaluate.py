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
    PlanPath,
    TextsSource,
    TrustRemoteCode,
    load,
    named_layers,
    read_texts,
)
from .output import print_json, say_dry_run, show

if TYPE_CHECKING:
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
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure the next-token loss, before and after a cut."""
    from ..cutting.plans import agreed_plan
    from ..values.tokens import Tokens, parse_batch_size

    tokens = Tokens(max_length, parse_batch_size(batch_size))
    held_out = list(read_texts(texts, max_texts))
    source = ModelSource(model, dtype, device_map, gguf_file, trust_remote_code)
    wanted = None
    if drop is not None or plan is not None:
        named = named_layers(drop, plan)
        wanted = agreed_plan(model, source.count_layers(), named)
    if dry_run or device_memory is not None:
        from ..runs.forecast import forecast_source

        loaded_as = source if dry_run else source.resolved()
        memory = forecast_source(loaded_as, "eval", tokens, device_memory=device_memory)
        tokens = Tokens(max_length, memory.micro_batch)
        if dry_run:
            say_dry_run(_described(source, texts, wanted, memory), as_json)
            return
    loaded, tokenizer = load(source)
    from ..cutting.memory import without_layers
    from ..evaluation.loss import fitting_tokens, measure_loss
    from ..models.decoder import Decoder
    from ..values.layers import ranges

    decoder = Decoder.of(loaded)
    tokens = fitting_tokens(decoder, tokens)
    if wanted:
        wanted.check_model(decoder.identity)
    losses = {"base": measure_loss(decoder, tokenizer, held_out, tokens=tokens)}
    if wanted:
        with without_layers(loaded, wanted.blocks):
            losses["cut"] = measure_loss(
                decoder, tokenizer, held_out, tokens=tokens,
                description=f"loss without {ranges(wanted.dropped)}",
            )  # fmt: skip
    _say(losses, wanted, decoder.identity.dtype, as_json=as_json)


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
