"""Options that several commands share, and those made of the fields of ``values/options.py``."""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import typer

from ..models.dtypes import Dtype as DtypeName
from ..values.options import Option, options_of
from ..values.settings import CompareSettings, RunSettings
from ..values.stage_settings import EvalSettings

if TYPE_CHECKING:
    from ..cutting.plans import NamedLayers
    from ..studies.answers import WantedAnswers
    from ..texts.sources import Texts
    from ..values.layers import Block
    from ..values.plan import Plan

T = TypeVar("T")


def takes(kind: type, *names: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Give a command the options of all fields of its settings, or of those that are named.

    The command has one parameter of that kind, for the value that the options make.
    """
    options = options_of(kind)
    options = {name: options[name] for name in names or options}

    def with_options(command: Callable[..., T]) -> Callable[..., T]:
        shown = dict(signature(command).parameters)
        place = next(name for name, one in shown.items() if one.annotation is kind)
        order = [*shown]
        at = order.index(place)
        for name, one in options.items():
            made = _parameters(kind, name, one)
            before = [order.index(each) for each in (one.before or "").split() if each in order]
            at = min(before, default=at)
            order[at:at] = made
            at += len(made)
            shown |= made
        order.remove(place)

        @wraps(command)
        def called(**given: Any) -> T:
            values: dict[str, Any] = {}
            for name, one in options.items():
                values |= _value(name, one, given)
            return command(**given, **{place: kind(**values)})

        vars(called)["__signature__"] = Signature([shown[name] for name in order])
        called.__annotations__ = {name: shown[name].annotation for name in order}
        return called

    return with_options


def _parameters(kind: type, name: str, one: Option) -> dict[str, Parameter]:
    """The parameters by which a command gives a field."""
    default = next(each.default for each in fields(kind) if each.name == name)
    of = _type(get_type_hints(kind)[name], one)
    if one.alone is not ...:
        default = None
    elif isinstance(default, tuple):
        default = ",".join(map(str, default)) or None
    elif one.read is not None and default is not None:
        default = str(default)
    both = of is bool and default is not False
    made = [(name, of if default is not None else of | None, _option(one, default, both=both))]
    if one.off is not None:
        made.append((f"no_{name}", bool, _option_off(one, False)))
    return {
        each: Parameter(each, Parameter.KEYWORD_ONLY, annotation=of, default=option)
        for each, of, option in made
    }


def _type(kind: Any, one: Option) -> Any:
    """The type of an option by that of its field, which may be more that Python alone can give."""
    if one.read is not None or one.alone is not ...:
        return str
    kinds = get_args(kind)
    is_one = not kinds or isinstance(kinds[0], str)  # a class, or some words
    return kind if is_one else next(one for one in (bool, Path, str, kinds[0]) if one in kinds)


def _words(one: Option) -> tuple[str, str]:
    """The words of an option: that which gives it, and that which takes it away."""
    name = one.name.replace("_", "-")
    return f"--{name}", f"--no-{name}"


def _option(one: Option, *default: Any, both: bool = False) -> Any:
    """An option as typer has it, with its default where it is no annotation."""
    words = "/".join(_words(one)) if both else _words(one)[0]
    return typer.Option(*default, words, metavar=one.metavar, help=one.sentence, min=one.least)


def _option_off(one: Option, *default: Any) -> Any:
    """The option that takes a field away, as :func:`_option`."""
    return typer.Option(*default, _words(one)[1], help=one.off and one.off[0])


def _same(kind: type, name: str) -> Any:
    """The option of a field of settings, for the annotation of a parameter."""
    return _option(options_of(kind)[name])


def _without(kind: type, name: str) -> Any:
    """The option that takes such a field away, likewise."""
    return _option_off(options_of(kind)[name])


def _value(name: str, one: Option, given: dict[str, Any]) -> dict[str, Any]:
    """Take out of what is given the value of a field; nothing where its default stands."""
    word, is_off = given.pop(name), given.pop(f"no_{name}", False)
    if one.off is not None and is_off:
        return {name: one.off[1]}
    if word == "" and one.alone is not ...:
        return {name: one.alone}
    if word is None:
        return {}
    return {name: word if one.read is None else one.read(word)}


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local folder, a hub id, or a .gguf file.")
]
TextsSource = Annotated[
    str,
    typer.Option(
        metavar="TEXTS",
        help="A .jsonl file (field text), a .txt file (a document a line), a .parquet file, or a "
        "hub dataset as id:split or id:config:split.",
    ),
]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write to.")]
CutOut = Annotated[
    Path,
    typer.Option(metavar="PATH", help="Folder to write to, or a .gguf file if MODEL is one."),
]
Dtype = Annotated[
    DtypeName,
    typer.Option(
        help="Dtype of the weights. auto: bfloat16 on CUDA and on CPUs that multiply it, else "
        "float32. nf4 and int8 by bitsandbytes."
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="MAP",
        help="Devices, as transformers takes them; every GPU by default, without one the CPU.",
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Keep the layers on disk, and read each for many texts: for a model that does "
        "not fit into memory.",
    ),
]
GgufFile = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Name of a GGUF file in MODEL's folder or repository."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with MODEL.")
]
MaxTexts = Annotated[int | None, _same(EvalSettings, "max_texts")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier output once the new is complete.")
]
OverwriteParts = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace earlier results in --out, part by part as new ones are there."
    ),
]
DeviceMemory = Annotated[str | None, _same(CompareSettings, "device_memory")]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Measure anew: neither read nor write the cache.")
]
On = Annotated[
    Literal["local", "ray"] | None,
    typer.Option(
        help="Share the work among processes of this machine (local), or on the Ray cluster that "
        "RAY_ADDRESS names, or else one of this machine (ray)."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Processes that share the work, each with models of its own; with ray by default as "
        "many as there is room for.",
        min=1,
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Do one of N parts alone, counted from 0, for gather; auto: that of RANK or "
        "SLURM_ARRAY_TASK_ID.",
    ),
]
Answers = Annotated[str | None, _same(RunSettings, "answers")]
NoAnswers = Annotated[bool, _without(RunSettings, "answers")]
AnswerTokens = Annotated[
    int, typer.Option(metavar="N", help="Tokens of an answer that is written, at most.", min=1)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Drop = Annotated[
    str | None,
    typer.Option(
        metavar="LAYERS", help="Layers to drop: indices and half-open ranges, as 3,12:20."
    ),
]
PlanPath = Annotated[
    Path | None,
    typer.Option("--plan", metavar="PLAN", help="Plan to carry out: a file, or its folder."),
]
DropExperts = Annotated[
    str | None,
    typer.Option(
        metavar="EXPERTS",
        help="Experts to drop, as many of every layer that has any, as 0:3,5;1:8:10; or a file "
        "of such lines.",
    ),
]
ExpertsPlan = Annotated[
    Path | None,
    typer.Option(
        metavar="PLAN", help="Plan of experts to drop beside layers; alone it goes by --plan."
    ),
]


def read_texts(source: str, max_texts: int | None = None) -> "Texts":
    """Open texts, as ``--texts`` names them, and read the first, before anything that takes long.

    They can be read again. Raises TextsError if there are none or the first cannot be read, and
    MissingExtraError if the package datasets is needed and not installed.
    """
    from ..texts.sources import Texts

    return Texts(source, max_texts).check()


def read_apart(
    texts: str | None,
    eval_texts: str | None,
    *,
    max_texts: int | None,
    max_eval_texts: int | None = None,
) -> "tuple[Texts | list[str], Texts | None]":
    """Open texts and held-out ones, as :func:`read_texts`; TextsError if they share any."""
    from ..texts.splits import refuse_shared

    source: Texts | list[str] = [] if texts is None else read_texts(texts, max_texts)
    held_out = None if eval_texts is None else read_texts(eval_texts, max_eval_texts)
    refuse_shared(source, held_out)
    return source, held_out


def wanted_answers(
    answers: str, steps: int | None = None, *, num_tokens: int, seed: int = 0
) -> "WantedAnswers":
    """Read what ``--answers`` names, for a patch or ``steps`` of a training.

    TextsError: there are no prompts in the file.
    """
    from ..studies.answers import WantedAnswers, answers_for
    from ..texts.prompts import read_prompts

    prompts = read_prompts(answers) if answers else None
    return WantedAnswers(prompts, answers_for(steps), num_tokens, seed)


def part_of(shard: str | None, on: str | None, workers: int | None) -> dict[str, Any]:
    """Read which part of a work is asked for: a ``shard``, or ``workers`` that share all of it.

    Empty where one process does the work. ScanError: both, or a shard that is not there.
    """
    from ..errors import ScanError
    from ..values.shard import Shard

    is_shared = on is not None or workers is not None
    if shard is None:
        return {"on": on or "local", "workers": workers} if is_shared else {}
    if is_shared:
        raise ScanError("a shard is made by one process: leave out --workers and --on")
    return {"shard": Shard.parse(shard)}


def named_layers(drop: str | None, plan: Path | None) -> "Plan | list[Block]":
    """Read the layers behind ``--drop`` or ``--plan``, before anything that takes long.

    A plan is a file or its folder. Raises LayersError if neither or both are named or ``drop`` does
    not name layers, and PlanError if the plan is not there, or is damaged.
    """
    from ..cutting.plans import load_plan
    from ..errors import LayersError
    from ..values.layers import parse_layers

    if drop is None and plan is None:
        raise LayersError("name the layers to drop, by --drop as 12:20, or by --plan")
    if drop is not None and plan is not None:
        raise LayersError(f"--drop {drop} and --plan {plan} both name the layers to drop: give one")
    return load_plan(plan) if plan is not None else parse_layers(drop or "")


def named_cut(
    drop: str | None,
    plan: Path | None,
    experts: str | None,
    *,
    experts_plan: Path | None,
) -> "tuple[Plan | list[Block], Plan | dict[int, tuple[int, ...]] | None]":
    """Read layers, and experts of those that stay, before anything that takes long.

    Raises as :func:`named_layers`, where no experts are named; ExpertsError if both options name
    them or a text of them cannot be read, and PlanError if a plan of them is damaged.
    """
    from ..cutting.plans import load_plan
    from ..errors import ExpertsError
    from ..values.experts import parse_experts

    if experts is not None and experts_plan is not None:
        raise ExpertsError("name the experts to drop by --drop-experts or --experts-plan, not both")
    if experts is None and experts_plan is None:
        return named_layers(drop, plan), None
    named = load_plan(experts_plan) if experts_plan is not None else parse_experts(experts or "")
    return [] if drop is None and plan is None else named_layers(drop, plan), named


def named_states(
    states: str | None, drop: str | None, plan: Path | None, **experts: Any
) -> "tuple[NamedLayers, Plan | dict[int, tuple[int, ...]] | None]":
    """Read the states that a cut is made for, or else as :func:`named_cut`.

    LayersError: something else is named beside the states, or they cannot be read.
    """
    from ..cutting.for_states import ForStates
    from ..errors import LayersError

    if states is None:
        return named_cut(drop, plan, **experts)
    if any(one is not None for one in (drop, plan, *experts.values())):
        raise LayersError(
            "--for-states decides what goes: name no layers (--drop, --plan) and no experts "
            "(--drop-experts, --experts-plan) beside it"
        )
    return ForStates.parse(states), None


def places(device_map: str | None, *, stream: bool) -> str | None:
    """The device map by its option, or that of a model that is streamed."""
    from ..errors import ModelError
    from ..models.dtypes import STREAM

    if stream and device_map not in (None, STREAM):
        raise ModelError(
            f"--stream beside --device-map {device_map}: what is streamed goes to the first GPU, "
            f"or the CPU"
        )
    return STREAM if stream else device_map
