"""``shallower eval``."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.source import ModelSource
from .options import (
    BatchSize,
    DeviceMap,
    DeviceMemory,
    Drop,
    DryRun,
    Dtype,
    GgufFile,
    Json,
    MaxLength,
    MaxTexts,
    Model,
    NoCache,
    PlanPath,
    Stream,
    TrustRemoteCode,
    named_layers,
    places,
    read_texts,
)
from .output import print_json, say_dry_run, say_known, show

if TYPE_CHECKING:
    from ..runs.evaluate import EvalJob, EvalPair, Measure, Results
    from ..values.plan import Plan


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
    drop: Drop = None,
    plan: PlanPath = None,
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
    no_cache: NoCache = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure loss, perplexity and tasks, before and after a cut.

    Or of one checkpoint --against another, as a patched cut and its source.
    """
    from ..errors import PlanError
    from ..runs.evaluate import EvalJob, EvalPair
    from ..runs.store import open_store
    from ..values.tokens import Tokens, parse_batch_size

    if against is not None and not (drop is None and plan is None):
        raise PlanError("--against compares two checkpoints: leave out --drop and --plan")
    job = EvalJob(
        source=ModelSource(
            model, dtype, places(device_map, stream=stream), gguf_file, trust_remote_code
        ),
        measures=_measures(
            Tokens(max_length, parse_batch_size(batch_size)),
            texts=None if texts is None else (texts, max_texts),
            perplexity=None if perplexity is None else (perplexity, context, bos),
            tasks=None if tasks is None else (tasks, tasks_dir, data),
            max_items=max_items,
            num_shots=num_shots,
            pass_at=pass_at,
            seed=seed,
        ),
        layers=None if drop is None and plan is None else named_layers(drop, plan),
        device_memory=device_memory,
        store=open_store(no_cache or dry_run),
    )
    wanted, pair = job.plan, None
    if against is not None:
        other = replace(job, source=replace(job.source, path=against, gguf_file=None))
        pair = EvalPair(model=job, against=other)
    if dry_run:
        job.prepare()
        named = {"against": against, "texts": texts, "perplexity": perplexity, "tasks": tasks}
        say_dry_run(_described(job, wanted, pair, named), as_json)
        return
    if pair is None:
        from ..values.layers import ranges

        results, names = _results(job), {"base": "all layers"}
        if wanted:
            names["cut"] = f"without {ranges(wanted.dropped)}"
        else:
            names["base"] = Path(model).name
    else:
        pair.check_tokens()
        sides = {"against": _results(pair.against), "model": _results(job)}
        results = {
            kind: {side: found[kind]["base"] for side, found in sides.items()}
            for kind in sides["model"]
        }
        names = {"against": str(against), "model": str(model)}
    _say(results, names, wanted, as_json=as_json)
    _say_known(results)


def _results(job: "EvalJob") -> "Results":
    """What is known of a model, or is measured now; the model is given free then."""
    known = job.known()
    if known is not None:
        return known
    job.prepare()
    return job.measure(*job.source.load())


def _measures(
    tokens: Any, *, texts: Any, perplexity: Any, tasks: Any, **settings: int | None
) -> "list[Measure[Any]]":
    """What is measured, in the order in which it is printed."""
    from ..errors import TextsError
    from ..runs.evaluate import LossOfTexts, PerplexityOfText, ScoresOnTasks
    from ..texts.sources import read_whole

    found: list[Measure[Any]] = []
    if texts is not None:
        found.append(LossOfTexts(list(read_texts(*texts)), tokens))
    if perplexity is not None:
        path, context, bos = perplexity
        found.append(PerplexityOfText(read_whole(path), context, bos, tokens.batch_size))
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
    if not found:
        raise TextsError("name what to measure: --texts, --perplexity or --tasks")
    return found


def _say_known(results: "Results") -> None:
    """Say on standard error which results were measured before."""
    every = [(kind, one) for kind, sides in results.items() for one in sides.values()]
    made = [one.made for _, one in every if one.made]
    if made:
        losses = all(kind == "loss" for kind, _ in every)
        what = "one of the losses was " if losses else f"{len(made)} of {len(every)} results were "
        say_known(min(made), what="" if len(made) == len(every) else what)


def _described(
    job: "EvalJob",
    wanted: "Plan | None",
    pair: "EvalPair | None",
    named: dict[str, str | None],
) -> dict[str, Any]:
    from ..values.layers import ranges

    described: dict[str, Any] = {"eval": str(job.source)}
    if wanted:
        described["drop"] = ranges(wanted.dropped)
    described |= {name: value for name, value in named.items() if value is not None}
    if pair is None:
        return {**described, "memory": job.memory(job.source)}
    larger, memory = pair.larger()
    loaded = f"one after the other; {larger.source} needs more memory"
    return {**described, "loaded": loaded, "memory": memory}


def _say(
    results: "Results", names: dict[str, str], wanted: "Plan | None", *, as_json: bool
) -> None:
    from ..reporting.stories.evaluation import evaluation_json, evaluation_parts

    values = {
        kind: {side: one.value for side, one in sides.items()} for kind, sides in results.items()
    }
    dtype = next(one.model.dtype for sides in results.values() for one in sides.values())
    if as_json:
        drop = {"drop": [block.to_json() for block in wanted.blocks]} if wanted else {}
        print_json({**evaluation_json(values), "dtype": dtype, **drop})
    else:
        show(*evaluation_parts(values, names), f"weights: {dtype}")
