"""Tables of what the stages make: a scan, a plan, experts, a race, a healing, a patch, a gain."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from ...experts.criteria import CRITERIA
from ...experts.statistics import ExpertStatistics
from ...results.gain import Forecast, Gain, MeasuredGain
from ...results.healing import Healing
from ...results.loss import Loss, recovered
from ...results.patch import Patch
from ...results.scores import Estimate
from ...results.verification import Candidate, Verified
from ...savings.devices import HERE
from ...scanning.choice import ScanChoice
from ...scanning.scan import Scan
from ...values.costs import BootstrappedStart
from ...values.counts import counted
from ...values.layers import Block, blocks_of, drop_option, layer_count, ranges
from ...values.plan import Plan
from ..story import Cell, Number, Table
from ..words import abbreviated, by_choice, came_back, range_cell

MOST_CANDIDATES = 20
MOST_NAMES = 3
"""Names of those who proposed a plan, before they are counted."""


def scan_table(scan: Scan) -> Table:
    """Tabulate the best block of every size, by the angle if that is among the metrics."""
    samples = counted(scan.num_samples, "sample")
    if scan.num_sequences < scan.num_samples:
        samples = (
            f"{counted(scan.num_samples, 'token')} of {counted(scan.num_sequences, 'sequence')}"
        )
    found = [] if scan.distance is None else range(1, scan.num_layers)
    blocks = [scan.best_block(n) for n in found]
    return Table(
        f"{layer_count(scan.num_layers)}, {samples}"
        + (f", {scan.num_rejected} rejected" if scan.num_rejected else "")
        + (f"; positions {scan.positions}" if scan.positions else ""),
        ("n", "drop", distance_name(scan.distance)),
        tuple((Number.count(len(block)), _range(block), _distance(block)) for block in blocks),
    )


def distance_name(metric: str | None) -> str:
    """What a block's score by a metric is called: of two, alike states have a cosine of 1."""
    known = {"angular": "angular distance", "cosine": "1 - cosine", None: "distance"}
    return known.get(metric) or str(metric)


def rejected(scan: Scan) -> list[str]:
    """Name the rejected samples of a scan, as far as it names them, a line each."""
    return [f"rejected {rejection}" for rejection in scan.rejections]


def plan_table(plan: Plan) -> Table:
    """Tabulate the blocks that a plan drops, and the layers that stay."""
    rows: list[tuple[Cell, ...]] = []
    for block in plan.blocks:
        score = (
            "" if block.score is None else f"{distance_name(plan.metric)} {_distance(block).text}"
        )
        rows.append(("drop", _range(block), score))
    title = f"plan: {len(plan.dropped)} of {plan.num_layers} layers"
    if plan.experts is not None:
        layers = range_cell(tuple(plan.experts.by_layer))
        rows.append(("experts", layers, f"{plan.experts.share} of each go"))
        title += f", {plan.experts.share}"
    rows.append(("keep", range_cell(plan.survivors), layer_count(len(plan.survivors))))
    return Table(title, ("", "", ""), tuple(rows), plan.doubt)


def starts_table(
    blocks: Sequence[Block], metric: str | None, sure: BootstrappedStart | None = None
) -> Table:
    """Tabulate the best blocks of one size, and the share of resamples where each is the best."""
    head = ("rank", "drop", distance_name(metric), *(() if sure is None else ("share",)))
    rows = []
    for rank, block in enumerate(blocks, 1):
        row: tuple[Cell, ...] = (Number.count(rank), _range(block), _distance(block))
        if sure is not None:
            row += (Number.of(float(sure.distribution[block.start])),)
        rows.append(row)
    return Table(f"the best blocks of {len(blocks[0])}", head, tuple(rows))


def candidates_table(verified: Verified) -> Table:
    """Tabulate the candidates of a race, the winner first."""
    items = verified.what_chooses
    after = {"none": "as they are cut", "patch": "after a quick patch"}[verified.after]
    rows = tuple(
        (
            range_cell(one.plan.dropped),
            _names(one),
            Number.count(one.difference.num_items),
            Number.of(None if one.lost_early else one.score, one.stderr),
            Number.estimate(one.difference, sign=True),
            _verdict(one, verified),
        )
        for one in verified.candidates[:MOST_CANDIDATES]
    )
    return Table(
        f"Proposals that came into the last race, {after}",
        ("drop", "proposed by", items, verified.measure, "more than the winner", "verdict"),
        rows,
        f"{verified.num_proposals} proposals were judged on up to {verified.num_items} selection "
        f"{items}, in {verified.measured_in}: a cut that was behind early on fewer (–). Cuts are "
        f"compared on the {items} of both; a tie is within two standard errors of this difference.",
        0,
    )


def failed_proposals(verified: Verified) -> list[str]:
    """Name the criteria that could not propose, and the proposals that could not be judged."""
    return [f"{name}: {why}" for name, why in verified.failed.items()]


def healing_table(healing: Healing) -> Table:
    """Tabulate the held-out loss over the measured steps of a healing."""
    training = {step.step: Number.of(step.loss) for step in healing.steps}
    rows: list[tuple[Cell, ...]] = [
        (str(step), Number.of(loss.nats, loss.stderr), training.get(step, Number("")))
        for step, loss in healing.held_out.items()
    ] or [(str(healing.best_step), Number(""), training.get(healing.best_step, Number("")))]
    if healing.cut:
        cut = Number.of(healing.cut.nats, healing.cut.stderr)
        rows.insert(0, ("cut, not patched", cut, Number("")))
    if healing.original:
        whole = Number.of(healing.original.nats, healing.original.stderr)
        rows.append(("whole model", whole, Number("")))
    title = f"healing: {counted(len(healing.steps), 'step')}, step {healing.best_step} kept"
    if healing.recovered is not None:
        title += f", {100 * healing.recovered:.0f} % of the lost nats recovered"
    return Table(title, ("step", "held-out loss", "training loss"), tuple(rows))


def healing_parts(healing: Healing) -> list[str | Table]:
    """Give the table of a healing, its answers, its speed, and what merging changed."""
    parts: list[str | Table] = [healing_table(healing)]
    if healing.answers:
        parts.append(f"trained on {healing.answers}")
    if healing.tokens_per_second:
        parts.append(f"{healing.tokens_per_second:,.0f} tokens a second")
    if merged := healing.merge:
        what = "logits differ" if merged.check == "logits" else "weights differ from the exact sums"
        parts.append(
            f"merged into {merged.dtype}: {what} by {merged.difference:.2g} of their norm, "
            f"{merged.max_difference:.2g} at most"
        )
        if merged.trained_difference is not None:
            parts.append(
                f"from the adapters on {healing.recipe.dtype}, as trained, they differ by "
                f"{merged.trained_difference:.2g} of their norm"
            )
        if merged.loss:
            parts.append(f"held-out loss, merged, in {merged.dtype}: {merged.loss}")
    return parts


def losses_table(measured: Mapping[str, Mapping[str, Loss]]) -> Table:
    """Tabulate losses by texts and state, and which share of the lost nats came back."""
    rows: list[tuple[Cell, ...]] = []
    states = [*next(iter(measured.values()))]
    for place, losses in measured.items():
        whole, *_, now = losses.values()
        nats = (Number.of(loss.nats, loss.stderr) for loss in losses.values())
        lost = Number.estimate(now.minus(whole), sign=True)
        back = Number.estimate(recovered(losses), 0, scale=100)
        rows.append((place, Number.count(now.num_texts), *nats, lost, back))
    return Table(
        "Losses in and out of domain",
        ("on", "texts", *states, "more than whole", "% recovered"),
        tuple(rows),
        "Nats a token. Out-of-domain texts are built-in ones of 32 kinds, which nothing is fitted "
        "or chosen by. Errors of the last two columns are paired.",
        bare=tuple(states),
    )


def patch_table(patch: Patch, shares: Mapping[str, Estimate]) -> Table:
    """Tabulate the layers that a patch solved anew, the loss behind each, and what came back."""
    nothing = Number("")
    rows: list[tuple[Cell, ...]] = [
        ("all layers", "", nothing, Number.of(patch.original, digits=4)),
        (f"cut, without {ranges(patch.plan.dropped)}", "", nothing, Number.of(patch.cut, digits=4)),
    ]
    for fit in patch.fits:
        explained, nats = Number.of(fit.explained), Number.of(fit.nats, digits=4)
        rows.append((", ".join(fit.matrices), f"x^({fit.target})", explained, nats))
    for loss in patch.descent:
        words = "all matrices from there on, by steps"
        rows.append((words, "", nothing, Number.of(loss, digits=4)))
    return Table(
        f"patch by {patch.method}: {came_back({**shares, **by_choice(patch)})}",
        ("after solving", "for", "R²", "nats a token"),
        tuple(rows),
        f"loss on {counted(patch.num_held_out, 'token')} of the texts that it chose by",
    )


def _range(block: Block) -> str:
    return range_cell(range(block.start, block.stop))


def _distance(block: Block) -> Number:
    return Number.of(block.score, block.stderr, 4)


def _names(candidate: Candidate) -> str:
    names = candidate.proposed_by
    more = f", {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def _verdict(candidate: Candidate, verified: Verified) -> str:
    if candidate is verified.candidates[0]:
        return "the winner"
    return "a tie" if candidate.tied else "worse"


MOST_UNROUTED = 5
"""Layers whose experts without tokens are named; the others are only counted."""


def experts_table(chosen: ScanChoice) -> Table:
    """Tabulate the experts that go of each layer, with the scores between which the cut is."""
    dropped = chosen.plan.experts
    assert dropped is not None
    name = str(dropped.criterion)
    rows = tuple(
        (
            Number.count(one.layer),
            _named(one.experts),
            Number.estimate(one.last, _digits(one.last.mean, one.next.mean)),
            Number.estimate(one.next, _digits(one.last.mean, one.next.mean)),
        )
        for one in chosen.experts
    )
    return Table(
        f"experts: {dropped.count} of {dropped.num_experts} go of {counted(len(rows), 'layer')}, "
        f"by {name}: {CRITERIA[name].what}",
        ("layer", "drop", "the last to go", "the next"),
        rows,
    )


def _digits(one: float, other: float) -> int:
    """As many digits as it takes to see that two scores differ; four at least."""
    apart = abs(one - other)
    return max(4, min(12, 1 - int(f"{apart:e}".partition("e")[2]))) if 0 < apart < 1e99 else 4


def unknown(chosen: ScanChoice) -> list[str]:
    """Name the experts that no token was sent to, what becomes of them, and what was left out."""
    left_out = [_left_out(chosen.left_out)] if chosen.left_out else []
    if not chosen.unrouted:
        return left_out
    num = sum(map(len, chosen.unrouted.values()))
    gone = sum(
        len({*one.experts} & {*chosen.unrouted.get(one.layer, ())}) for one in chosen.experts
    )
    named = [
        f"{layer}: {_named(some)}" for layer, some in list(chosen.unrouted.items())[:MOST_UNROUTED]
    ]
    more = len(chosen.unrouted) - len(named)
    and_more = f"; and of {counted(more, 'more layer')}" if more > 0 else ""
    said = "received no token" if num == 1 else "received no tokens"
    return [
        f"{counted(num, 'expert')} {said} from these texts "
        f"(by layer {'; '.join(named)}{and_more}): {gone:,} of them "
        f"{'goes' if gone == 1 else 'go'}, {num - gone:,} {'stays' if num - gone == 1 else 'stay'}",
        *left_out,
    ]


def gathered(statistics: ExpertStatistics | None) -> list[str]:
    """Say of what experts a scan has statistics, in a sentence, if of any."""
    if statistics is None:
        return []
    num = sum(map(len, statistics.unrouted.values()))
    layers, experts = counted(len(statistics.layers), "layer"), statistics.routing.num_experts
    left_out = f"; {_left_out(statistics.left_out)}" if statistics.left_out else ""
    return [
        f"experts: {experts} in each of {layers}, {num} of which received no token{left_out}; "
        f"choose by plan --experts K"
    ]


def _left_out(parts: int) -> str:
    return f"{counted(parts, 'part')} of texts left out, which held NaN or infinity"


def _named(experts: tuple[int, ...]) -> str:
    """Experts as ``--drop-experts`` names those of a layer."""
    return drop_option(blocks_of(experts))


# What a cut saves
_Row = tuple[str, str, str, str]
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


def _sizes(gain: Gain) -> Iterator[_Row]:
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


def _times(one: Forecast) -> Iterator[_Row]:
    for phase, early, late in (
        ("prefill", one.prefill_before, one.prefill_after),
        ("token", one.decode_before, one.decode_after),
    ):
        before, after = _time(early, one.fits_before), _time(late, one.fits_after)
        yield f"{one.title}, {phase}", before, after, f"{late / early:.3f}"


def _measured(found: MeasuredGain) -> Iterator[_Row]:
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


def _count(value: int) -> str:
    return abbreviated(value, "KMBT")


def _bytes(value: int) -> str:
    return abbreviated(value, "KMGT") + "B"


def _time(seconds: float, fits: bool = True) -> str:
    milliseconds = 1e3 * seconds
    text = f"{milliseconds:.2f} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"
    text = f"{seconds:.1f} s" if seconds >= 10 else text
    return text if fits else f"{text} *"
