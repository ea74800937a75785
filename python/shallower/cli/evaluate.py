"""``shallower eval``; :func:`_measures` makes those of ``studies/measures.py`` from its options."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.source import ModelSource
from .options import (
    BatchSize,
    DeviceMap,
    DeviceMemory,
    Drop,
    DropExperts,
    DryRun,
    Dtype,
    ExpertsPlan,
    GgufFile,
    Json,
    MaxLength,
    MaxTexts,
    Model,
    NoCache,
    On,
    Overwrite,
    PlanPath,
    ShardOption,
    Stream,
    TrustRemoteCode,
    Workers,
    named_cut,
    part_of,
    places,
    read_texts,
)
from .output import eval_names, say_dry_run, say_eval, say_eval_shard, say_known

if TYPE_CHECKING:
    from ..studies.evaluate import EvalJob, EvalPair, Results
    from ..studies.measures import Measure
    from ..texts.sources import Texts


def eval_command(
    model: Model,
    *,
    texts: Annotated[
        str | None,
        typer.Option(
            metavar="TEXTS",
            help="Held-out texts for the loss: a .jsonl, .txt or .parquet file, or a hub dataset.",
        ),
    ] = None,
    perplexity: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A text file for the perplexity in windows; of .jsonl and .parquet the "
            "documents, parted by a blank line.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks of lm-eval, comma-separated: boolq, gsm8k, hellaswag, lambada, mmlu, any "
            "other.",
        ),
    ] = None,
    speech: Annotated[
        str | None,
        typer.Option(
            metavar="[PROMPTS]",
            help="How it speaks beside the whole model, on prompts: a .jsonl file with prompt or "
            "messages; without one prompts of our own.",
        ),
    ] = None,
    speech_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of an answer of --speech at most.", min=1)
    ] = 64,
    drop: Drop = None,
    plan: PlanPath = None,
    drop_experts: DropExperts = None,
    experts_plan: ExpertsPlan = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Another checkpoint with the same tokenizer: what MODEL loses more, paired.",
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a window of --perplexity.", min=2)
    ] = 2048,
    bos: Annotated[
        bool, typer.Option("--bos", help="Begin each window with the beginning-of-text token.")
    ] = False,
    tasks_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of task files of lm-eval.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Data of task files; $SHALLOWER_DATA by default."),
    ] = None,
    max_items: Annotated[
        int | None,
        typer.Option(metavar="N", help="Items of a task at most, drawn by --seed.", min=1),
    ] = None,
    num_shots: Annotated[
        int | None,
        typer.Option(metavar="K", help="Solved examples before each item.", min=0),
    ] = None,
    pass_at: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Also sample K answers where the answer is text: pass@K.", min=1
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="S", help="Seed of items, examples and samples.", min=0)
    ] = 0,
    dtype: Dtype = "auto",
    max_length: MaxLength = 256,
    batch_size: BatchSize = "auto",
    max_texts: MaxTexts = None,
    device_map: DeviceMap = None,
    stream: Stream = False,
    gguf_file: GgufFile = None,
    device_memory: DeviceMemory = None,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for eval.json, which is what --json prints."),
    ] = None,
    overwrite: Overwrite = False,
    no_cache: NoCache = False,
    shard: ShardOption = None,
    on: On = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure loss, perplexity, tasks and speech before and after a cut.

    Or of one checkpoint --against another, as a patched cut and its source.
    """
    from ..store.store import open_store
    from ..values.tokens import Tokens, parse_batch_size

    part = part_of(shard, on, workers)
    layers, experts = None, None
    if is_cut := any(one is not None for one in (drop, plan, drop_experts, experts_plan)):
        layers, experts = named_cut(drop, plan, drop_experts, experts_plan=experts_plan)
    if against is not None:
        _check_against(is_cut=is_cut, is_shared=bool(part))
    job = _kind(part)(
        source=ModelSource(
            model, dtype, places(device_map, stream=stream), gguf_file, trust_remote_code
        ),
        measures=_measures(
            Tokens(max_length, parse_batch_size(batch_size)),
            texts=None if texts is None else _read(texts, max_texts, part),
            perplexity=None if perplexity is None else (perplexity, context, bos),
            tasks=None if tasks is None else (tasks, tasks_dir, data),
            speech=None if speech is None else (speech, speech_tokens),
            max_items=max_items,
            num_shots=num_shots,
            pass_at=pass_at,
            seed=seed,
        ),
        layers=layers,
        experts=experts,
        device_memory=device_memory,
        store=open_store(no_cache or dry_run),
        out=out,
        overwrite=overwrite,
        **part,
    )
    pair = None
    if against is not None:
        from ..studies.evaluate import EvalPair

        pair = EvalPair.of(job, against)
    if dry_run:
        job.check_place()
        job.prepare()
        named = {"against": against, "texts": texts, "perplexity": perplexity, "tasks": tasks}
        named |= {"speech": speech if speech != "" else "prompts of our own"}
        shared = part if shard is None else {"shard": str(part["shard"])}
        say_dry_run({**shared, **_described(job, pair, named)}, as_json)
    elif shard is not None:
        _carry_out_shard(job, as_json)
    elif pair is None:
        with ExitStack() as held:
            results = _results(job, held)
            _say(job, results, eval_names(model, job.plan), read=job.readings, as_json=as_json)
    else:
        _compare(pair, job, as_json)


def _compare(pair: "EvalPair", job: "EvalJob", as_json: bool) -> None:
    """Measure two checkpoints by the measures of ``job``, and print them."""
    pair.check_tokens()
    with ExitStack() as held:
        sides = {"against": _results(pair.against, held), "model": _results(pair.model, held)}
        results = {
            kind: {side: found[kind]["base"] for side, found in sides.items()}
            for kind in sides["model"]
        }
        read = [*pair.against.readings, *pair.model.readings]
        names = {
            name: str(one.source.path)
            for name, one in (("against", pair.against), ("model", pair.model))
        }
        _say(job, results, names, read=read, as_json=as_json)


def _kind(part: dict[str, Any]) -> "type[EvalJob]":
    """The evaluation that is asked for: of one process, a shard, or shared by workers."""
    if not part:
        from ..studies.evaluate import EvalJob

        return EvalJob
    from ..sharing.eval_shards import EvalShardJob, SharedEvalJob

    return EvalShardJob if "shard" in part else SharedEvalJob


def _check_against(*, is_cut: bool, is_shared: bool) -> None:
    """Refuse what two checkpoints cannot have beside them."""
    from ..errors import PlanError, SettingsError

    if is_cut:
        raise PlanError("--against compares two checkpoints: name no cut beside it (as --drop)")
    if is_shared:
        raise SettingsError(
            "--against compares two checkpoints, and shards are of one: measure each of the two "
            "by shards first, and --against without them finds both in the cache"
        )


def _read(texts: str, max_texts: int | None, part: dict[str, Any]) -> "Texts | list[str]":
    """The texts, read once; of a work that is shared they are named, for other processes."""
    found = read_texts(texts, max_texts)
    return found if part else list(found)


def _carry_out_shard(job: "EvalJob", as_json: bool) -> None:
    from ..sharing.eval_shards import EvalShardJob

    assert isinstance(job, EvalShardJob)
    if job.made is None:
        job.prepare()
        job.run_shard()
    say_eval_shard(job.file, as_json)
    if job.made is not None:
        say_known(job.made, job.file)


def _results(job: "EvalJob", held: ExitStack) -> "Results":
    """What is known of a model, or is measured now, with its place ``held`` from then on."""
    from ..sharing.eval_shards import SharedEvalJob
    from ..storage import claimed

    known = job.known()
    if known is not None:
        return known
    if job.file is not None:
        held.enter_context(claimed(job.file, job.overwrite))
    job.prepare()
    if isinstance(job, SharedEvalJob):
        return job.run_shared()
    return job.measure()


def _measures(
    tokens: Any, *, texts: Any, perplexity: Any, tasks: Any, speech: Any, **settings: Any
) -> "list[Measure[Any]]":
    """What is measured, in the order in which it is printed."""
    from ..errors import TextsError
    from ..studies.measures import LossOfTexts, PerplexityOfText, ScoresOnTasks, SpeechOnPrompts
    from ..texts.prompts import read_prompts
    from ..texts.sources import read_whole

    found: list[Measure[Any]] = []
    if texts is not None:
        found.append(LossOfTexts(texts, tokens))
    if perplexity is not None:
        path, context, bos = perplexity
        found.append(PerplexityOfText(read_whole(path), context, bos, tokens.batch_size, path))
    if tasks is not None:
        names, tasks_dir, data = tasks
        found.append(
            ScoresOnTasks(
                [name.strip() for name in names.split(",")],
                tasks_dir,
                data,
                settings,
                tokens.batch_size,
            )
        )
    if speech is not None:
        (place, num_tokens), size = speech, tokens.batch_size
        prompts, source = read_prompts(place or None), place or None
        found.append(SpeechOnPrompts(prompts, num_tokens, settings["seed"], size, source=source))
    if not found:
        raise TextsError("name what to measure: --texts, --perplexity, --tasks or --speech")
    return found


def _say(
    job: "EvalJob", results: "Results", names: dict[str, str], *, read: list[Any], as_json: bool
) -> None:
    """Print what was found, and write it where it is to be; what was cached is said."""
    from ..sharing.gather import write_evaluation

    values = {
        kind: {side: one.value for side, one in sides.items()} for kind, sides in results.items()
    }
    dtype = next(one.model.dtype for sides in results.values() for one in sides.values())
    if job.out is not None:
        write_evaluation(job.out, values, dtype, plan=job.plan, overwrite=job.overwrite)
    say_eval(values, dtype, job.plan, names=names, read=read, written=job.file, as_json=as_json)
    every = [(kind, one) for kind, sides in results.items() for one in sides.values()]
    made = [one.made for _, one in every if one.made]
    if made:
        losses = all(kind == "loss" for kind, _ in every)
        what = "one of the losses was " if losses else f"{len(made)} of {len(every)} results were "
        say_known(min(made), what="" if len(made) == len(every) else what)


def _described(
    job: "EvalJob", pair: "EvalPair | None", named: dict[str, str | None]
) -> dict[str, Any]:
    described: dict[str, Any] = {"eval": str(job.source)}
    if job.plan:
        described["drop"] = job.plan.words
    described |= {name: value for name, value in named.items() if value is not None}
    write = {} if job.file is None else {"write": [str(job.file)]}
    return {**described, **(pair or job).describe(), **write}
