"""The table of what a cut saves: before, after, and their ratio."""

from collections.abc import Iterator
from statistics import median

from rich.table import Table

from ..values.gain import Forecast, Gain, Measured
from ..values.layers import ranges


def gain_table(gain: Gain) -> Table:
    """Tabulate what a cut saves.

    Args:
        gain: sizes, forecasts and measurements.

    Returns:
        A table with a row for every size, and two for every device.
    """
    texts = "1 text" if gain.batch == 1 else f"{gain.batch} texts"
    table = Table(
        title=f"{gain.model} without {ranges(gain.dropped)}\n"
        f"{gain.dtype}, {texts} of {gain.context:,} tokens",
        caption="times by the roofline; * does not fit into the device's memory. measured: "
        "medians, and the range of the paired ratios",
    )
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))

    for label, *told in _sizes(gain):
        table.add_row(label, *told)
    for one in gain.forecasts:
        table.add_section()
        for label, *told in _times(one):
            table.add_row(label, *told)
    if gain.measured is not None:
        _add_measured(table, gain.measured)
    return table


def gain_rows(gain: Gain) -> list[tuple[str, str, str, str]]:
    """Give the sizes and forecasts of a gain as text.

    Args:
        gain: sizes and forecasts.

    Returns:
        A name, before, after, and their ratio, row by row.
    """
    return [*_sizes(gain), *(row for one in gain.forecasts for row in _times(one))]


def _sizes(gain: Gain) -> Iterator[tuple[str, str, str, str]]:
    for label, name, write in (
        ("layers", "num_layers", str), ("parameters", "parameters", _count),
        ("weights", "weight_bytes", _bytes), ("KV cache a token", "kv_bytes_per_token", _bytes),
        ("KV cache", "kv_bytes", _bytes), ("FLOPs, prefill", "prefill_flops", _count),
        ("FLOPs, token", "decode_flops", _count),
    ):  # fmt: skip
        before, after = (write(getattr(size, name)) for size in (gain.before, gain.after))
        ratio = gain.ratios().get(name)
        yield label, before, after, "-" if ratio is None else f"{ratio:.3f}"


def _times(one: Forecast) -> Iterator[tuple[str, str, str, str]]:
    for phase, early, late in (
        ("prefill", one.prefill_before, one.prefill_after),
        ("token", one.decode_before, one.decode_after),
    ):
        before, after = _time(early, one.fits_before), _time(late, one.fits_after)
        yield f"{one.title}, {phase}", before, after, f"{late / early:.3f}"


def _add_measured(table: Table, found: Measured) -> None:
    table.add_section()
    for phase, early, late, ratio in (
        ("prefill", found.prefill_before, found.prefill_after, found.prefill_ratio),
        ("token", found.decode_before, found.decode_after, found.decode_ratio),
    ):
        middle, least, most = ratio
        table.add_row(
            f"measured here, {phase}", _time(median(early)), _time(median(late)),
            f"{middle:.3f} [{least:.3f}, {most:.3f}]",
        )  # fmt: skip
    peaks = found.peak_before, found.peak_after
    table.add_row("measured here, peak memory", *map(_bytes, peaks), f"{peaks[1] / peaks[0]:.3f}")


def _short(value: int, units: str) -> str:
    """A number with three digits and a unit of thousands: 6.74B."""
    power = 0
    while value >= 999.5 * 1000**power and power < len(units):
        power += 1
    told = f"{value / 1000**power:.3g}"
    return told + units[power - 1] if power else told


def _count(value: int) -> str:
    return _short(value, "KMBT")


def _bytes(value: int) -> str:
    return _short(value, "KMGT") + "B"


def _time(seconds: float, fits: bool = True) -> str:
    milliseconds = 1e3 * seconds
    told = f"{milliseconds:.2f} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"
    return told if fits else f"{told} *"
