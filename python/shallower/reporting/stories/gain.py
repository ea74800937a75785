"""The tables of what a cut saves, before and after, and of what it brings as a draft."""

from collections.abc import Iterator
from statistics import median

from ...values.counts import counted
from ...values.draft import LONGEST, WORTHWHILE, Draft
from ...values.gain import Forecast, Gain, Measured
from ..story import Cell, Number, Table

Row = tuple[str, str, str, str]
"""A name, before, after, and their ratio."""


def gain_table(gain: Gain) -> Table:
    """Tabulate what a cut saves: sizes, two rows for every device, and what was measured."""
    texts = "one text" if gain.batch == 1 else counted(gain.batch, "text")
    rows = [*_sizes(gain)]
    for one in gain.forecasts:
        rows += _times(one)
    note = "Times by the roofline; * does not fit into the device's memory."
    if gain.measured is not None:
        rows += _measured(gain.measured)
        note += " Measured: medians, and the range of the paired ratios."
    return Table(
        f"What it gains: {gain.model} without {gain.words}, "
        f"{texts} of {counted(gain.context, 'token')} in {gain.dtype}",
        ("", "before", "after", "ratio"),
        tuple(rows),
        note,
    )


def draft_table(gain: Gain) -> Table:
    """Tabulate what the cut costs and brings as a draft of its own parent, a row a device."""
    known = gain.acceptance is not None
    names = (
        ("length", "speed-up") if known else (f"{WORTHWHILE - 1:.0%} faster".replace("%", " %"),)
    )
    both = gain.before.memory + gain.after.memory
    titles = {
        one.device: one.title if both <= one.memory else f"{one.title} *" for one in gain.forecasts
    }
    rows: list[tuple[Cell, ...]] = [
        (titles.get(name, "measured here"), *_draft_cells(draft, known))
        for name, draft in gain.drafts().items()
    ]
    title = "As a draft of its own parent"
    if known:
        accepted = Number.of(gain.acceptance, gain.acceptance_stderr)
        title += f", which accepts {accepted.text} of its tokens"
    told = (
        "the speed-up is that of the best length"
        if known
        else "--acceptance tells its length and speed-up"
    )
    note = (
        f"Cost: its time of a token by that of the whole model, which is taken to read a draft of "
        f"up to {LONGEST} tokens in the time of one. A draft pays where more of its tokens are "
        f"accepted than the break-even share; {told}."
    )
    if any(title.endswith("*") for title in titles.values()):
        note += " * does not hold both models."
    return Table(title, ("", "cost", "break-even", *names), tuple(rows), note)


def draft_lines(gain: Gain) -> tuple[str, ...]:
    """Give the lines that load the cut as a draft, by transformers, vLLM and llama.cpp.

    None where no draft pays; N stands for its length where that is not one and the same.
    """
    drafts = gain.drafts().values()
    lengths = {draft.length for draft in drafts if draft.break_even is not None} - {0}
    if not lengths:
        return ()
    (length,) = lengths if len(lengths) == 1 else (None,)
    tokens = "N" if length is None else str(length)
    return (
        "# as a draft: transformers, vLLM, llama.cpp",
        f"cut.generation_config.num_assistant_tokens = {tokens}",
        "whole.generate(**inputs, assistant_model=cut)",
        "vllm serve WHOLE --speculative-config \\\n"
        f'    \'{{"model": "CUT", "num_speculative_tokens": {tokens}, "method": "draft_model"}}\'',
        "llama-server -m WHOLE.gguf -md CUT.gguf \\\n"
        f"    --spec-type draft-simple --spec-draft-n-max {tokens}",
    )


def _draft_cells(draft: Draft, known: bool) -> tuple[Number, ...]:
    cost, break_even = Number.of(draft.cost), _share(draft.break_even)
    if not known:
        return cost, break_even, _share(draft.worthwhile)
    length = Number.count(draft.length) if draft.length else Number("no draft", 0.0)
    return cost, break_even, length, Number.of(draft.speedup, draft.speedup_stderr, 2)


def _share(acceptance: float | None) -> Number:
    return Number("never") if acceptance is None else Number.share(acceptance, 1)


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


def _measured(found: Measured) -> Iterator[Row]:
    for phase, early, late, ratio in (
        ("prefill", found.prefill_before, found.prefill_after, found.prefill_ratio),
        ("token", found.decode_before, found.decode_after, found.decode_ratio),
    ):
        middle, least, most = ratio
        words = f"{middle:.3f} [{least:.3f}, {most:.3f}]"
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
    return text if fits else f"{text} *"
