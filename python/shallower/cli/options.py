"""Options that several commands share, and those made of the fields of ``values/options.py``."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import typer

from ..errors import LayersError, ModelError, ScanError
from ..models.dtypes import STREAM
from ..models.dtypes import Dtype as DtypeName
from ..models.source import ModelSource
from ..values.options import Option, options_of
from ..values.settings import CompareSettings, RunSettings
from ..values.stage_settings import EvalSettings

if TYPE_CHECKING:
    from ..cutting.plans import NamedLayers
    from ..store.store import Store
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
        command = joined(command)
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

        return _signed(called, [shown[name] for name in order])

    return with_options


class Joined:
    """Options that commands have together: a dataclass, of which each field is one of them."""


def joined(command: Callable[..., T]) -> Callable[..., T]:
    """Give a command, for each of its parameters that is :class:`Joined`, the options of that."""
    shown = signature(command).parameters
    kinds = {name: one.annotation for name, one in shown.items() if _is_joined(one.annotation)}
    options = {name: signature(kind).parameters for name, kind in kinds.items()}
    all_of_them = [options.get(name, {name: one}).values() for name, one in shown.items()]

    @wraps(command)
    def called(**given: Any) -> T:
        for name, kind in kinds.items():
            given[name] = kind(**{one: given.pop(one) for one in options[name]})
        return command(**given)

    return _signed(called, [*chain.from_iterable(all_of_them)])


def _is_joined(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Joined)


def _signed(command: Callable[..., T], parameters: list[Parameter]) -> Callable[..., T]:
    """The command with these parameters, for typer to read."""
    vars(command)["__signature__"] = Signature(parameters)
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


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
    """The option's flag and its ``--no-`` form."""
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
DeviceMemory = Annotated[str | None, _same(CompareSettings, "device_memory")]
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
Answers = Annotated[str | None, _same(RunSettings, "answers")]
NoAnswers = Annotated[bool, _option_off(options_of(RunSettings)["answers"])]
AnswerTokens = Annotated[
    int, typer.Option(metavar="N", help="Tokens of an answer that is written, at most.", min=1)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@dataclass(frozen=True, kw_only=True)
class Loading(Joined):
    """How models are loaded."""

    dtype: Dtype = "auto"
    device_map: DeviceMap = None
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Keep the layers on disk, and read each for many texts: for a model that does "
            "not fit into memory.",
        ),
    ] = False
    trust_remote_code: TrustRemoteCode = False

    def of(self, model: str, gguf_file: str | None = None) -> ModelSource:
        """Give a model that is loaded so; ModelError if it is streamed, and placed too."""
        if self.stream and self.device_map not in (None, STREAM):
            raise ModelError(
                f"--stream beside --device-map {self.device_map}: what is streamed goes to the "
                f"first GPU, or the CPU"
            )
        place = STREAM if self.stream else self.device_map
        return ModelSource(model, self.dtype, place, gguf_file, self.trust_remote_code)


@dataclass(frozen=True, kw_only=True)
class Source(Loading):
    """A model, and how it is loaded."""

    model: Model
    gguf_file: GgufFile = None

    def read(self) -> ModelSource:
        """Give the model; ModelError as :meth:`of`."""
        return self.of(self.model, self.gguf_file)


@dataclass(frozen=True, kw_only=True)
class DroppedLayers(Joined):
    """The layers that are dropped."""

    drop: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS", help="Layers to drop: indices and half-open ranges, as 3,12:20."
        ),
    ] = None
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="PLAN", help="Plan to carry out: a file, or its folder."),
    ] = None

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


@dataclass(frozen=True, kw_only=True)
class Cut(DroppedLayers):
    """The layers that are dropped, and experts of those that stay."""

    drop_experts: Annotated[
        str | None,
        typer.Option(
            metavar="EXPERTS",
            help="Experts to drop, as many of every layer that has any, as 0:3,5;1:8:10; or a file "
            "of such lines, or a plan of experts.",
        ),
    ] = None

    @property
    def is_named(self) -> bool:
        """Whether anything is to be dropped."""
        return self != Cut()

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
        from ..cutting.for_states import ForStates

        if states is None:
            return self.read_all()
        if self.is_named:
            raise LayersError(
                "--for-states decides what goes: name no layers (--drop, --plan) and no experts "
                "(--drop-experts) beside it"
            )
        return ForStates.parse(states), None


@dataclass(frozen=True, kw_only=True)
class Share(Joined):
    """Which part of a work is done here: a shard of it, or all of it by several processes."""

    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Do one of N parts alone, counted from 0, for gather; auto: that of RANK or "
            "SLURM_ARRAY_TASK_ID.",
        ),
    ] = None
    on: On = None
    workers: Workers = None

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
class Way(Joined):
    """The way of a call: what it may replace, whether it measures anew, what it prints."""

    overwrite: Overwrite = False
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Measure anew: neither read nor write the cache.")
    ] = False
    dry_run: DryRun = False
    as_json: Json = False

    def open_store(self) -> "Store":
        """Open the store of measurements, as far as it may be used."""
        from ..store.store import open_store

        return open_store(self.no_cache, dry_run=self.dry_run)


@dataclass(frozen=True, kw_only=True)
class WayOfParts(Way):
    """The way of a call whose results are replaced part by part."""

    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace earlier results in --out, part by part as new ones are there.",
        ),
    ] = False


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
