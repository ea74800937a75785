"""The patched cut that a healing starts from: made beside the place of the healing, once."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import ModelError, OutputError, RecipeError, TextsError
from ..models.identity import identify, stored_digest
from ..models.loading import load_model
from ..storage import partial_folder
from ..values.plan import Plan
from .patch import patch
from .saving import PATCH_FILE, save_patched

PATCHED = "patched"
"""The folder of the patched cut in that of adapters which need it."""

_JOB = "job"
_HASHED_TEXTS = 10_000


def patched_cut(
    path: str,
    plan: Plan,
    original: str,
    texts: Iterable[str],
    out: Path,
    dtype: str,
    max_length: int,
    progress: bool | None,
    trust_remote_code: bool,
) -> Path:
    """The folder of a cut's patch, which an earlier run of the same healing may have left.

    Args:
        path: the cut, of which the plan and the hash of its weights count.
        plan: of the cut.
        original: the uncut model.
        texts: to fit on; read here, and again by the training.
        out: the place of the healing.
        dtype: of the patched weights.
        max_length: tokens of a text at most.
        progress: bars on standard error.
        trust_remote_code: run code that comes with the model.

    Raises:
        RecipeError: the cut is patched already.
        TextsError: ``texts`` can be read only once, or are too few.
        PatchError: the patch does not help, or the model has no plain matrix to solve for.
        PlanError: the cut was not made out of ``original``.
    """
    if (Path(path).expanduser() / PATCH_FILE).is_file():
        raise RecipeError(f"{path} is patched already: leave out from_patch (--from-patch)")
    if isinstance(texts, Iterator):
        raise TextsError("texts are read twice, by the patch and by the training: give a list")
    job = _job(path, original, texts, max_length).encode()
    place = out.absolute().with_name(f".{out.name[:200]}.patched")
    for found in (place, partial_folder(out) / "folder" / PATCHED):
        if (found / _JOB).is_file() and (found / _JOB).read_bytes() == job:
            return found
    plain: Any = dtype
    model, tokenizer = load_model(original, plain, trust_remote_code=trust_remote_code)
    plan.check_model(identify(model))
    done = patch(model, tokenizer, plan.blocks, texts, max_length=max_length, progress=progress)
    save_patched(model, tokenizer, place, done, overwrite=True, more={_JOB: job})
    return place


def settle(patched: Path, folder: Path) -> None:
    """Put a patched cut into the folder of the adapters that belong to it."""
    if patched != folder / PATCHED:
        try:
            patched.rename(folder / PATCHED)
        except OSError as error:
            raise OutputError(f"cannot write {folder / PATCHED}: {error}") from error


def _job(path: str, original: str, texts: Iterable[str], max_length: int) -> str:
    """What tells this patch from another; of endless texts, the first."""
    digest = hashlib.sha256()
    for text in islice(texts, _HASHED_TEXTS):
        if not isinstance(text, str):
            raise TextsError(f"a text is of type {type(text).__name__}: expected str")
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    try:
        cut = stored_digest(path)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    return json.dumps([cut, original, digest.hexdigest(), max_length])
