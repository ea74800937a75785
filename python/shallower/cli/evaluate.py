"""``shallower eval``."""

from typing import Any

from ..texts.sources import Texts
from ..values.layers import ranges
from .options import (
    BatchSize,
    DeviceMap,
    Drop,
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
    wanted_plan,
)
from .output import print_json, show


def eval_command(
    model: Model,
    *,
    texts: TextsSource,
    drop: Drop = None,
    plan: PlanPath = None,
    dtype: Dtype = "bfloat16",
    max_length: MaxLength = 256,
    batch_size: BatchSize = 8,
    max_texts: MaxTexts = None,
    device_map: DeviceMap = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure the next-token loss, before and after a cut."""
    from ..cutting.memory import without_layers
    from ..evaluation.loss import evaluate_loss
    from ..models.identity import identify
    from ..models.loading import count_layers

    held_out = list(Texts(texts, max_texts))
    wanted = None
    if drop is not None or plan is not None:
        total = count_layers(model, gguf_file, trust_remote_code)
        wanted = wanted_plan(model, drop, plan, total)
    loaded, tokenizer = load(model, dtype, device_map, gguf_file, trust_remote_code)
    options: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size}
    if wanted:
        wanted.check_model(identify(loaded))
    losses = {"base": evaluate_loss(loaded, tokenizer, held_out, **options)}
    if wanted:
        with without_layers(loaded, wanted.blocks):
            options["description"] = f"loss without {ranges(wanted.dropped)}"
            losses["cut"] = evaluate_loss(loaded, tokenizer, held_out, **options)
    if as_json:
        described: dict[str, Any] = {name: loss.to_json() for name, loss in losses.items()}
        if wanted:
            described["drop"] = [block.to_json() for block in wanted.blocks]
        print_json(described)
        return
    for name, loss in losses.items():
        cut = f"without {ranges(wanted.dropped)}" if wanted else ""
        what = cut if name == "cut" else "all layers"
        show(
            f"{what}: {loss} nats a token ({loss.normalized:.4f} of ln vocabulary), "
            f"{loss.num_tokens} tokens of {loss.num_texts} texts"
            + (f", {loss.num_rejected} texts rejected" if loss.num_rejected else "")
        )
