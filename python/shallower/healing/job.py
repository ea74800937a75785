"""The folder in which a healing works, and the text that tells its job from any other."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..processes import is_main_process
from ..storage import partial_folder, resumable_folder
from ..values.healing import Healing
from ..values.identity import TextsIdentity


@contextmanager
def work_folder(out: Path, job: str, *, overwrite: bool) -> Iterator[Path]:
    """Open the folder that becomes ``out``: the main process's, for all processes to use.

    For the others it is there once they have agreed with the main one on anything.

    Args:
        out: the place of the healing.
        job: what :func:`describe_job` gave; the work of another job is discarded.
        overwrite: replace what is at ``out``, once the new folder is complete.

    Yields:
        The folder.

    Raises:
        OutputError: as :func:`shallower.storage.resumable_folder`.
    """
    if is_main_process():
        with resumable_folder(out, job, overwrite) as folder:
            yield folder
    else:
        yield partial_folder(out) / "folder"


def describe_job(healing: Healing, evaluated: TextsIdentity | None, *, merge: bool) -> str:
    """Describe a healing by what its result depends on, which the number of devices is not.

    Args:
        healing: the record, before the training.
        evaluated: the identity of the held-out texts.
        merge: whether the adapters are merged.

    Returns:
        A line of JSON.
    """
    recipe = healing.recipe.to_json()
    for name in ("batch_size", "recompute"):
        del recipe[name]
    described = {
        "model": healing.model.fingerprint,
        "weights": healing.weights,
        "recipe": recipe,
        "texts": healing.texts.fingerprint,
        "eval_texts": evaluated and evaluated.fingerprint,
        "merge": merge,
    }
    return json.dumps(described, sort_keys=True)
