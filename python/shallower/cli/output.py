"""Printing of the commands: text and tables for people, JSON for machines, warnings."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..models.offload import Reading
    from ..reporting.stories.evaluation import Values
    from ..reporting.writers.terminal import Part
    from ..scanning.scan import Scan
    from ..sharing.shards import MadeShard
    from ..sharing.share import AnyWork
    from ..store.done import Output
    from ..studies.compare import CompareStudy
    from ..studies.study import Study
    from ..values.plan import Plan
    from ..values.shard import Shard


_called: list[str] = []
_WITHOUT_EFFECT = frozenset({"--json", "--no-cache", "--overwrite"})
_SHARING = frozenset({"--workers", "--on", "--shard"})
"""Options with a value that changes no result."""


def remember_call(name: str, arguments: "Sequence[str]") -> None:
    """Keep the words of this call, to say how a result was made."""
    _called[:] = ["shallower", name, *arguments]


def called() -> str:
    """Give the words of this call, for a shell; of places that lie elsewhere their last part.

    What changes no result is left out.
    """
    from ..cutting.source import typed_place

    def shown(before: str, word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        is_out = "--out" in (before, option)
        name = typed_place(value)
        own = is_out and value and name != value  # of a place that is not there yet, too
        return f"{option}{equals}{Path(value).resolve().name if own else name}"

    words = [
        word
        for before, word in zip(["", *_called], _called, strict=False)
        if word not in _WITHOUT_EFFECT and not {before, word.partition("=")[0]} & _SHARING
    ]
    return shlex.join(map(shown, ["", *words], words))


def show(*parts: "Part") -> None:
    """Print text as it is; tables, sections and stories as the terminal's writer does."""
    if all(isinstance(part, str) for part in parts):
        print(*parts, sep="\n", end="\n" if parts else "")
        return
    from ..reporting.writers import terminal

    terminal.show(*parts)


def upload_line(folder: Path) -> str:
    """Give the command that puts a folder on the hub."""
    return f"to upload it: hf upload USER/NAME {shlex.quote(str(folder))}"


def print_json(value: Any) -> None:
    """Print one JSON value."""
    print(json.dumps(value, indent=2))


def say_dry_run(described: dict[str, Any], as_json: bool) -> None:
    """Print what would be done: files under ``write``, units of a study under ``measure``.

    A value that has ``to_json`` is printed as JSON by it. Of several processes the main one prints.
    """
    from ..processes import is_main_process

    if not is_main_process():
        return
    if as_json:
        plain = {
            name: to_json()
            for name, value in described.items()
            if (to_json := getattr(value, "to_json", None))
        }
        print_json({"dry_run": True, **described, **plain})
        return
    for name, value in described.items():
        if name == "write":
            show(*(f"would write {path}" for path in value))
        elif name == "measure":
            show(*(f"would measure {name}" for name in value))
        else:
            said = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
            show(f"{name}: {said}")


def say_dry_run_of(study: "Study[Any]", described: dict[str, Any], as_json: bool) -> None:
    """Print what a study would do, and what it takes: texts, memory, disk and time."""
    from ..studies.dry_run import describe

    write = {} if study.out is None else {"write": [str(study.out)]}
    units = {"measure": study.units(), **write}
    say_dry_run({**described, **describe(study), **units}, as_json)


def say_known(made: str, there: Path | None = None, *, what: str = "") -> None:
    """Say on standard error that a result was not measured anew, and how it would be.

    ``made`` is in ISO 8601; ``there`` is the output, if it lies in its place already; ``what``
    begins the sentence.
    """
    way_out = "(shallower cache; --no-cache measures anew)"
    if there is None:
        said = f"{what}cached, measured on {made[:10]} {way_out}"
    else:
        said = f"{there} is already there, made from the same inputs on {made[:10]} {way_out}"
    print(said, file=sys.stderr)


def reuse(
    output: "Output", say: "Callable[[dict[str, Any]], None]", there: Path | None = None
) -> bool:
    """Print what is there already, made from the same inputs; False if it must be made.

    ``say`` prints the report, from the value that was kept; ``there`` is the output's name, if it
    is not that of its folder.
    """
    known = output.find()
    if known is None:
        return False
    say(known.value)
    say_known(known.made, there or output.out)
    return True


def warn(message: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {message}", file=sys.stderr)


def say_scan(
    scanned: "Scan", written: list[Path], as_json: bool, *, reading: "Reading | None" = None
) -> None:
    """Print the best block of every size, what was rejected, read from disk and written."""
    from ..reporting.stories.stages import gathered, rejected, scan_table

    if as_json:
        counts = {} if reading is None else reading.to_json()
        print_json({**_described(scanned), **counts, "written": [str(path) for path in written]})
    else:
        weights = [f"weights: {scanned.model.dtype}"] if scanned.model else []
        wrote = (f"wrote {path}" for path in written)
        if scanned.distance is None:
            weights.append(f"{', '.join(scanned.metrics)} is no distance: it chooses no blocks")
        said = [str(one) for one in (scanned.settled, reading) if one is not None]
        said += gathered(scanned.contents.experts)
        show(scan_table(scanned), *weights, *rejected(scanned), *said, *wrote)


def work_of(kind: str, job: Any, part: dict[str, Any]) -> Any:
    """Give the work of which a part is asked for; None where one process does all of it."""
    if not part:
        return None
    from ..sharing.share import KINDS

    return KINDS[kind](job, **part)


def make_shard_of(work: "AnyWork", as_json: bool) -> None:
    """Make the shard of a work, unless it is there, and print what it has, and its file."""
    from ..sharing.shards import MadeShard
    from ..sharing.share import make_shard

    assert work.shard is not None
    made, place = work.made(work.shard), make_shard(work)
    facts, lines = _SHARDS[work.kind](MadeShard.load(place))
    if as_json:
        print_json({"shard": str(work.shard), **facts, "written": [str(place)]})
    else:
        show(*(f"shard {work.shard}: {line}" for line in lines), f"wrote {place}")
    if made is not None:
        say_known(made, place)


def carry_out(study: "CompareStudy", part: dict[str, Any], as_json: bool) -> Any:
    """Make a study, or let workers share it; of a shard print what it has, and give None."""
    work = work_of(study.settings.COMMAND, study, part)
    if work is None:
        return study.run()
    if work.shard is None:
        from ..sharing.share import share

        return share(work)
    make_shard_of(work, as_json)
    return None


def _of_batches(shard: "Shard", total: int, **counts: int) -> tuple[dict[str, Any], str]:
    mine = shard.of(total)
    facts = {"batches": [mine.start, mine.stop], "num_batches": total, **counts}
    return facts, f"batches [{mine.start}, {mine.stop}) of {total}"


def _of_scan(done: "MadeShard") -> tuple[dict[str, Any], list[str]]:
    from ..scanning.scan_file import read_text
    from ..values.counts import counted

    (value,), total = done.values.values(), done.common["number of batches"]
    sums = read_text(value["content"]).sums
    counts = {"num_samples": sums.count, "num_rejected": sums.rejected}
    facts, words = _of_batches(done.shard, total, **counts)
    return facts, [f"{words}, {counted(sums.count, 'sample')}"]


def _of_eval(done: "MadeShard") -> tuple[dict[str, Any], list[str]]:
    from ..values.counts import counted

    facts, lines = {}, []
    (value,), totals = done.values.values(), done.common["number of batches"]
    for kind, part in value["tallies"].items():
        count = len(part["items"])
        facts[kind], words = _of_batches(done.shard, totals[kind], num_measured=count)
        lines.append(f"{kind}, {words}, {counted(count, 'text' if kind == 'loss' else 'window')}")
    return facts, lines


def _of_study(done: "MadeShard") -> tuple[dict[str, Any], list[str]]:
    units = done.described["units"]
    mine = units[done.shard.index :: done.shard.count]
    facts = {"parts": mine, "num_parts": len(units)}
    return facts, [f"{len(mine)} of {len(units)} parts"]


_SHARDS: dict[str, Any] = {
    "scan": _of_scan,
    "eval": _of_eval,
    "compare": _of_study,
    "curve": _of_study,
}
"""What a shard has, as JSON values and in words, by the kind of its work."""


def eval_names(model: str, plan: "Plan | None") -> dict[str, str]:
    """Name the sides of an evaluation in words: the model alone, or all its layers and the cut."""
    if plan is None:
        return {"base": Path(model).name}
    whole = "all layers" if plan.experts is None else "whole model"
    return {"base": whole, "cut": f"without {plan.words}"}


def say_eval(
    values: "Values",
    dtype: str,
    plan: "Plan | None",
    *,
    names: dict[str, str],
    read: "Sequence[Reading]" = (),
    written: "Sequence[Path]",
    as_json: bool,
) -> None:
    """Print what was found of a model and of a cut, what was read from disk, and the files."""
    from ..reporting.stories.evaluation import evaluation_parts, evaluation_record
    from ..values.counts import summed

    if as_json:
        counts = summed(one.to_json() for one in read)
        print_json({**evaluation_record(values, dtype, plan), **counts})
    else:
        wrote = (f"wrote {path}" for path in written)
        show(*evaluation_parts(values, names), f"weights: {dtype}", *map(str, read), *wrote)


def _described(scanned: "Scan") -> dict[str, Any]:
    sizes = [] if scanned.distance is None else range(1, scanned.num_layers)
    blocks = [scanned.best_block(n) for n in sizes]
    settled = {} if scanned.settled is None else {"settled": scanned.settled.by_size}
    return {
        "samples": sum(texts.num_texts for texts in scanned.texts) or scanned.num_sequences,
        **settled,
        **_experts(scanned),
        "num_layers": scanned.num_layers,
        "dtype": scanned.model and scanned.model.dtype,
        "positions": str(scanned.positions),
        "num_samples": scanned.num_samples,
        "num_sequences": scanned.num_sequences,
        "num_rejected": scanned.num_rejected,
        "rejections": [str(rejection) for rejection in scanned.rejections],
        "blocks": [{"n": len(block), **block.to_json()} for block in blocks],
    }


def _experts(scanned: "Scan") -> dict[str, Any]:
    """What a scan has of experts, if it has."""
    found = scanned.contents.experts
    if found is None:
        return {}
    unrouted = {str(layer): list(experts) for layer, experts in found.unrouted.items()}
    of = {"num_experts": found.routing.num_experts, "layers": list(found.layers)}
    return {"experts": {**of, "unrouted": unrouted, "left_out": found.left_out}}
