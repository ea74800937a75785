"""``shallower gain``: what a cut saves, forecast and measured."""

from typing import Annotated, Any

from ..models.dtypes import QUANTISED, stored_quantisation
from ..models.source import ModelSource
from ..savings.devices import DEVICES, HERE
from ..settings.options import Option
from .options import Cut, Json, Loading, Model
from .output import print_json, show


def gain_command(
    *,
    model: Model,
    cut: Cut,
    device: Annotated[
        str | None,
        Option(
            f"Device of the forecast: {', '.join(DEVICES)}, or {HERE} for this machine; all of "
            "them by default.",
            "NAME",
            name="forecast_device",
        ),
    ] = None,
    context: Annotated[
        int | None,
        Option(
            "Tokens of a text before it is continued; by default 2,048, or as many as the model "
            "has learned positions for.",
            "N",
            "measures",
            least=1,
        ),
    ] = None,
    batch: Annotated[int, Option("Texts in one forward.", "N", "measures", least=1)] = 1,
    measure: Annotated[
        bool, Option("Load the model, and time it here with and without them.")
    ] = False,
    loading: Annotated[Loading, "dtype", "gguf_file", "trust_remote_code"],
    as_json: Json = False,
) -> None:
    """Count and forecast what a cut saves, by the config alone.

    Parameters, bytes of weights and of keys and values, operations, and the time of a
    prefill and of a token by the roofline of a device. No weight is read without
    --measure. --dtype auto is bfloat16, with --measure or --forecast-device here
    that in which the model would be loaded here.
    """
    from ..forecasts.gain import gain

    layers, experts = cut.read_all()
    found = gain(
        model,
        layers,
        experts=experts,
        device=device,
        context=context,
        batch=batch,
        measure=measure,
        dtype=loading.dtype,
        gguf_file=loading.gguf_file,
        trust_remote_code=loading.trust_remote_code,
    )
    if as_json:
        print_json(found.to_json())
        return
    from ..cutting.checkpoint_files import stored_bytes
    from ..models.loading import read_config
    from ..reporting.stories.stages import gain_table
    from ..reporting.words import megabytes

    parts: list[Any] = [gain_table(found)]
    place = ModelSource(model, gguf_file=loading.gguf_file).place
    config = read_config(model, loading.gguf_file, loading.trust_remote_code)
    stored = stored_quantisation(getattr(config, "quantization_config", None))
    is_plain = found.dtype not in QUANTISED
    if is_plain and (stored or place.suffix == ".gguf") and (size := stored_bytes(place)):
        parts.append(
            f"{place.name} has {megabytes(size)} of quantised weights: they count here as they "
            f"are dequantised, in {found.dtype}"
        )
    show(*parts)
