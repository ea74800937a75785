"""The patched cut that a healing starts from: made beside the place of the healing, once."""

import hashlib
import shutil
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError, OutputError, RecipeError, TextsError
from ..models.identity import stored_digest
from ..patching.patch import with_patch
from ..patching.saving import PATCH_FILE, save_patched
from ..storage import partial_folder
from ..values.hashing import hash_of
from ..values.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PATCHED = "patched"
"""The folder of the patched cut in that of adapters which need it."""

_JOB = "job"
_HASHED_TEXTS = 10_000


def patched_cut(
    path: str,
    plan: Plan,
    original: str,
    *,
    texts: Iterable[str],
    out: Path,
    whole: "Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]",
    max_length: int,
    progress: bool | None = None,
) -> Path:
    """Patch a cut for its healing, unless an earlier run of the same healing did.

    :func:`shallower.heal` of the same arguments finds the patch that this leaves.

    Args:
        path: the cut, of which the plan and the hash of its weights count.
        plan: the plan of the cut.
        original: the name of the uncut model.
        texts: texts to fit on, an iterable that can be read again.
        out: the place of the healing.
        whole: gives the uncut model in the dtype of the cut, and its tokenizer; asked only
            if there is no patch yet. The model is as before afterwards.
        max_length: tokens of a text at most.
        progress: whether to show a bar on standard error.

    Returns:
        The folder of the patched cut, a hidden sibling of ``out``.

    Raises:
        RecipeError: the cut is patched already.
        TextsError: ``texts`` are too few.
        PatchError: the patch does not help, or the model has no plain matrix to solve for.
        PlanError: the cut was not made out of ``original``.
        OutputError: the folder cannot be written.
    """
    if (Path(path).expanduser() / PATCH_FILE).is_file():
        raise RecipeError(f"{path} is patched already: leave out from_patch (--from-patch)")
    job = _job(path, original, texts, max_length).encode()
    place = out.absolute().with_name(f".{out.name[:200]}.patched")
    for found in (place, partial_folder(out) / "folder" / PATCHED):
        if (found / _JOB).is_file() and (found / _JOB).read_bytes() == job:
            return found
    model, tokenizer = whole()
    with with_patch(
        model, tokenizer, plan, texts=texts, max_length=max_length, progress=progress
    ) as done:
        save_patched(model, tokenizer, place, done=done, overwrite=True, more={_JOB: job})
    return place


def settle(patched: Path, folder: Path) -> Path:
    """Put a patched cut into the folder of the adapters that belong to it.

    Args:
        patched: what :func:`patched_cut` gave.
        folder: the folder of the adapters.

    Returns:
        The new place of the patched cut.

    Raises:
        OutputError: the folder cannot be written.
    """
    if patched != folder / PATCHED:
        try:
            patched.rename(folder / PATCHED)
        except OSError as error:
            raise OutputError(f"cannot write {folder / PATCHED}: {error}") from error
    return folder / PATCHED


def copy_to(patched: Path, folder: Path) -> None:
    """Copy the files of a patched cut, which is the result where no training lowers its loss.

    Args:
        patched: what :func:`patched_cut` gave.
        folder: the folder of the healing.

    Raises:
        OSError: a file cannot be written.
    """
    beside = shutil.ignore_patterns(_JOB)
    shutil.copytree(patched, folder, ignore=beside, dirs_exist_ok=True)


def _job(path: str, original: str, texts: Iterable[str], max_length: int) -> str:
    """The hash that tells this patch from any other; of endless texts, the first count."""
    digest = hashlib.sha256()
    for text in islice(texts, _HASHED_TEXTS):
        if not isinstance(text, str):
            raise TextsError(f"a text is of type {type(text).__name__}: expected str")
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    try:
        cut = stored_digest(path)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    # A hash, as the file stays beside the patched cut and the name may be a path.
    return hash_of([cut, original, digest.hexdigest(), max_length])
