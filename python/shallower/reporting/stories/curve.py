"""The story of a curve: where it holds, where it falls, what a patch or a healing brings back."""

from collections.abc import Sequence

from ...values.commands import command_line
from ...values.counts import counted
from ...values.curve import Curve, CurvePoint
from ...values.estimates import splits_words
from ...values.files import CURVE_FILE
from ...values.layers import layer_count, ranges
from ...values.loss import Loss
from ...values.scores import TIE
from ...values.settings import STATES, State
from ...values.speech import Speech
from ..charts.curve import curve_charts
from ..story import Cell, Fact, Number, Section, Step, Story, Strip, Table
from ..words import (
    BEST_OF_SEVERAL,
    again,
    compared,
    differs,
    few_texts,
    layer_words,
    loss_fact,
    made_by,
    out_of,
    patch_words,
    patched_name,
    perplexity_words,
    range_cell,
    small_model,
    whole_words,
)
from .evaluation import CURVE_MEASURES, speech_cell


def curve_story(
    curve: Curve, *, command: str = "", folder: str = "CURVE", drawn: bool = True
) -> Story:
    """Make the story of a curve; ``command`` is its command line, ``drawn`` with figures."""
    shown = _shown(curve)
    sections = [_curves(curve, drawn), _settings(curve)]
    sections += [
        _numbers(curve),
        _again(command, folder),
        differs(curve.max_length, curve.dtype, curve.versions),
    ]
    cost = ""
    lost = None if shown is None else curve.lost(shown)
    if shown is not None and lost and shown.loss and curve.whole.loss:
        words = perplexity_words(curve.whole.loss, shown.loss, lost)
        state = _of_state(curve, shown.state)
        cost = f"Without {layer_count(shown.n)}, {state}: {words[0].lower()}{words[1:]}"
    return Story(
        "curve",
        f"{curve.model} with ever fewer of its {curve.num_layers} layers",
        _sentence(curve, shown),
        strips=_strips(curve, shown),
        steps=_steps(curve, shown),
        cost=cost,
        savings=_savings(shown),
        warnings=tuple(_warnings(curve)),
        sections=tuple(sections),
        data=curve.to_json(),
    )


def _of_state(curve: Curve, state: State) -> str:
    """Say in which state cuts are, and after which patch."""
    patch = patch_words(curve.settings)
    return {"cut": "as cut", "patched": f"after a {patch}", "healed": f"healed after a {patch}"}[
        state
    ]


def _shown(curve: Curve) -> CurvePoint | None:
    """The point that comes first: the best cut at the knee, in the last state that was measured.

    The knee is the size farthest below the line between the ends; the least size where none is.
    """
    whole, best = curve.whole.loss, dict[int, CurvePoint]()
    measured = [one for one in curve.points if one.n and one.loss is not None]
    last = max((STATES.index(one.state) for one in measured), default=0)
    losses = [(one.loss.nats, one) for one in measured if one.loss and one.state == STATES[last]]
    for _, one in sorted(losses, key=lambda pair: pair[0]):
        best.setdefault(one.n, one)
    lost = {n: one.loss.nats - whole.nats for n, one in best.items() if one.loss and whole}
    end = max(lost, default=0)
    below = {n: lost[end] * n / end - lost[n] for n in lost if n < end}
    size = max(below, key=lambda n: (below[n], -n), default=end)
    return best.get(size if below.get(size, 0) > 0 else min(best, default=0))


def _sentence(curve: Curve, shown: CurvePoint | None) -> str:
    if shown is None:
        return "No cut of this model could be measured."
    lost = curve.lost(shown)
    parts = []
    if lost is not None and shown.loss is not None and curve.whole.loss is not None:
        parts.append(
            f"Without layers {ranges(shown.dropped)}, {100 * shown.layers_share:.0f} % of layers, "
            f"chosen by {shown.strategy}, {_of_state(curve, shown.state)}, the loss is "
            f"{compared(lost)} than whole ({curve.whole.loss.nats:.2f} → {shown.loss.nats:.2f})"
        )
    for task in curve.tasks:
        held = _holds(curve, shown, task)
        parts.append(
            f"{task} falls with the first layers that go"
            if held is None
            else f"{task} holds up to {100 * held.layers_share:.0f} % of layers"
        )
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
    name = f"without {layer_count(shown.n)}, by {shown.strategy}"
    return (Strip(name, curve.num_layers, shown.dropped, layer_words(shown.dropped)),)


def _steps(curve: Curve, shown: CurvePoint | None) -> tuple[Step, ...]:
    if shown is None or curve.whole.loss is None:
        return ()
    found = []
    for state in STATES:
        for one in curve.points:
            if (one.n, one.strategy, one.state) == (shown.n, shown.strategy, state) and one.loss:
                found.append((one, one.loss, curve.lost(one)))
    most = max([0.0, *(lost.mean for _, _, lost in found if lost)]) or 1.0
    whole = curve.whole.loss
    steps = [Step("whole", Number.of(whole.nats, whole.stderr))]
    for one, loss, lost in found:
        share = max(0.0, lost.mean / most) if lost else 0.0
        number = Number.of(loss.nats, loss.stderr)
        name = patched_name(curve.settings) if one.state == "patched" else one.state
        steps.append(Step(name, number, Number.estimate(lost, sign=True).text, share, one is shown))
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
    """Warn where points of the settings are missing."""
    wanted, there = curve.num_wanted, len(curve.points) - 1
    if there >= wanted:
        return []
    return [
        f"the curve has not ended: {there} of {wanted} points are measured; call shallower curve "
        f"again to resume"
    ]


def _settings(curve: Curve) -> Section:
    place = CURVE_FILE
    facts = (
        Fact("model", curve.model, f"{place}: model"),
        Fact("dtype", curve.dtype or "not known", f"{place}: dtype"),
        Fact("texts", splits_words(curve.splits), f"{place}: splits"),
        Fact("tokens of a text", f"at most {curve.max_length:,}", f"{place}: max_length"),
        Fact("strategies", ", ".join(curve.strategies) or "none", f"{place}: points"),
        Fact(
            "patch",
            patch_words(curve.settings) if curve.settings.get("patch") else "none",
            f"{place}: settings",
        ),
        Fact("tasks", ", ".join(curve.tasks) or "none", f"{place}: points"),
        *([] if curve.whole.speech is None else [_prompts(curve.whole.speech)]),
    )
    return Section("Settings", facts=facts)


def _prompts(speech: Speech) -> Fact:
    return Fact("prompts of speech", f"{speech.num_prompts:,}", f"{CURVE_FILE}: points")


def _curves(curve: Curve, drawn: bool) -> Section:
    whole, settings = curve.whole.loss, curve.settings
    lines = [] if whole is None else [whole_words(whole)]
    if settings.get("patch"):
        lines.append(f"What is patched has a {patch_words(settings)}.")
    if "recommended" in curve.strategies:
        lines.append("What is recommended was chosen by losses after a quick patch.")
    states = [state for state in STATES if _cuts(curve, state)]
    tables = [_losses(curve, state) for state in states]
    tables += [_scores(curve, task, state) for task in curve.tasks for state in states]
    tables += [_speech(curve, state) for state in states if curve.whole.speech is not None]
    failed = [point for point in curve.points if point.failed]
    tables += [_failures(failed)] if failed else []
    drawings = tuple(curve_charts(curve)) if drawn else ()
    title = "What the model loses, layer by layer"
    return Section(title, tuple(lines), tables=tuple(tables), drawings=drawings)


def _cuts(curve: Curve, state: State) -> list[CurvePoint]:
    return [point for point in curve.points if point.n and point.state == state]


def _losses(curve: Curve, state: State) -> Table:
    """Tabulate the losses of all cuts in one state."""
    points = _cuts(curve, state)
    rows = tuple(
        (
            Number.count(point.n),
            point.strategy,
            range_cell(point.dropped) or "–",
            *_loss_cells(point.loss),
            Number.estimate(curve.lost(point), sign=True),
            _verdict(curve, point, state),
            Number.of(point.seconds, digits=0),
        )
        for point in points
    )
    head = ("n", "strategy", "drop", "loss", "of ln V", "more than whole", "verdict", "seconds")
    return Table(
        f"Layers less, {_of_state(curve, state)}: nats a token",
        head,
        rows,
        _losses_note(curve, points),
        wide=("seconds",),
        is_grouped=True,
    )


def _loss_cells(loss: Loss | None) -> tuple[Number, Number]:
    if loss is None:
        return Number("–"), Number("–")
    return Number.of(loss.nats, loss.stderr), Number.of(loss.normalized, digits=2)


def _verdict(curve: Curve, point: CurvePoint, state: State) -> str:
    """Say whether a cut is the best of its size and state, or cannot be told from it."""
    best, behind = curve.best(point.n, state), curve.behind(point)
    if best is None or behind is None or len(curve.strategies) < 2:
        return ""
    return "best" if point.dropped == best.dropped else "tie" if behind.tied else ""


def _losses_note(curve: Curve, points: Sequence[CurvePoint]) -> str:
    notes = ["Of ln V: 1 is a uniform guess. More: paired by text."]
    if len(curve.strategies) > 1:
        tie = f"Tie: with the best of its size, within {TIE:g} standard errors."
        notes += [tie, BEST_OF_SEVERAL]
    as_whole = [
        f"{point.strategy} {point.n}"
        for point in points
        if (lost := curve.lost(point)) is not None and lost.tied
    ]
    if as_whole:
        notes.append(f"Ties with the whole model: {', '.join(as_whole)}.")
    return " ".join(notes)


def _scores(curve: Curve, task: str, state: State) -> Table:
    """Tabulate the scores of all cuts in one state on one task."""
    whole = curve.whole.task(task)
    assert whole is not None
    rows = []
    for point in _cuts(curve, state):
        scores = point.task(task)
        less = None if scores is None else scores.minus(whole)
        verdicts = ["at chance"] if scores is not None and scores.at_chance else []
        verdicts += ["tie"] if less is not None and less.tied else []
        row: tuple[Cell, ...] = (
            Number.count(point.n),
            point.strategy,
            range_cell(point.dropped) or "–",
            Number.estimate(scores, 1, scale=100),
            Number.estimate(less, 1, sign=True, scale=100),
            ", ".join(verdicts),
        )
        rows.append(row)
    chance = "" if whole.chance is None else f"; chance {100 * whole.chance:.1f}"
    measure = f"{whole.metric} in %, whole model {Number.estimate(whole, 1, scale=100).text}"
    return Table(
        f"{task}, {_of_state(curve, state)}: {measure}",
        ("n", "strategy", "drop", "score", "difference", "verdict"),
        tuple(rows),
        f"{counted(len(whole.items), 'item')} with "
        f"{counted(whole.num_shots, 'solved example')}{chance}; difference and "
        f"tie: with the whole model",
        is_grouped=True,
    )


def _speech(curve: Curve, state: State) -> Table:
    """Tabulate how all cuts in one state speak beside the whole model."""
    whole = curve.whole.speech
    assert whole is not None
    rows: list[tuple[Cell, ...]] = []
    for point in _cuts(curve, state):
        cells: list[Cell] = [speech_cell(name, point.speech) for name in CURVE_MEASURES]
        repeats = point.speech is not None and point.speech.repeats
        layers = range_cell(point.dropped) or "–"
        verdict = "repeats itself" if repeats else ""
        rows.append((Number.count(point.n), point.strategy, layers, *cells, verdict))
    repetition = speech_cell("repetition", whole).text
    return Table(
        f"Speech, {_of_state(curve, state)}: on the words of the whole model, and on its own",
        ("n", "strategy", "drop", *CURVE_MEASURES.values(), "verdict"),
        tuple(rows),
        f"{counted(whole.num_prompts, 'prompt')}, answers of {whole.num_tokens} tokens at most; of "
        f"the whole model's 4-grams {repetition} % are repeated. Repeats itself: more than twice "
        f"as much. Errors are over prompts.",
        is_grouped=True,
    )


def _failures(points: Sequence[CurvePoint]) -> Table:
    rows = tuple(
        (Number.count(point.n), point.strategy, point.state, point.failed or "") for point in points
    )
    return Table("What could not be measured", ("n", "strategy", "state", "why"), rows)


def _numbers(curve: Curve) -> Section:
    facts = (
        []
        if curve.whole.loss is None
        else [loss_fact("whole", curve.whole.loss, f"{CURVE_FILE}: points, the first")]
    )
    facts += [
        Fact(
            f"{one.task}, {one.metric}",
            Number(str(one), one.mean),
            f"{CURVE_FILE}: points, the first; {counted(len(one.items), 'item')} with "
            f"{counted(one.num_shots, 'solved example')}",
        )
        for one in curve.whole.tasks
    ]
    facts += made_by(curve.versions, f"{CURVE_FILE}: versions")
    line = f"All rows above are {CURVE_FILE}: points, with all their digits."
    return Section("Every number, and where it is from", (line,), tuple(facts))


def _again(command: str, folder: str) -> Section:
    known = command or "shallower curve MODEL --texts TEXTS --eval-texts TEXTS --out CURVE"
    return again(
        "The curve, and this page.", known, command_line("report", out_of(command, folder))
    )
