"""Words that several stories share: of losses, texts and layers; sections that all pages have."""

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..results.loss import Loss, recovered
from ..results.patch import Patch
from ..results.scores import UNKNOWN, Difference, Estimate
from ..values.counts import counted, with_error
from ..values.layers import Block, blocks_of, drop_option, ranges
from ..values.provenance import command_line, shell_lines
from ..values.schema import plain
from .story import Fact, Number, Section

SMALL = 1_000_000_000
"""Parameters below which a model is called small."""

BEST_OF_SEVERAL = "The best of several is best on the test set itself, so a little lucky."

FEW_TEXTS = 30
"""Texts below which errors are themselves uncertain."""


def perplexity_words(whole: Loss, loss: Loss, lost: Difference) -> str:
    """Say in words of perplexity what a model loses more, paired, than the whole one."""
    ratio = math.exp(lost.mean)
    span, digits = "", 2
    if math.isfinite(lost.stderr):
        low, high = (math.exp(lost.mean + side * 2 * lost.stderr) for side in (-1, 1))
        digits = 2 if high - low > 0.02 else 3
        span = f" ({low:.{digits}f} to {high:.{digits}f} within two standard errors)"
    return (
        f"Its perplexity is {ratio:.{digits}f} times that of the whole model{span}: at each token "
        f"it is as unsure as among {math.exp(loss.nats):.1f} equally likely ones, the whole model "
        f"as among {math.exp(whole.nats):.1f}."
    )


def compared(found: Estimate, unit: str = " nats a token", more: str = "more") -> str:
    """Say a difference: ``0.06 ± 0.02 nats a token more``, or less; no error looks like none."""
    amount = with_error(abs(found.mean), found.stderr, 3 if 0 < found.stderr < 0.005 else 2)
    return f"{amount}{unit} {'less' if found.mean < 0 else more}"


def loss_fact(name: str, loss: Loss, place: str) -> Fact:
    """Give a loss with its error, what it was measured on, and file and key that it is from."""
    source = f"{place}; {counted(loss.num_tokens, 'token')} of {counted(loss.num_texts, 'text')}"
    return Fact(f"{name}, nats a token", Number.of(loss.nats, loss.stderr, 4), source)


def loss_words(loss: Loss) -> str:
    """Write a loss in nats a token and of what it is; then by its vocabulary and in bits a byte."""
    rejected = f", {counted(loss.num_rejected, 'text')} rejected" if loss.num_rejected else ""
    bits = "" if loss.by_byte is None else f", {loss.by_byte.mean:.4f} bits a byte"
    return (
        f"{loss} nats a token, {counted(loss.num_tokens, 'token')} of "
        f"{counted(loss.num_texts, 'text')}\n"
        f"  {loss.normalized:.4f} of ln vocabulary{bits}{rejected}"
    )


def whole_words(whole: Loss) -> str:
    """Say the loss of a whole model, as a sentence."""
    return (
        f"The loss of the whole model is {whole} nats a token, {whole.normalized:.3f} of ln V, on "
        f"{counted(whole.num_tokens, 'token')} of {counted(whole.num_texts, 'text')}; "
        f"V = {whole.vocab_size:,}."
    )


_JUDGES = {
    "kl": "the divergence from the whole model's next-token distributions",
    "options": "the margin of the right option over the others",
    "speech": "the divergence from the whole model on its own words",
}


def judge_words(judge: str, unit: str) -> str:
    """Say what a judge measures, where its name does not, and in which unit."""
    return ", ".join([judge, *filter(None, [_JUDGES.get(judge)]), unit])


def range_cell(layers: Sequence[int]) -> str:
    """Write layers for a narrow column, where a range is not broken."""
    return ranges(layers).replace(", ", ",\xa0")


def layer_words(layers: Sequence[int]) -> str:
    """Say layers for people who have never seen a half-open range: ``3, 12 to 19``."""
    blocks = blocks_of(layers)
    return ", ".join(
        str(block.start) if len(block) == 1 else f"{block.start} to {block.stop - 1}"
        for block in blocks
    )


def patch_words(settings: Mapping[str, Any]) -> str:
    """Describe the patch of a curve's points by its settings: quick, or full on so many tokens."""
    if settings.get("patch") == "quick":
        return "quick patch (one matrix a block)"
    tokens = settings.get("patch_tokens")
    return f"full patch on at most {tokens:,} tokens" if tokens else "patch"


def patched_name(settings: Mapping[str, Any]) -> str:
    """Name the state ``patched`` of a curve in two words at most, by the patch that it is."""
    kind = settings.get("patch")
    return f"{kind} patch" if kind else "patched"


def dequantised(name: str, num_bytes: int, left: int, *, blocks: Iterable[Block]) -> str:
    """Say that a cut of a GGUF file has plain weights, ``left`` bytes, and what keeps its own."""
    cut = command_line("prune", name, "--drop", drop_option(blocks), "--as-gguf", "--out", "CUT")
    return (
        f"{name} has {megabytes(num_bytes)} of quantised weights; they were dequantised, and what "
        f"is left has {megabytes(left)}. {cut} cuts the file itself, in its own types, and "
        f"unpatched"
    )


def abbreviated(value: int, units: str) -> str:
    """Write a number with three digits at least and a unit of thousands: ``6.74B``."""
    power = 0
    while value >= 999.5 * 1000**power and power < len(units):
        power += 1
    short = value / 1000**power
    digits = f"{short:.3g}" if short < 999.5 else f"{short:,.0f}"
    return digits + units[power - 1] if power else digits


def capital(text: str) -> str:
    """Begin a sentence with a text."""
    return text[:1].upper() + text[1:]


def megabytes(num_bytes: int) -> str:
    """``481 MB``, of 10^6 bytes."""
    return f"{num_bytes / 1e6:,.0f} MB"


def out_of(command: str, otherwise: str) -> str:
    """The place that a command line writes to, as it names it."""
    words = shlex.split(command.replace("--out=", "--out "))
    return words[words.index("--out") + 1] if "--out" in words[:-1] else otherwise


def again(what: str, *commands: str) -> Section:
    """Give the commands that make all of it again, with ``what`` they do, broken before options."""
    line = (
        f"{what} Names of files and folders are those of the machine that made it, words in "
        f"capitals are places on yours."
    )
    return Section("Make it again", (line,), commands=tuple(map(shell_lines, commands)))


def costs(measured: Mapping[str, Mapping[str, Loss]]) -> dict[str, Any]:
    """Give what a cut costs on the test set, then out of domain: what is lost, what came back."""
    states = [[*losses.values()] for losses in measured.values()]
    lost = (of[-1].minus(of[0]).to_json() for of in states)
    shares = (plain(recovered(losses)) for losses in measured.values())
    sets = zip(("test_set", "out_of_domain"), lost, shares, strict=False)
    return {name: {"lost": one, "recovered": share} for name, one, share in sets}


def came_back(shares: Mapping[str, Estimate]) -> str:
    """Say which share of the lost nats came back, by the texts that say so."""
    said = ", ".join(
        f"{with_error(100 * one.mean, 100 * one.stderr or None, 0)} % on {place}"
        for place, one in shares.items()
        if math.isfinite(one.mean)
    )
    return said.replace(" %", " % of the lost nats recovered", 1) or "nothing was lost"


def by_choice(patch: Patch) -> dict[str, Estimate]:
    """Give the share that a patch recovered on texts that it chose by, without an error."""
    return {"the texts that it chose by": Estimate(patch.recovered, 0.0)}


def domain_learned(shares: Mapping[str, Estimate]) -> list[str]:
    """Warn, in a sentence, of a model that has learned a domain; the first share is of it.

    More than all came back there, or less than half of that elsewhere, by two standard errors.
    """
    here, *others = shares.values() or [UNKNOWN]
    far = [Estimate(here.mean - 1, here.stderr)]
    for one in others:
        error = math.hypot(here.stderr / 2, one.stderr)
        far.append(Estimate(here.mean / 2 - one.mean, error))
    if not any(one.mean > 0 and not one.tied for one in far):
        return []
    return [
        f"the model has learned the domain of its texts: {came_back(shares)}; calibrate on more "
        f"texts, from several domains (--texts)"
    ]


def few_texts(num_texts: int) -> list[str]:
    """Warn of losses that are of few texts; nothing where they are of enough."""
    if num_texts >= FEW_TEXTS:
        return []
    return [
        f"the losses are of {counted(num_texts, 'text')}: their errors are uncertain themselves, "
        f"and other texts may give another picture"
    ]


def small_model(parameters: int | None) -> list[str]:
    """Warn of a small model; nothing where it is large, or its size is not known."""
    if parameters is None or parameters >= SMALL:
        return []
    return [
        f"the model is small, {parameters / 1e6:,.0f} million parameters: small models lose more "
        f"by a cut than large ones, so this says little of larger models"
    ]


def differs(
    max_length: int | None,
    dtype: str | None,
    versions: Mapping[str, str],
    *,
    own: Iterable[str] = (),
) -> Section:
    """Explain why the same model measured elsewhere may have other numbers; ``own`` come last."""
    length = (
        f"at most {counted(max_length, 'token')}"
        if max_length
        else "as many tokens as --max-length says"
    )
    harness = versions.get("lm_eval") or versions.get("lm-eval")
    lines = (
        f"Context: each text is read by itself, {length} of it; a longer context lowers a loss.",
        "Stride: texts are not joined and windows do not overlap. Each token but the first of a "
        "text is predicted once; perplexities of a sliding window are lower.",
        "BOS: a text begins as its tokenizer begins it. With another first token the first "
        "predictions differ, of short texts much.",
        "Mean: over tokens, not over texts, words or bytes; its error is that of texts.",
        f"Weights: {dtype or 'the dtype that --dtype says'}. In another dtype, or quantised, "
        f"losses differ in the third digit or before.",
        *own,
        f"lm-eval: {f'version {harness}' if harness else 'no task was measured by it here'}; "
        f"prompts and normalisation of its tasks change between versions.",
    )
    return Section("Why your number may differ", lines=lines)


def made_by(versions: Mapping[str, str], source: str) -> tuple[Fact, ...]:
    """Give the packages that made the numbers."""
    return tuple(Fact(name, version, source) for name, version in versions.items())
