"""``shallower heal``, with the options of ``settings/recipe.py``; ``shallower merge``."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RecipeError, TextsError
from ..models.source import ModelSource
from ..processes import is_main_process, num_processes
from ..settings.options import Option
from ..settings.recipe import STEPS, HealingDtype, Recipe
from ..values.estimates import EXPERTS, disk
from .options import (
    ANSWERS,
    AnswerTokens,
    DeviceMemory,
    MaxTexts,
    Out,
    TrustRemoteCode,
    Way,
    read_apart,
    wanted_answers,
)
from .output import print_json, reuse, say_dry_run, show

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..results.healing import Healing
    from ..results.speech import Answer
    from ..studies.answers import WantedAnswers


def heal_command(
    *,
    model: Annotated[
        str, typer.Argument(metavar="CUT", help="A cut: a folder or hub id with its plan.")
    ],
    texts: Annotated[
        str | None,
        Option("Texts to train on, as of scan; none with --share 1.", "TEXTS"),
    ] = None,
    out: Out,
    answers: Annotated[str | None, replace(ANSWERS, off=None)] = None,
    answer_tokens: AnswerTokens = 256,
    eval_texts: Annotated[
        str | None,
        Option("Held-out texts, as --texts; the step of the least loss on them is kept.", "TEXTS"),
    ] = None,
    recipe: Recipe,
    original: Annotated[
        str | None,
        Option("The uncut model: measured, and the teacher of kd.", "MODEL"),
    ] = None,
    max_eval_texts: Annotated[
        int | None,
        Option("Read the first N held-out texts only.", "N", "measures", least=1),
    ] = None,
    max_texts: MaxTexts = None,
    device_memory: DeviceMemory = None,
    merge: Annotated[bool, Option("Fold the adapters into the unquantised weights.")] = False,
    from_patch: Annotated[
        bool, Option("Patch the cut first; needs --original.", group="repair")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    way: Way,
) -> None:
    """Heal a cut by training low-rank adapters.

    As the paper does, by QLoRA. When interrupted, the same command resumes at its last
    checkpoint. On several devices put accelerate launch -m, or torchrun -m, before the command.
    """
    from ..storage import check_apart, check_free
    from ..store.done import output_of
    from ..store.store import Store

    source, held_out = read_apart(
        texts, eval_texts, max_texts=max_texts, max_eval_texts=max_eval_texts
    )
    steps = recipe.steps or STEPS
    prompts: dict[str, Any] = {"num_tokens": answer_tokens, "seed": recipe.seed}
    wanted = None if answers is None else wanted_answers(answers, steps, **prompts)
    recipe.check(original=original is not None, from_patch=from_patch)
    _check_data(wanted, recipe, texts=texts, original=original, from_patch=from_patch)
    check_apart(out, [model, original, texts, eval_texts, answers or None])
    folder, cut = Path(model).expanduser(), ModelSource(model, trust_remote_code=trust_remote_code)
    whole = None if original is None else replace(cut, path=original)
    models, saved = {"cut": cut, "original": whole}, {"merge": merge, "from_patch": from_patch}
    output = output_of(
        store := way.open_store() if num_processes() == 1 else Store(None),
        "heal",
        out,
        models=models,
        texts={"texts": source, "eval_texts": held_out},
        recipe=asdict(recipe),
        answers=None if wanted is None else wanted.inputs,
        **saved,
        device_memory=device_memory,
        # Adapters name the place of their model, which may lie beside them.
        base=str(folder.resolve()) if folder.exists() and not merge else None,
    )
    if reuse(output, lambda _: _say_again(out, way.as_json)):
        return
    check_free(out, way.overwrite)
    _check_models(models)
    if way.dry_run:
        training = {"texts": source, "held_out": held_out, "original": whole, **saved}
        described = _planned(cut, recipe, device_memory, out=out, answers=wanted, **training)
        say_dry_run({**described, "write": [str(out)]}, way.as_json)
        return
    recipe = _fit_to_memory(
        cut, recipe, device_memory, as_json=way.as_json, answers=wanted, out=out, **saved
    )
    from ..healing.heal import heal
    from ..store.given_models import ModelStore

    done = heal(
        model,
        source,
        out,
        answers=_answers(wanted, models, source, dtype=recipe.dtype, no_cache=way.no_cache),
        recipe=recipe,
        eval_texts=held_out,
        original=original,
        merge=merge,
        from_patch=from_patch,
        overwrite=way.overwrite,
        trust_remote_code=trust_remote_code,
        stores=partial(ModelStore.of, cache=store),
    )
    if is_main_process():
        output.keep({})
        say_healing(done, out, way.as_json)


def _check_models(models: "Mapping[str, ModelSource | None]") -> None:
    """Refuse what was not cut, and models that are not there, before torch is imported."""
    from ..healing.folders import plan_of_cut

    plan_of_cut(str(models["cut"]))
    for model in filter(None, models.values()):
        model.check()


def _check_data(
    wanted: "WantedAnswers | None",
    recipe: Recipe,
    *,
    texts: str | None,
    original: str | None,
    from_patch: bool,
) -> None:
    """Refuse to train on nothing, and on answers that nobody writes."""
    if texts is None and from_patch:
        raise TextsError("name texts to patch on (--texts), or leave out --from-patch")
    if texts is None and (wanted is None or recipe.share < 1):
        raise TextsError("name texts to train on (--texts), or answers alone (--answers --share 1)")
    if wanted is None or wanted.are_there:
        return
    if original is None:
        raise RecipeError(
            "--answers are written by the uncut model: name it (--original), or give a file that "
            "has the answers"
        )
    if num_processes() > 1:
        raise RecipeError(
            "--answers are written by one process: give a file that has the answers, or heal in "
            "one process"
        )


def _answers(
    wanted: "WantedAnswers | None",
    models: "Mapping[str, ModelSource | None]",
    texts: "Iterable[str]",
    *,
    dtype: HealingDtype,
    no_cache: bool,
) -> "list[Answer] | None":
    """The answers of a file, or those that the uncut model writes, which is then let go of."""
    from ..healing.checks import require_peft
    from ..healing.folders import plan_of_cut
    from ..healing.job import LoadedOnce
    from ..models.decoder import Decoder
    from ..store.given_models import ModelStore
    from ..store.store import open_store
    from ..texts.sequences import answered

    if wanted is None:
        return None
    require_peft()  # before much work
    cut, original = models["cut"], models["original"]
    assert cut is not None
    plan = plan_of_cut(str(cut))
    if wanted.are_there:
        return answered(cut.load_tokenizer(), wanted.prompts or (), model=plan.model)
    assert original is not None
    whole = replace(original, dtype=dtype)
    model, tokenizer = LoadedOnce(whole, plan).load(dtype)
    store = ModelStore.of(whole, open_store(no_cache))
    return wanted.by(Decoder.of(model), tokenizer, texts, store=store)


def _fit_to_memory(
    cut: ModelSource,
    recipe: Recipe,
    device_memory: str | None,
    *,
    as_json: bool,
    answers: "WantedAnswers | None",
    out: Path,
    **saved: bool,
) -> Recipe:
    """Print the settings, and fix those that a given device memory decides.

    What there is no room for is refused before answers are written.
    """
    from ..healing.checks import check_disk, resolve
    from ..healing.folders import plan_of_cut
    from ..healing.ranks import warn_of_idle_gpus

    plan, there = plan_of_cut(str(cut)), answers is not None
    check_disk(out, cut, plan, recipe=recipe, answers=there, **saved)
    resolved = resolve(
        str(cut),
        plan,
        recipe,
        answers=there,
        device_memory=device_memory,
        trust_remote_code=cut.trust_remote_code,
    )
    if device_memory is not None:  # else the healing chooses the same, and may change it
        recipe = replace(recipe, batch_size=resolved.batch_size, recompute=resolved.recompute)
    if is_main_process() and not as_json:
        show(str(resolved))
    warn_of_idle_gpus()
    return recipe


def _say_again(out: Path, as_json: bool) -> None:
    """Print a healing from its folder."""
    from ..results.healing import Healing

    healing = Healing.load(out)
    if not as_json:
        show(str(healing.recipe))
    say_healing(healing, out, as_json)


def _planned(
    cut: ModelSource,
    recipe: Recipe,
    device_memory: str | None,
    *,
    out: Path,
    answers: "WantedAnswers | None",
    **training: Any,
) -> dict[str, Any]:
    """The settings of a healing, and the memory, disk and time that it will need."""
    from ..forecasts.forecast import memory_forecast
    from ..forecasts.speed import or_unknown
    from ..forecasts.work import forecast, of_healing
    from ..healing.checks import check_disk, check_original, resolve
    from ..healing.folders import plan_of_cut
    from ..models.dtypes import QUANTISED
    from ..models.experts import unquantised
    from ..patching.memory import temporary_bytes
    from ..storage import free_bytes, temporary

    model, trust_remote_code = str(cut), cut.trust_remote_code
    plan, there = plan_of_cut(model), answers is not None
    if training["original"] is not None:
        check_original(str(training["original"]), plan, trust_remote_code)
    saved = {name: training[name] for name in ("merge", "from_patch")}
    needed = check_disk(out, cut, plan, recipe=recipe, answers=there, **saved)
    memory = memory_forecast(
        model,
        "heal",
        recipe=recipe,
        answers=there,
        device_memory=device_memory,
        processes=num_processes(),
        trust_remote_code=trust_remote_code,
    )
    chosen = replace(
        recipe, batch_size=memory.micro_batch, recompute=bool(memory.gradient_checkpointing)
    )
    resolved = resolve(model, plan, chosen, answers=there, trust_remote_code=trust_remote_code)
    said: dict[str, Any] = {"answers": str(answers)} if there else {}
    if experts := memory.parts.get(EXPERTS):
        plain = f"; {unquantised(resolved.dtype, experts)}" * (resolved.dtype in QUANTISED)
        said["experts"] = f"adapters lie on them too, and on no router{plain}"
    said |= {"memory": memory, "disk": disk(needed, free_bytes(out))}
    if training["from_patch"]:
        taken = temporary_bytes(cut, max_length=resolved.max_length)
        said["temporary"] = disk(taken, free_bytes(temporary()))
    if device_memory is None:  # else it is of a card that is not here
        training["num_written"] = 0 if answers is None else answers.num_written
        said["time"] = or_unknown(lambda: forecast(*of_healing(cut, plan, resolved, **training)))
    return {"heal": model, **resolved.to_json(), **said}


def merge_command(
    *,
    adapters: Annotated[
        Path, typer.Argument(metavar="ADAPTERS", help="The folder that shallower heal left.")
    ],
    out: Out,
    model: Annotated[
        str | None,
        Option("The cut that they were trained for; by default where it was.", "CUT"),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    way: Way,
) -> None:
    """Fold the adapters of heal into the weights of the cut.

    The weights must not be quantised; sums are made in float32 and rounded once, a few rows at a
    time. The result is loaded, and its logits are compared with those of the adapters; if it does
    not fit into memory, every weight is compared with its sum instead.
    """
    from ..merging.adapter_config import remembered_base
    from ..results.healing import Healing
    from ..storage import check_apart, check_free, check_room, free_bytes
    from ..store.done import Output
    from ..store.inputs import adapters_inputs

    check_apart(out, [adapters, model])
    store = way.open_store()
    output = Output(store, "merge", out, lambda: adapters_inputs(adapters, model, store))
    if reuse(output, lambda _: say_healing(Healing.load(out), out, way.as_json)):
        return
    check_free(out, way.overwrite)
    healing = Healing.load(adapters)
    cut = ModelSource(model or remembered_base(adapters))
    cut.check()
    if way.dry_run:
        needed = cut.stored_bytes
        check_room(out, needed)
        planned = {"disk": disk(needed, free_bytes(out)), "write": [str(out)]}
        say_dry_run({"merge": str(adapters), "model": str(healing.model), **planned}, way.as_json)
        return
    from ..merging.merge import merge

    done = merge(adapters, out, model, overwrite=way.overwrite, trust_remote_code=trust_remote_code)
    output.keep({})
    say_healing(done, out, way.as_json)


def say_healing(healing: "Healing", out: Path, as_json: bool) -> None:
    """Print the losses of a healing, and where it was written."""
    from ..reporting.stories.stages import healing_parts

    if as_json:
        print_json({**healing.to_json(), "written": str(out)})
        return
    show(*healing_parts(healing), f"wrote {out}")
