"""``shallower gain``: what a cut saves, forecast and measured."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ..models.dtypes import QUANTISED, stored_quantisation
from ..models.source import ModelSource
from ..savings.devices import DEVICES, HERE
from .options import Cut, Dtype, GgufFile, Joined, Json, Model, TrustRemoteCode, joined
from .output import print_json, show


@dataclass(frozen=True, kw_only=True)
class Gaining(Joined):
    """What is counted and forecast, and how the model is read."""

    device: Annotated[
        str | None,
        typer.Option(
            "--forecast-device",
            metavar="NAME",
            help=f"Device of the forecast: {', '.join(DEVICES)}, or {HERE} for this machine; "
            "all of them by default.",
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens of a text before it is continued; by default 2,048, or as many as the "
            "model has learned positions for.",
        ),
    ] = None
    batch: Annotated[int, typer.Option(metavar="N", help="Texts in one forward.", min=1)] = 1
    dtype: Dtype = "auto"
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Load the model, and time it here with and without them."),
    ] = False
    gguf_file: GgufFile = None
    trust_remote_code: TrustRemoteCode = False


@joined
def gain_command(*, model: Model, cut: Cut, asked: Gaining, as_json: Json = False) -> None:
    """Count and forecast what a cut saves, by the config alone.

    Parameters, bytes of weights and of keys and values, operations, and the time of a
    prefill and of a token by the roofline of a device. No weight is read without
    --measure. --dtype auto is bfloat16, with --measure or --forecast-device here
    that in which the model would be loaded here.
    """
    from ..forecasts.gain import gain

    layers, experts = cut.read_all()
    found = gain(model, layers, experts=experts, **vars(asked))
    if as_json:
        print_json(found.to_json())
        return
    from ..models.loading import read_config
    from ..reporting.stories.gain import gain_table
    from ..reporting.words import megabytes
    from ..savings.weights import stored_bytes

    parts: list[Any] = [gain_table(found)]
    place = ModelSource(model, gguf_file=asked.gguf_file).place
    config = read_config(model, asked.gguf_file, asked.trust_remote_code)
    stored = stored_quantisation(getattr(config, "quantization_config", None))
    is_plain = found.dtype not in QUANTISED
    if is_plain and (stored or place.suffix == ".gguf") and (size := stored_bytes(place)):
        parts.append(
            f"{place.name} has {megabytes(size)} of quantised weights: they count here as they "
            f"are dequantised, in {found.dtype}"
        )
    show(*parts)
