"""A healing as it was called, its models and its folders: the work, the patched cut, peft's.

A healing depends on its recipe, its texts and its last marked checkpoint alone. The size of a
forward and recomputation are not part of the job, so they may change before it resumes.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.cards import adapters_card
from ..cutting.laid_over import require_whole
from ..cutting.source import CARD_FILE, find_source
from ..errors import ModelError, OutputError, RecipeError, TextsError, why
from ..evaluation.batches import Stores
from ..memory.device import free_memory
from ..merging.adapter_config import CONFIG_FILE, read_adapter_config
from ..merging.merge import copy_beside, copy_files, healing_rows
from ..merging.stored_adapters import WEIGHTS_FILE
from ..models.dtypes import QUANTISED
from ..models.identity import identify, stored_digest
from ..models.quantised import keep_unpacked
from ..models.source import ModelSource
from ..patching.patch import with_patch
from ..patching.saving import save_patched
from ..processes import is_main_process, partial_folder
from ..progress import say_goes_on
from ..results.healing import Healing
from ..results.loss import Loss
from ..results.speech import Answer
from ..settings.recipe import Resolved
from ..storage import resumable_folder, write_file
from ..texts.sequences import ReadOnce
from ..values.entries import ResultStore
from ..values.files import HEALING_FILE, PATCH_FILE, PLAN_FILE
from ..values.identity import TextsIdentity
from ..values.plan import Plan
from ..values.provenance import hash_of
from .ranks import own_device_map

TRAINING = "training"
"""The folder of the Trainer's checkpoints, which is there until all else is written."""

PATCHED = "patched"
"""The folder of the patched cut in that of adapters which need it."""

LOSSES = "losses.json"
"""The file of the losses that were measured, which is no part of the result."""

_PATCH_JOB = "job"
_HASHED_TEXTS = 10_000


class LoadedOnce:
    """A model on the device of this process, loaded when it is first needed, or again.

    One with a plan must be the model that the plan was made for.
    """

    def __init__(
        self, source: ModelSource, plan: Plan | None = None, progress: bool | None = None
    ) -> None:
        self.name, self._source, self._plan, self._progress = str(source), source, plan, progress
        self._dtype: str | None = None
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def source(self, dtype: Any) -> ModelSource:
        """The source of the model in a dtype; ProcessesError for more processes than GPUs."""
        device_map: Any = own_device_map()
        return replace(self._source, dtype=dtype, device_map=device_map)

    def load(self, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model and its tokenizer once in a dtype; PlanError if it is not the plan's."""
        if self._loaded is None or not self.is_loaded(dtype):
            self.release()
            loaded = self.source(dtype).load(self._progress)
            keep_unpacked(loaded[0])
            if self._plan is not None:
                self._plan.check_model(identify(loaded[0]))
            self._loaded, self._dtype = loaded, dtype
        return self._loaded

    def is_loaded(self, dtype: str) -> bool:
        """Say whether the model is in memory in this dtype."""
        return self._loaded is not None and self._dtype == dtype

    def release(self) -> None:
        """Let go of the model, and of its memory once nothing else holds it."""
        if self._loaded is not None:
            self._loaded = self._dtype = None
            free_memory()


@dataclass(frozen=True, slots=True)
class HealingJob:
    """A healing as it was called, with its settings resolved."""

    cut: str  # folder or hub id
    plan: Plan
    recipe: Resolved
    texts: ReadOnce  # texts to train on
    answers: Sequence[Answer]  # usable answers to train on
    held_out: list[str] | None  # texts, if there are any
    original: LoadedOnce | None  # the uncut model, if it is named
    merge: bool  # fold the adapters into the cut
    losses: tuple[Loss | None, Loss | None]  # known ones of the uncut model and of the cut
    stores: Stores  # gives the cached results of a model
    progress: bool | None  # by default if standard error is a terminal
    trust_remote_code: bool
    adjustable: Collection[str]  # settings that may be changed where memory is short
    patched: Path | None = None  # the folder of the patched cut to start from

    @property
    def model(self) -> str:
        """The model that is trained."""
        return str(self.patched or self.cut)

    def base(self, out: Path) -> str:
        """The name by which the adapters in ``out`` will find their model, from any folder."""
        if self.patched is not None:
            return str(out.absolute() / PATCHED)
        folder = Path(self.cut).expanduser()
        return str(folder.resolve()) if folder.exists() else self.cut

    @property
    def is_patched(self) -> bool:
        """Whether the model that is trained was patched, for this healing or before."""
        return (Path(self.model).expanduser() / PATCH_FILE).is_file()

    @property
    def original_store(self) -> ResultStore | None:
        """The results of the uncut model; none if quantised, as it then computes otherwise."""
        if self.original is None or self.recipe.dtype in QUANTISED:
            return None
        return self.stores(self.original.source(self.recipe.dtype))

    @property
    def original_key(self) -> str:
        """The name of the uncut model's loss among those that are known."""
        return f"uncut {self.original.name if self.original else ''}"

    def known_losses(self) -> dict[str, Loss]:
        """The losses that were given, by the names that the file of losses has for them."""
        names = self.original_key, "cut" if self.is_patched else "before"
        return {name: loss for name, loss in zip(names, self.losses, strict=True) if loss}


# The folder that the healing works in
@contextmanager
def work_folder(out: Path, job: str, *, overwrite: bool) -> Iterator[Path]:
    """Open the folder that becomes ``out``: the main process's, for all processes to use.

    For the others it is there once they have agreed with the main one on anything. The work of
    another job than ``job`` (:func:`describe_job`) is discarded.
    """
    if is_main_process():
        with resumable_folder(out, job, overwrite) as folder:
            yield folder
    else:
        yield partial_folder(out) / "folder"


def describe_job(healing: Healing, evaluated: TextsIdentity | None, *, merge: bool) -> str:
    """Describe a healing, in a line of JSON, by what its result depends on.

    The number of devices, the size of a forward and recomputation are no part of it.
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
    if healing.answers is not None:
        described["answers"] = healing.answers.fingerprint
    return json.dumps(described, sort_keys=True)


def finished(folder: Path) -> Healing | None:
    """The record of a healing that is written whole; None if it is not."""
    is_whole = (folder / HEALING_FILE).is_file() and not (folder / TRAINING).exists()
    return Healing.load(folder) if is_whole else None


def kept_losses(folder: Path) -> dict[str, Loss]:
    """Read the held-out losses by name that an earlier run has kept."""
    file = folder / LOSSES
    found = json.loads(file.read_bytes()) if file.is_file() else {}
    return {name: Loss.from_json(loss) for name, loss in found.items()}


def keep_loss(folder: Path, name: str, loss: Loss) -> Loss:
    """Keep a held-out loss beside others, and give it; OutputError if it cannot be written."""
    losses = {**kept_losses(folder), name: loss}
    data = {name: one.to_json() for name, one in losses.items()}
    write_file(folder / LOSSES, json.dumps(data).encode())
    return loss


# The patched cut that the training starts from
def patched_cut(job: HealingJob, out: Path, dtype: str) -> Path:
    """Patch a cut for its healing, in a hidden sibling of ``out``, unless an earlier run did.

    Only without a patch the original is loaded, in the cut's stored dtype, and restored afterwards.
    """
    assert job.original is not None
    if job.is_patched:
        raise RecipeError(f"{job.cut} is patched already: leave out from_patch (--from-patch)")
    patch = _patch_job(job, job.original.name).encode()
    place = out.absolute().with_name(f".{out.name[:200]}.patched")
    for found in (place, partial_folder(out) / "folder" / PATCHED):
        if (found / _PATCH_JOB).is_file() and (found / _PATCH_JOB).read_bytes() == patch:
            say_goes_on("the cut is patched", job.progress)
            return found
    model, tokenizer = job.original.load(dtype)
    require_whole(model)
    kept = place.with_suffix(".patching")
    with with_patch(
        model,
        tokenizer,
        job.plan,
        texts=job.texts,
        max_length=job.recipe.max_length,
        checkpoint=kept,
        progress=job.progress,
    ) as done:
        save_patched(model, tokenizer, place, done=done, overwrite=True, more={_PATCH_JOB: patch})
        shutil.rmtree(kept, ignore_errors=True)
    return place


def _patch_job(job: HealingJob, original: str) -> str:
    """The hash by which this patch is known; of endless texts, the first count."""
    digest = hashlib.sha256()
    for text in islice(job.texts, _HASHED_TEXTS):
        if not isinstance(text, str):
            raise TextsError(f"a text is of type {type(text).__name__}: expected str")
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    try:
        cut = stored_digest(job.cut)
    except OSError as error:
        raise ModelError(f"cannot read {job.cut}: {why(error, job.cut)}") from error
    # A hash, as the file stays beside the patched cut and the name may be a path.
    return hash_of([cut, original, digest.hexdigest(), job.recipe.max_length])


def move_patched(patched: Path, folder: Path) -> Path:
    """Move a patched cut into the folder of its adapters, and give its new place."""
    if patched != folder / PATCHED:
        try:
            patched.rename(folder / PATCHED)
        except OSError as error:
            raise OutputError(
                f"cannot write {folder / PATCHED}: {why(error, folder / PATCHED)}"
            ) from error
    return folder / PATCHED


def copy_patched(patched: Path, folder: Path) -> None:
    """Copy the files of a patched cut, which is the result where no training lowers its loss."""
    beside = shutil.ignore_patterns(_PATCH_JOB)
    shutil.copytree(patched, folder, ignore=beside, dirs_exist_ok=True)


# The adapters
_ADAPTER_FILES = (WEIGHTS_FILE, CONFIG_FILE)


def write_adapters(
    folder: Path,
    base: str,
    checkpoint: Path,
    *,
    healing: Healing,
    tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool = False,
) -> None:
    """Write a repository of peft from the Trainer's checkpoint that is kept, without the record.

    ``base`` is the cut that was trained.
    """
    copy_beside(str(checkpoint), folder, _ADAPTER_FILES)
    config = read_adapter_config(folder)
    if isinstance(config["target_modules"], list):  # a set of peft's, in any order
        config["target_modules"].sort()
    write_file(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode())
    tokenizer.save_pretrained(folder)
    cut = find_source(base)
    copy_beside(base, folder, (PATCH_FILE,))
    copy_files(cut.licenses, folder)
    healing.plan.save(folder / PLAN_FILE)
    rows = healing_rows(healing)
    card = adapters_card(healing.plan, cut, rows=rows, trust_remote_code=trust_remote_code)
    write_file(folder / CARD_FILE, card.encode())
