"""The options of commands: of parameters, and of the fields of dataclasses that they take."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import typer

from ..errors import LayersError, ModelError, ScanError
from ..models.dtypes import STREAM
from ..models.dtypes import Dtype as DtypeName
from ..models.source import ModelSource
from ..settings import options as option
from ..settings.options import Option, options_of
from ..settings.stages import EvalSettings
from ..settings.studies import CompareSettings, RunSettings
from .help import ALL

if TYPE_CHECKING:
    from ..cutting.plans import NamedLayers
    from ..store.store import Store
    from ..studies.answers import WantedAnswers
    from ..texts.sources import Texts
    from ..values.layers import Block
    from ..values.plan import Plan

T = TypeVar("T")


def with_options(command: Callable[..., T]) -> Callable[..., T]:
    """Give a command the options of its parameters, as typer reads them.

    A parameter ``Annotated[type, Option(...)]`` is one option. One of a dataclass stands for the
    options of all its fields, or of those that are named: ``Annotated[RunSettings, "n"]``. An
    ``Option`` behind it stands for that of its name.
    """
    takes: dict[str, tuple[Any, dict[str, Option]]] = {}
    shown: list[Parameter] = []
    for name, one in signature(command).parameters.items():
        kind, *more = get_args(one.annotation) or (one.annotation,)
        if isinstance(kind, type) and is_dataclass(kind):
            declared, types = options_of(kind), get_type_hints(kind)
            for each in (one for one in more if isinstance(one, Option)):
                declared.pop(each.name)  # the last of its group
                declared[each.name] = each
            named = [field for field in more if isinstance(field, str)]
            defaults = {each.name: each.default for each in fields(kind)}
            takes[name] = kind, {field: declared[field] for field in named or declared}
            for field, each in takes[name][1].items():
                shown += _parameters(field, types[field], each, defaults[field])
        elif more and isinstance(more[0], Option):
            takes[name] = None, {name: more[0]}
            shown += _parameters(name, kind, more[0], one.default)
        else:
            shown.append(one)

    @wraps(command)
    def called(**given: Any) -> T:
        for name, (kind, declared) in takes.items():
            values: dict[str, Any] = {}
            for field, one in declared.items():
                values |= _value(field, one, given)
            given |= values if kind is None else {name: kind(**values)}
        given.pop("help_all", None)
        return command(**given)

    shown.append(_parameter("help_all", bool, ALL))
    vars(called)["__signature__"] = Signature(shown)
    called.__annotations__ = {one.name: one.annotation for one in shown}
    return called


def _parameters(name: str, kind: Any, one: Option, default: Any) -> list[Parameter]:
    """The parameters of a command that an option is given by."""
    of = _type(kind, one)
    if default is Parameter.empty:
        default = ...
    elif one.alone is not ...:
        default = None
    elif isinstance(default, tuple):
        default = ",".join(map(str, default)) or None
    elif one.read is not None and default is not None:
        default = str(default)
    word = (one.name or name).replace("_", "-")
    words = f"--{word}/--no-{word}" if of is bool and default is not False else f"--{word}"
    panel: Any = {"rich_help_panel": one.group}
    shown = {"metavar": one.metavar, "help": one.sentence, "min": one.least, **panel}
    of = of if default is not None else of | None
    made = [_parameter(name, of, typer.Option(default, words, **shown))]
    if one.off is not None:
        off = typer.Option(False, f"--no-{word}", help=one.off[0], **panel)
        made.append(_parameter(f"no_{name}", bool, off))
    return made


def _parameter(name: str, kind: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=default)


def _type(kind: Any, one: Option) -> Any:
    """The type of an option by that of its field, which may be more that Python alone can give."""
    if one.read is not None or one.alone is not ...:
        return str
    kinds = get_args(kind)
    is_one = not kinds or isinstance(kinds[0], str)  # a class, or some words
    return kind if is_one else next(one for one in (bool, Path, str, kinds[0]) if one in kinds)


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
    Option(
        "A .jsonl file (field text), a .txt file (a document a line), a .parquet file, or a hub "
        "dataset as id:split or id:config:split.",
        "TEXTS",
    ),
]
Out = Annotated[Path, Option("Folder to write to.", "FOLDER")]
MaxTexts = Annotated[int | None, options_of(EvalSettings)["max_texts"]]
DeviceMemory = Annotated[str | None, options_of(CompareSettings)["device_memory"]]
ANSWERS = replace(options_of(RunSettings)["answers"], alone="")
Answers = Annotated[str | Literal[False] | None, ANSWERS]
AnswerTokens = Annotated[
    int, Option("Tokens of an answer that is written, at most.", "N", "repair", least=1)
]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How models are loaded."""

    dtype: DtypeName = option.memory(
        "auto",
        "Dtype of the weights. auto: bfloat16 on CUDA and on CPUs that multiply it, else float32. "
        "nf4 and int8 by bitsandbytes.",
    )
    device_map: str | None = option.memory(
        None,
        "Devices, as transformers takes them; every GPU by default, without one the CPU.",
        "MAP",
    )
    stream: bool = option.memory(
        False,
        "Keep the layers on disk, and read each for many texts: for a model that does not fit "
        "into memory.",
    )
    trust_remote_code: bool = option.memory(False, "Run code that comes with MODEL.")
    gguf_file: str | None = option.memory(
        None, "Name of a GGUF file in MODEL's folder or repository.", "NAME"
    )

    def of(self, model: str) -> ModelSource:
        """Give a model that is loaded so; ModelError if it is streamed, and placed too."""
        if self.stream and self.device_map not in (None, STREAM):
            raise ModelError(
                f"--stream beside --device-map {self.device_map}: what is streamed goes to the "
                f"first GPU, or the CPU"
            )
        place = STREAM if self.stream else self.device_map
        return ModelSource(model, self.dtype, place, self.gguf_file, self.trust_remote_code)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The layers that are dropped, and experts of those that stay."""

    drop: str | None = option.basic(
        None, "Layers to drop: indices and half-open ranges, as 3,12:20.", "LAYERS"
    )
    plan: Path | None = option.basic(None, "Plan to carry out: a file, or its folder.", "PLAN")
    drop_experts: str | None = option.target(
        None,
        "Experts to drop, as many of every layer that has any, as 0:3,5;1:8:10; or a file of such "
        "lines, or a plan of experts.",
        "EXPERTS",
    )

    @property
    def is_named(self) -> bool:
        """Whether anything is to be dropped."""
        return self != Cut()

    def read_layers(self) -> "Plan | list[Block]":
        """Read the layers behind ``--drop`` or ``--plan``, before anything that takes long.

        A plan is a file or its folder. Raises LayersError if neither or both are named or ``drop``
        does not name layers, and PlanError if the plan is not there, or is damaged.
        """
        from ..cutting.plans import load_plan
        from ..values.layers import parse_layers

        drop, plan = self.drop, self.plan
        if drop is not None and plan is not None:
            raise LayersError(
                f"--drop {drop} and --plan {plan} both name the layers to drop: give one"
            )
        if plan is not None:
            return load_plan(plan)
        if drop is None:
            raise LayersError("name the layers to drop, by --drop as 12:20, or by --plan")
        return parse_layers(drop)

    def read_all(self) -> "tuple[Plan | list[Block], Plan | dict[int, tuple[int, ...]] | None]":
        """Read what is dropped, before anything that takes long.

        Raises as :meth:`read_layers`, where no experts are named; ExpertsError if a text of them
        cannot be read, and PlanError if a plan of them is damaged.
        """
        from ..cutting.plans import load_experts

        if self.drop_experts is None:
            return self.read_layers(), None
        experts = load_experts(self.drop_experts)
        is_whole = self.drop is None and self.plan is None
        return [] if is_whole else self.read_layers(), experts

    def read_states(
        self, states: str | None
    ) -> "tuple[NamedLayers, Plan | dict[int, tuple[int, ...]] | None]":
        """Read the states that a cut is made for, or else as :meth:`read_all`.

        LayersError: something else is named beside the states, or they cannot be read.
        """
        from ..cutting.plans import ForStates

        if states is None:
            return self.read_all()
        if self.is_named:
            raise LayersError(
                "--for-states decides what goes: name no layers (--drop, --plan) and no experts "
                "(--drop-experts) beside it"
            )
        return ForStates.parse(states), None


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of a work is done here: a shard of it, or all of it by several processes."""

    shard: str | None = option.sharing(
        None,
        "Do one of N parts alone, counted from 0, for gather; auto: that of RANK or "
        "SLURM_ARRAY_TASK_ID.",
        "I/N",
    )
    on: Literal["local", "ray"] | None = option.sharing(
        None,
        "Share the work among processes of this machine (local), or on the Ray cluster that "
        "RAY_ADDRESS names, or else one of this machine (ray).",
    )
    workers: int | None = option.sharing(
        None,
        "Processes that share the work, each with models of its own; with ray by default as many "
        "as there is room for.",
        "N",
        least=1,
    )

    def read(self) -> dict[str, Any]:
        """Give the shard, or who shares all; empty where one process does the work.

        ScanError: both are asked for, or a shard that is not there.
        """
        from ..values.shard import Shard

        is_shared = self.on is not None or self.workers is not None
        if self.shard is None:
            return {"on": self.on or "local", "workers": self.workers} if is_shared else {}
        if is_shared:
            raise ScanError("a shard is made by one process: leave out --workers and --on")
        return {"shard": Shard.parse(self.shard)}


@dataclass(frozen=True, kw_only=True)
class Way:
    """The way of a call: what it may replace, whether it measures anew, what it prints."""

    overwrite: bool = option.output(False, "Replace an earlier output once the new is complete.")
    no_cache: bool = option.output(False, "Measure anew: neither read nor write the cache.")
    dry_run: bool = option.basic(False, "Say what would be done, and stop.")
    as_json: bool = option.output(False, "Print JSON for machines.", name="json")

    def open_store(self) -> "Store":
        """Open the store of measurements, as far as it may be used."""
        from ..store.store import open_store

        return open_store(self.no_cache, dry_run=self.dry_run)


WayOfParts = Annotated[
    Way,
    replace(
        options_of(Way)["overwrite"],
        sentence="Replace earlier results in --out, part by part as new ones are there.",
    ),
]
TrustRemoteCode = Annotated[bool, options_of(Loading)["trust_remote_code"]]
Overwrite = Annotated[bool, options_of(Way)["overwrite"]]
DryRun = Annotated[bool, options_of(Way)["dry_run"]]
Json = Annotated[bool, options_of(Way)["as_json"]]


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
