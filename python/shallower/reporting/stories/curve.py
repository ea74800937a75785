"""The story of a curve: where it holds, where it falls, what a patch or a healing brings back."""

import math

from ...values.curve import STATES, Curve, CurvePoint
from ...values.files import CURVE_FILE
from ...values.layers import ranges
from ...values.scores import Difference
from ..charts.curve import curve_charts
from ..page.story import Cell, Fact, Number, Section, Step, Story, Strip, Table
from .parts import (
    again,
    differs,
    few_texts,
    layer_words,
    loss_fact,
    made_by,
    perplexity_words,
    range_cell,
    small_model,
    splits_words,
)


def curve_story(curve: Curve, *, command: str = "", drawn: bool = True) -> Story:
    """Tell a curve.

    Args:
        curve: of one model.
        command: the words on the command line that asked for it.
        drawn: draw figures; False where there is no matplotlib.

    Returns:
        The story.
    """
    shown = _shown(curve)
    sections = [_asked(curve), _curves(curve, drawn)]
    sections += [
        _numbers(curve), _again(command),
        differs(curve.max_length, curve.dtype, curve.versions),
    ]  # fmt: skip
    cost = ""
    lost = None if shown is None else curve.lost(shown)
    if shown is not None and lost and shown.loss and curve.whole.loss:
        words = perplexity_words(curve.whole.loss, shown.loss, lost)
        cost = f"Without {shown.n} layers, {shown.state}: {words[0].lower()}{words[1:]}"
    return Story(
        "curve", f"{curve.model} with ever fewer of its {curve.num_layers} layers",
        _sentence(curve, shown), strips=_strips(curve, shown), steps=_steps(curve, shown),
        cost=cost, savings=_savings(shown), warnings=tuple(_warnings(curve)),
        sections=tuple(sections), data=curve.to_json(),
    )  # fmt: skip


def _shown(curve: Curve) -> CurvePoint | None:
    """The point that is told first: of the size nearest a quarter of the layers, the least loss."""
    measured = [one for one in curve.points if one.n and one.loss is not None]
    if not measured:
        return None
    size = min({one.n for one in measured}, key=lambda n: (abs(n / curve.num_layers - 0.25), n))
    return min(
        (one for one in measured if one.n == size), key=lambda one: one.loss.nats if one.loss else 0
    )


def _sentence(curve: Curve, shown: CurvePoint | None) -> str:
    if shown is None:
        return "No cut of this model could be measured."
    lost = curve.lost(shown)
    parts = []
    if lost is not None and shown.loss is not None and curve.whole.loss is not None:
        parts.append(
            f"Without layers {ranges(shown.dropped)}, {100 * shown.layers_share:.0f} % of layers, "
            f"chosen by {shown.strategy} and {shown.state}, the model loses "
            f"{Number.of(lost.mean, lost.stderr).text} nats a token "
            f"({curve.whole.loss.nats:.2f} → {shown.loss.nats:.2f})"
        )
    for task in curve.tasks:
        held = _holds(curve, shown, task)
        parts.append(
            f"{task} falls with the first layers that go" if held is None else
            f"{task} holds up to {100 * held.layers_share:.0f} % of layers"
        )  # fmt: skip
    return f"{'; '.join(parts)}."


def _holds(curve: Curve, shown: CurvePoint, task: str) -> CurvePoint | None:
    """The last point of a line before a score is worse than the whole model's, errors allowed."""
    whole, last = curve.whole.task(task), None
    for point in curve.line(shown.strategy, shown.state)[1:]:
        scores = point.task(task)
        if scores is None or whole is None:
            continue
        lost = scores.minus(whole)
        if lost.mean < 0 and not lost.tied:
            break
        last = point
    return last


def _strips(curve: Curve, shown: CurvePoint | None) -> tuple[Strip, ...]:
    if shown is None:
        return ()
    name = f"without {shown.n} layers, by {shown.strategy}"
    return (Strip(name, curve.num_layers, shown.dropped, layer_words(shown.dropped)),)


def _steps(curve: Curve, shown: CurvePoint | None) -> tuple[Step, ...]:
    if shown is None or curve.whole.loss is None:
        return ()
    found = []
    for state in STATES:
        for one in curve.points:
            if (one.n, one.strategy, one.state) == (shown.n, shown.strategy, state) and one.loss:
                found.append((one, one.loss, curve.lost(one)))
    most = max([lost.mean for _, _, lost in found if lost] or [1.0]) or 1.0
    whole = curve.whole.loss
    steps = [Step("whole", Number.of(whole.nats, whole.stderr))]
    for one, loss, lost in found:
        share = max(0.0, lost.mean / most) if lost else 0.0
        number = Number.of(loss.nats, loss.stderr)
        steps.append(Step(one.state, number, _signed(lost).text, share, one is shown))
    return tuple(steps)


def _savings(shown: CurvePoint | None) -> tuple[Fact, ...]:
    if shown is None:
        return ()
    shares = {"layers": shown.layers_share, "parameters": shown.parameters_share}
    if shown.time_share is not None:
        shares["a token's time, as forecast for an A100"] = shown.time_share
    return tuple(
        Fact(name, Number.share(share), f"{CURVE_FILE}: points") for name, share in shares.items()
    )


def _warnings(curve: Curve) -> list[str]:
    found = _unfinished(curve)
    found += [
        f"n = {one.n}, {one.strategy}, {one.state}: {one.failed}"
        for one in curve.points
        if one.failed
    ]
    found += [
        f"{one.task} is at chance already with all layers ({one}): what is lost there says nothing"
        for one in curve.whole.tasks
        if one.at_chance
    ]
    found += small_model(curve.settings.get("parameters"))
    if curve.whole.loss is not None:
        found += few_texts(curve.whole.loss.num_texts)
    return found


def _unfinished(curve: Curve) -> list[str]:
    """Say it where points are missing that were asked for."""
    asked = [len(curve.settings.get(name, ())) for name in ("n", "strategies", "states")]
    wanted = asked[0] * asked[1] * asked[2]
    there = len(curve.points) - 1
    if there >= wanted:
        return []
    return [
        f"the curve has not ended: {there} of {wanted} points are known; call shallower curve "
        f"again, and it goes on where it was"
    ]


def _asked(curve: Curve) -> Section:
    place = CURVE_FILE
    facts = (
        Fact("model", curve.model, f"{place}: model"),
        Fact("dtype", curve.dtype or "not known", f"{place}: dtype"),
        Fact("texts", splits_words(curve.splits), f"{place}: splits"),
        Fact("tokens of a text", f"at most {curve.max_length:,}", f"{place}: max_length"),
        Fact("strategies", ", ".join(curve.strategies) or "none", f"{place}: points"),
        Fact("tasks", ", ".join(curve.tasks) or "none", f"{place}: points"),
    )
    return Section("What was asked", facts=facts)


def _curves(curve: Curve, drawn: bool) -> Section:
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            one.strategy, one.state, Number.count(one.n),
            range_cell(one.dropped) if one.n else "none",
            *_losses(one),
            _signed(curve.lost(one)) if one.n else Number(""),
            *[_score(one, task) for task in curve.tasks],
            Number.of(one.seconds, digits=0),
        )
        for one in curve.points
    )  # fmt: skip
    head = ("strategy", "state", "n", "drop", "loss", "loss / ln V", "more than whole",
            *curve.tasks, "s")  # fmt: skip
    note = (
        "Loss in nats a token on the texts that report; loss / ln V is 1 for a uniform guess. "
        "Scores of tasks are means over items; ± is one standard error."
    )
    return Section(
        "What the model loses, layer by layer", tables=(Table("Every point", head, rows, note),),
        drawings=tuple(curve_charts(curve)) if drawn else (),
    )  # fmt: skip


def _losses(point: CurvePoint) -> tuple[Number, Number]:
    loss = point.loss
    if loss is None:
        return Number("–"), Number("–")
    return (
        Number.of(loss.nats, loss.stderr),
        Number.of(loss.normalized, loss.normalized_stderr, 4),
    )


def _score(point: CurvePoint, task: str) -> Number:
    scores = point.task(task)
    return Number("–") if scores is None else Number(str(scores), scores.mean)


def _signed(difference: Difference | None) -> Number:
    if difference is None:
        return Number("–", math.nan)
    return Number.of(difference.mean, difference.stderr, sign=True)


def _numbers(curve: Curve) -> Section:
    facts = [] if curve.whole.loss is None else [
        loss_fact("whole", curve.whole.loss, f"{CURVE_FILE}: points, the first")
    ]  # fmt: skip
    facts += [
        Fact(f"{one.task}, {one.metric}", Number(str(one), one.mean),
             f"{CURVE_FILE}: points, the first; {len(one.items):,} items with {one.num_shots} "
             f"solved examples")
        for one in curve.whole.tasks
    ]  # fmt: skip
    facts += made_by(curve.versions, f"{CURVE_FILE}: versions")
    line = f"All rows above are {CURVE_FILE}: points, with all their digits."
    return Section("Every number, and where it is from", (line,), tuple(facts))


def _again(command: str) -> Section:
    known = command or "shallower curve MODEL --texts TEXTS --eval-texts TEXTS --out CURVE"
    return again("The curve, and this page.", known, "shallower report CURVE")
