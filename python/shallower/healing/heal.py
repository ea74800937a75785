"""The healing of a cut, from its folder to the adapters or the merged model."""

import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

from ..errors import RecipeError, TextsError
from ..memory.device import free_memory
from ..merging.merging import stored_plainly
from ..storage import check_free
from ..texts.sequences import ReadOnce
from ..values.healing import Healing
from ..values.loss import Loss
from ..values.recipe import Recipe
from .checks import read_plan, require_one_process, require_peft, resolve
from .loaded_models import Uncut
from .patched import patched_cut
from .reconstruct import Reconstruction, require_reconstructible
from .work import Work


def heal(
    path: str | Path,
    texts: Iterable[str],
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    eval_texts: Iterable[str] | None = None,
    original: str | Path | None = None,
    merge: bool = False,
    from_patch: bool = False,
    losses: tuple[Loss | None, Loss | None] = (None, None),
    overwrite: bool = False,
    progress: bool | None = None,
    trust_remote_code: bool = False,
) -> Healing:
    """Heal a cut by training low-rank adapters, as the paper does (2403.17887, appendix A).

    Leaves in ``out`` the adapters, or with ``merge`` a standard checkpoint; ``healing.json`` and,
    with matplotlib, ``healing.png``; the plan and a model card. A killed run goes on when it is
    called again with the same arguments, from its last complete checkpoint.

    Args:
        path: the cut: a folder or hub id with a plan beside the weights.
        texts: texts to train on, read once, and only as many as the steps take.
        out: a folder that does not exist yet, or is empty.
        recipe: the settings; by default those of the paper where it healed this model, else
            ours.
        eval_texts: held-out texts; the adapters of the least loss on them are kept.
        original: the uncut model: its held-out loss is measured, and it teaches if the recipe
            compares with it.
        merge: fold the adapters into the unquantised weights of the cut. What is reconstructed
            is whole in any case.
        from_patch: patch the cut in closed form first, by :func:`shallower.patch` of ``original``
            on ``texts``, and train on from there. Adapters that are not merged need the patched
            cut, which lies beside them. If no step of the training is better than the patch,
            ``out`` is the patched cut, with a warning.
        losses: the losses of the uncut model and of the cut before a patch, in nats a token on
            ``eval_texts`` at the recipe's ``max_length``, where they were measured already; what
            is given is not measured again.
        overwrite: replace what is at ``out``, once the new folder is complete.
        progress: whether to show bars with ETA on standard error; by default if that is a
            terminal.
        trust_remote_code: run code that comes with the models.

    Returns:
        The record that is in ``healing.json``.

    Raises:
        PlanError: the model was not cut, or not out of ``original``.
        RecipeError: settings that do not fit.
        TextsError: too few texts, or none that are held out.
        PatchError: ``from_patch``, and the patch does not help.
        ModelError: nothing to adapt, weights that cannot be merged into, a loss that is not
            finite or at no step below that before healing.
        OutputError: ``out`` holds something already, or cannot be written to.
        MissingExtraError: peft, or bitsandbytes for 4 and 8 bits, is not installed.
        ProcessesError: ``from_patch`` in several processes, or one of them ended.

    Example:
        >>> recipe = sh.Recipe(steps=2, dtype="float32", max_length=16)
        >>> healing = sh.heal("smol-22-layers", texts, "adapters", recipe=recipe)
        >>> healing.recipe.preset, healing.best_step
        ('small', 2)
        >>> merged = sh.merge("adapters", "healed")
        >>> merged.merge.difference < 1e-5
        True
    """
    require_peft()
    path, out, recipe = str(path), Path(out), recipe or Recipe()
    check_free(out, overwrite)
    recipe.check(original=original is not None, from_patch=from_patch)
    if eval_texts is None and losses != (None, None):
        raise RecipeError("losses without eval_texts: give the texts that they were measured on")
    held_out = None if eval_texts is None else list(eval_texts)
    source = ReadOnce(texts)
    if not any(True for _ in source):
        raise TextsError("there are no texts to heal with")
    plan = read_plan(path)
    free_memory()  # so that what is planned with is what there is, after a run's scan too
    resolved = resolve(path, plan, recipe, trust_remote_code=trust_remote_code)
    local = not resolved.has_adapters
    if local:
        require_reconstructible(plan)
    plain = merge or from_patch or local
    dtype = stored_plainly(path, trust_remote_code) if plain else ""
    uncut = None
    if original is not None:
        uncut = Uncut(str(original), plan, trust_remote_code=trust_remote_code)
    patched = None
    if from_patch and uncut is not None:
        require_one_process()
        patched = patched_cut(
            path, plan, uncut.name, texts=source, out=out, whole=lambda: uncut.load(dtype),
            max_length=resolved.max_length, progress=progress,
        )  # fmt: skip
    if local and uncut is not None:
        done = Reconstruction(
            str(patched or path), plan, resolved, source.last_pass(), held_out, uncut, losses,
            patched, progress, trust_remote_code,
        ).to(out, dtype, overwrite=overwrite)  # fmt: skip
    else:
        done = Work(
            path, plan, resolved, source.last_pass(), held_out, uncut, merge, losses, progress,
            trust_remote_code, patched, _automatic(recipe),
        ).to(out, overwrite)  # fmt: skip
    if patched is not None:
        shutil.rmtree(patched, ignore_errors=True)
        if done.best_step == 0:
            warnings.warn(
                f"no step of the training was better than the patch: {out} is the patched cut, "
                f"and nothing was trained. Lower the learning rate (learning_rate, "
                f"--learning-rate), or give more texts",
                stacklevel=2,
            )
    return done


def _automatic(recipe: Recipe) -> set[str]:
    """The settings that the user left to us, and that change nothing but rounding."""
    return {name for name in ("batch_size", "recompute") if getattr(recipe, name) is None}
