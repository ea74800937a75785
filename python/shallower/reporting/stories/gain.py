"""The table of what a cut saves, before and after."""

from collections.abc import Iterator
from statistics import median

from ...results.gain import Forecast, Gain, MeasuredGain
from ...savings.devices import HERE
from ...values.counts import counted
from ..story import Table

Row = tuple[str, str, str, str]
"""A name, before, after, and their ratio."""


def gain_table(gain: Gain) -> Table:
    """Tabulate what a cut saves: sizes, two rows for every device, and what was measured."""
    texts = "one text" if gain.batch == 1 else counted(gain.batch, "text")
    rows = [*_sizes(gain)]
    for one in gain.forecasts:
        rows += _times(one)
    fits = all(one.fits_before and one.fits_after for one in gain.forecasts)
    note = f"Times: estimates by the roofline{'' if fits else '; * does not fit into the memory'}."
    note += "".join(f" This machine: {one.source}." for one in gain.forecasts if one.device == HERE)
    if gain.measured is not None:
        rows += _measured(gain.measured)
        note += (
            f" Measured: medians of {counted(len(gain.measured.decode_before), 'turn')}; ratio: "
            f"median, least and greatest of the turns' own, too noisy around 1."
        )
    return Table(
        f"What it gains: {gain.model} without {gain.words}, "
        f"{texts} of {counted(gain.context, 'token')} in {gain.dtype}",
        ("what", "before", "after", "ratio"),
        tuple(rows),
        note,
    )


def _sizes(gain: Gain) -> Iterator[Row]:
    for label, name, write in (
        ("layers", "num_layers", str),
        ("parameters", "parameters", _count),
        ("weights", "weight_bytes", _bytes),
        ("KV cache a token", "kv_bytes_per_token", _bytes),
        ("KV cache", "kv_bytes", _bytes),
        ("FLOPs, prefill", "prefill_flops", _count),
        ("FLOPs, token", "decode_flops", _count),
    ):
        before, after = (write(getattr(size, name)) for size in (gain.before, gain.after))
        ratio = gain.ratios().get(name)
        yield label, before, after, "-" if ratio is None else f"{ratio:.3f}"


def _times(one: Forecast) -> Iterator[Row]:
    for phase, early, late in (
        ("prefill", one.prefill_before, one.prefill_after),
        ("token", one.decode_before, one.decode_after),
    ):
        before, after = _time(early, one.fits_before), _time(late, one.fits_after)
        yield f"{one.title}, {phase}", before, after, f"{late / early:.3f}"


def _measured(found: MeasuredGain) -> Iterator[Row]:
    for phase, early, late, ratio in (
        ("prefill", found.prefill_before, found.prefill_after, found.prefill_ratio),
        ("token", found.decode_before, found.decode_after, found.decode_ratio),
    ):
        middle, least, most = ratio
        words = f"[{least:.3f}, {most:.3f}]"
        words = f"too noisy {words}" if least <= 1 <= most else f"{middle:.3f} {words}"
        yield f"measured here, {phase}", _time(median(early)), _time(median(late)), words
    before, after = found.peak_before, found.peak_after
    yield "measured here, peak memory", _bytes(before), _bytes(after), f"{after / before:.3f}"


def _short(value: int, units: str) -> str:
    """Write a number with three digits and a unit of thousands: 6.74B."""
    power = 0
    while value >= 999.5 * 1000**power and power < len(units):
        power += 1
    digits = f"{value / 1000**power:.3g}"
    return digits + units[power - 1] if power else digits


def _count(value: int) -> str:
    return _short(value, "KMBT")


def _bytes(value: int) -> str:
    return _short(value, "KMGT") + "B"


def _time(seconds: float, fits: bool = True) -> str:
    milliseconds = 1e3 * seconds
    text = f"{milliseconds:.2f} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"
    text = f"{seconds:.1f} s" if seconds >= 10 else text
    return text if fits else f"{text} *"
