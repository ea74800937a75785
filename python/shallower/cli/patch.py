"""``shallower patch``."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..errors import ModelError
from ..models.source import ModelSource
from ..settings.options import TEXT_ONLY, Option
from ..settings.stages import PatchSettings
from ..values.layers import ranges
from ..values.schema import plain
from .options import (
    Answers,
    AnswerTokens,
    Cut,
    DeviceMemory,
    Loading,
    MaxTexts,
    Model,
    Out,
    TextsSource,
    Way,
    read_apart,
    wanted_answers,
)
from .output import print_json, reuse, say_dry_run, show

if TYPE_CHECKING:
    from ..results.speech import Answer
    from ..studies.answers import WantedAnswers
    from ..values.estimates import MemoryPlan
    from ..values.layers import Block
    from ..values.plan import Plan
    from ..values.tokens import Tokens


def patch_command(
    *,
    model: Model,
    texts: TextsSource,
    out: Out,
    layers: Annotated[Cut, "drop", "plan"],
    eval_texts: Annotated[
        str | None,
        Option("Held-out texts, as --texts, to measure the patch on.", "TEXTS"),
    ] = None,
    answers: Answers = None,
    answer_tokens: AnswerTokens = 256,
    settings: PatchSettings,
    max_texts: MaxTexts = None,
    source: Annotated[Loading, "device_map", "stream", "trust_remote_code", "gguf_file"],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option(
            "Dtype of the weights. auto: bfloat16 on CUDA and on CPUs that multiply it, else "
            "float32.",
            group="memory",
        ),
    ] = "auto",
    device_memory: DeviceMemory = None,
    text_only: Annotated[bool, Option(TEXT_ONLY, group="output")] = False,
    way: Way,
) -> None:
    """Drop layers and repair the cut in minutes, adding no parameter.

    The layer before the cut is solved by least squares to replace the dropped layers. Then all
    matrices from there on take at most 112 gradient steps towards the whole model's next-token
    distributions and the next tokens themselves. A model that chats also learns from its own
    answers to prompts. A patch that does not help is not saved.
    When interrupted, the same command resumes. It is recommended to patch first, then heal.
    """
    from ..cutting.plans import plan_file
    from ..storage import check_apart, check_free
    from ..store.done import output_of

    fitted, held_out = read_apart(texts, eval_texts, max_texts=max_texts)
    named, place = layers.read_layers(), replace(source, dtype=dtype).of(model)
    asked, share = _asked(answers, answer_tokens, place), settings.share
    check_apart(
        out,
        [place.place, layers.plan and plan_file(layers.plan), texts, eval_texts, answers or None],
    )
    output = output_of(
        way.open_store(),
        "patch",
        out,
        models={"model": place},
        texts={"texts": fitted, "eval_texts": held_out},
        layers=named,
        num_tokens=settings.num_tokens,
        tokens=[settings.max_length, settings.batch_size],
        answers=None if asked is None else {**asked.inputs, "share": share},
        device_memory=device_memory,
        text_only=text_only,
    )
    if reuse(output, lambda value: _say(value, place, out, way.as_json, text_only)):
        return
    check_free(out, way.overwrite)
    counted: dict[str, Any] = {"tokens": settings.tokens, "num_tokens": settings.num_tokens}
    wanted, needed = _patchable(place, named, out, fitted, **counted)
    from ..forecasts.forecast import forecast_source

    plan_memory = partial(forecast_source, place, "patch", device_memory=device_memory, **counted)
    if way.dry_run:
        asked = _within(asked, place.load_tokenizer(), fitted, settings)
        planned: dict[str, Any] = {
            "patch": model,
            "drop": ranges(wanted.dropped),
            "texts": texts,
            **({} if asked is None else {"answers": str(asked), "share": share}),
            **_planned(
                place,
                wanted.dropped,
                fitted,
                out=out,
                needed=needed,
                is_here=device_memory is None,
                text_only=text_only,
                held_out=list(held_out or ()),
                num_written=0 if asked is None else asked.num_written,
                **counted,
            ),
        }
        say_dry_run({**planned, "memory": plan_memory(), "write": [str(out)]}, way.as_json)
        return
    place = _placed(place, plan_memory, wanted.dropped)
    from ..patching.saving import patch_to_folder
    from ..store.given_models import ModelStore

    loaded = place.load()
    done, measured = patch_to_folder(
        *loaded,
        wanted,
        texts=fitted,
        out=out,
        eval_texts=held_out,
        answers=_answers(
            _within(asked, loaded[1], fitted, settings),
            place,
            wanted,
            texts=fitted,
            loaded=loaded,
            no_cache=way.no_cache,
        ),
        settings=settings,
        overwrite=way.overwrite,
        text_only=text_only,
        source=place,
        stores=partial(ModelStore.of, cache=way.open_store()),
    )
    losses = plain(measured, "to_record")
    _say(
        output.keep({"patch": done.to_json(), "losses": losses}), place, out, way.as_json, text_only
    )


def _patchable(
    place: ModelSource,
    named: "Plan | list[Block]",
    out: Path,
    texts: "Iterable[str]",
    *,
    tokens: "Tokens",
    num_tokens: int | None,
) -> "tuple[Plan, int]":
    """The plan of the cut, before the model is loaded, and the bytes of its temporary files.

    PatchError if it cannot be, OutputError where they or its checkpoint have no room.
    """
    from ..cutting.plans import agreed_plan
    from ..results.patch import check_patchable
    from ..storage import check_room

    place.check()
    plan = agreed_plan(str(place.path), place.count_layers(), named)
    check_patchable(plan)
    from ..memory.weights import left_bytes
    from ..patching.memory import temporary_bytes

    how: Any = {"num_tokens": num_tokens, "max_length": tokens.max_length}
    needed = temporary_bytes(place, texts, dropped=plan.dropped, **how)
    check_room(out, left_bytes(place, plan.dropped), needed)
    return plan, needed


def _asked(
    answers: str | Literal[False] | None, num_tokens: int, place: ModelSource
) -> "WantedAnswers | None":
    """The answers that are wanted, by default of a model that chats.

    A model on disk is not read for each of their tokens.
    """
    if answers is False or (answers is None and place.is_streamed):
        return None
    wanted = wanted_answers(answers or "", num_tokens=num_tokens)
    if answers is None:
        return replace(wanted, chats_only=True)
    if not wanted.are_there and place.is_streamed:
        raise ModelError(
            "--answers beside --stream: all layers would be read once a token of every answer; "
            "give a file that has the answers, or leave one of the two out"
        )
    return wanted


def _within(
    asked: "WantedAnswers | None",
    tokenizer: Any,
    texts: "Iterable[str]",
    settings: PatchSettings,
) -> "WantedAnswers | None":
    """The answers that the tokens of the texts leave room for, up to those that a patch takes."""
    if asked is None or not asked.is_for(tokenizer):
        return None
    import torch

    from ..patching.patch import fitted_tokens
    from ..texts.batches import tokenise

    most, count = settings.num_tokens or fitted_tokens(not torch.cuda.is_available()), 0
    for one in tokenise(tokenizer, texts, settings.max_length):
        if (count := count + len(one.ids)) >= most:
            break
    asked = asked.within(min(count, most))
    return asked if asked.are_there or asked.num_written else None


def _answers(
    wanted: "WantedAnswers | None",
    place: ModelSource,
    plan: "Plan",
    *,
    texts: "Iterable[str]",
    loaded: "tuple[Any, Any]",
    no_cache: bool,
) -> "Sequence[Answer]":
    """What the whole model, which is loaded, says to the prompts; PlanError if it is another."""
    if wanted is None:
        return ()
    from ..models.decoder import Decoder
    from ..store.given_models import ModelStore
    from ..store.store import open_store

    decoder, tokenizer = Decoder.of(loaded[0]), loaded[1]
    plan.check_model(decoder.identity)
    wanted = wanted.of(decoder, tokenizer)
    kept = ModelStore.of(place, open_store(no_cache))
    return () if wanted is None else wanted.by(decoder, tokenizer, texts, store=kept)


def _say(
    value: dict[str, Any], place: ModelSource, out: Path, as_json: bool, text_only: bool
) -> None:
    """Print a patch and its losses, from their JSON values."""
    from ..cutting.checkpoint_files import stored_bytes
    from ..cutting.laid_over import not_saved
    from ..reporting.stories.stages import losses_table, patch_table
    from ..reporting.words import by_choice, costs, dequantised, domain_learned
    from ..results.loss import OUT_OF_DOMAIN, TEST_SET, Loss, recovered
    from ..results.patch import Patch

    measured = {
        domain: {name: Loss.from_json(loss) for name, loss in losses.items()}
        for domain, losses in value["losses"].items()
    }
    shares = {domain: recovered(losses) for domain, losses in measured.items()}
    done = Patch.from_json(value["patch"])
    warned = domain_learned(shares or by_choice(done))
    if as_json:
        names = {"eval": TEST_SET, "out_of_domain": OUT_OF_DOMAIN}
        losses = {name: plain(measured.get(domain, {})) for name, domain in names.items()}
        more = {"cost": costs(measured), "warnings": warned, "written": str(out)}
        print_json(
            {**value["patch"], **losses, "not_saved": not_saved(place, text_only).to_json(), **more}
        )
        return
    lines = [f"warning: {one}" for one in warned]
    file = place.place.expanduser()
    if file.suffix == ".gguf" and (size := stored_bytes(file)):
        left = stored_bytes(out) or 0
        lines.append(dequantised(file.name, size, left, blocks=done.plan.blocks))
    tables = [patch_table(done, shares), *([losses_table(measured)] if measured else ())]
    show(*tables, *lines, f"wrote {out}")


def _planned(
    place: ModelSource,
    dropped: Sequence[int],
    texts: "Iterable[str]",
    *,
    out: Path,
    needed: int,
    is_here: bool,
    text_only: bool,
    **more: Any,
) -> dict[str, Any]:
    """What a patch reads and writes on disk, and its time if the device is here."""
    from ..cutting.laid_over import not_saved
    from ..forecasts.speed import or_unknown
    from ..forecasts.work import forecast, of_patch, plan_passes
    from ..memory.weights import left_bytes
    from ..storage import free_bytes, temporary
    from ..values.estimates import disk

    counted = cache(lambda: of_patch(place, dropped, texts, **more))
    planned: dict[str, Any] = {}
    if place.is_streamed:
        planned["stream"] = or_unknown(lambda: plan_passes(place, counted().work.passes))
    planned["disk"] = disk(left_bytes(place, dropped), free_bytes(out))
    planned["temporary"] = disk(needed, free_bytes(temporary()))
    if lost := not_saved(place, text_only):
        planned["not_saved"] = lost
    if is_here:
        planned["time"] = or_unknown(lambda: forecast(counted()))
    return planned


def _placed(
    place: ModelSource, plan_memory: "Callable[[], MemoryPlan]", dropped: Sequence[int]
) -> ModelSource:
    """The source; on a GPU that has no room for all weights, with layers in the CPU's memory."""
    import torch

    if place.device_map is not None or torch.cuda.device_count() != 1:
        return place
    from ..memory.placement import place_weights

    dtype = place.resolved().dtype
    places = place_weights(place.read_config(), dtype, plan_memory(), spare=dropped)
    return place if places is None else replace(place, dtype=dtype, device_map=places)
