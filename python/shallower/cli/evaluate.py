"""``shallower eval``, whose options are the fields of ``EvalSettings``."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import PlanError, SettingsError
from ..settings.options import Option
from ..settings.stages import EvalSettings
from .options import Cut, DeviceMemory, Loading, Model, Share, Way
from .output import eval_names, make_shard_of, say_dry_run, say_eval, say_known, work_of

if TYPE_CHECKING:
    from ..sharing.eval_work import EvalWork
    from ..studies.evaluate import EvalJob, Results


def eval_command(
    *,
    model: Model,
    settings: EvalSettings,
    cut: Cut,
    against: Annotated[
        str | None,
        Option(
            "Another checkpoint with the same tokenizer: what MODEL loses more, paired.",
            "MODEL",
            "measures",
        ),
    ] = None,
    source: Loading,
    device_memory: DeviceMemory = None,
    out: Annotated[
        Path | None,
        Option("Folder for eval.json, which is what --json prints.", "FOLDER", "output"),
    ] = None,
    card: Annotated[
        bool,
        Option("Put the results on MODEL's card, into its model-index.", group="output"),
    ] = False,
    part: Share,
    way: Way,
) -> None:
    """Measure loss, perplexity, tasks and speech before and after a cut.

    Or of one checkpoint --against another, as a patched cut and its source.
    """
    from ..studies.evaluate import EvalJob, items_in, measures_of, paired

    shared, is_shard = part.read(), part.shard is not None
    layers, experts = cut.read_all() if cut.is_named else (None, None)
    if against is not None:
        _check_against(is_cut=cut.is_named, is_shared=bool(shared))
    of = source.of(model)
    place = _card(of.place, is_cut=cut.is_named, is_shard=is_shard) if card else None
    job = EvalJob(
        source=of,
        measures=measures_of(settings, is_shared=bool(shared)),
        layers=layers,
        experts=experts,
        device_memory=device_memory,
        store=way.open_store(),
        out=out,
        overwrite=way.overwrite,
    )
    work: EvalWork | None = work_of("eval", job, shared)
    pair = None if against is None else paired(job, against)
    said: dict[str, Any] = {"card": place, "as_json": way.as_json}
    if way.dry_run and (is_shard or not _is_made(job, pair)):
        if not is_shard:
            job.check_place()
        job.prepare()
        named = {"against": against, **items_in(settings)}
        say_dry_run(_described(job, work or job, pair, named), way.as_json)
    elif work is not None and work.shard is not None:
        job.prepare()
        make_shard_of(work, way.as_json)
    elif pair is None:
        with ExitStack() as held:
            results = _results(job, held, work)
            _say(job, results, eval_names(model, job.plan), read=job.readings, **said)
    else:
        _compare(*pair, job, **said)


def _is_made(job: "EvalJob", pair: "tuple[EvalJob, EvalJob] | None") -> bool:
    """Whether there is a file that is not to be replaced, and nothing is left to measure."""
    if job.file is None or job.overwrite or not job.file.exists():
        return False
    jobs = pair or [job]
    return all(one.known() is not None for one in jobs)


def _compare(
    model: "EvalJob", against: "EvalJob", job: "EvalJob", *, card: Path | None, as_json: bool
) -> None:
    """Measure two checkpoints by the measures of ``job``, and print them."""
    from ..studies.evaluate import check_tokens

    check_tokens(model, against)
    jobs = {"against": against, "model": model}
    with ExitStack() as held:
        sides = {side: _results(one, held) for side, one in jobs.items()}
        results = {
            kind: {side: found[kind]["base"] for side, found in sides.items()}
            for kind in sides["model"]
        }
        read = [reading for one in jobs.values() for reading in one.readings]
        names = {side: str(one.source.path) for side, one in jobs.items()}
        _say(job, results, names, read=read, card=card, as_json=as_json)


def _check_against(*, is_cut: bool, is_shared: bool) -> None:
    """Refuse what two checkpoints cannot have beside them."""
    if is_cut:
        raise PlanError("--against compares two checkpoints: name no cut beside it (as --drop)")
    if is_shared:
        raise SettingsError(
            "--against compares two checkpoints, and shards are of one: measure each of the two "
            "by shards first, and --against without them finds both in the cache"
        )


def _card(model: Path, *, is_cut: bool, is_shard: bool) -> Path:
    """The card of a model, checked; results that are not of the model as it is are refused."""
    from ..cutting.source import card_at
    from ..reporting.results import check_results

    if is_cut or is_shard:
        what = "name no cut (as --drop)" if is_cut else "leave out --shard"
        raise SettingsError(f"--card puts all results of MODEL as it is on its card: {what}")
    card = card_at(model.expanduser())
    check_results(card)
    return card


def _results(job: "EvalJob", held: ExitStack, work: "EvalWork | None" = None) -> "Results":
    """What is known of a model, or is measured now, with its place ``held`` from then on."""
    from ..storage import claimed

    known = job.known()
    if known is not None:
        return known
    if job.file is not None:
        held.enter_context(claimed(job.file, job.overwrite))
    job.prepare()
    if work is None:
        return job.measure()
    from ..sharing.share import share

    found: Results = share(work)
    return found


def _say(
    job: "EvalJob",
    results: "Results",
    names: dict[str, str],
    *,
    read: list[Any],
    card: Path | None,
    as_json: bool,
) -> None:
    """Print what was found, and write it where it is to be; what was cached is said."""
    from ..reporting.results import write_evaluation
    from ..studies.evaluate import values_and_dtype

    values, dtype = values_and_dtype(results)
    if job.out is not None:
        write_evaluation(job.out, values, dtype, plan=job.plan, overwrite=job.overwrite)
    if card is not None:
        from ..reporting.results import state_results
        from ..reporting.stories.evaluation import measured_results

        texts = {one.kind: one.source or "" for one in job.measures}
        state_results(card, measured_results(values, texts))
    written = [path for path in (job.file, card) if path is not None]
    say_eval(values, dtype, job.plan, names=names, read=read, written=written, as_json=as_json)
    every = [(kind, one) for kind, sides in results.items() for one in sides.values()]
    made = [one.made for _, one in every if one.made]
    if made:
        losses = all(kind == "loss" for kind, _ in every)
        what = "one of the losses was " if losses else f"{len(made)} of {len(every)} results were "
        say_known(min(made), what="" if len(made) == len(every) else what)


def _described(
    job: "EvalJob",
    work: "EvalWork | EvalJob",
    pair: "tuple[EvalJob, EvalJob] | None",
    named: dict[str, Any],
) -> dict[str, Any]:
    described: dict[str, Any] = {"eval": str(job.source)}
    if job.plan:
        described["drop"] = job.plan.words
    named = {name: what for name, what in named.items() if what is not None}
    described |= {name: what or "prompts of our own" for name, what in named.items()}
    write = {} if job.file is None else {"write": [str(job.file)]}
    if pair is None:
        return {**described, **write, **work.describe()}
    from ..studies.evaluate import describe_both

    return {**described, **write, **describe_both(*pair)}
