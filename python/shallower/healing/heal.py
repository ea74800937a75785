"""The healing of a cut, from its folder to the adapters or the merged model. The stages joined."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from ..errors import MissingExtraError, ModelError, OutputError, PlanError, RecipeError
from ..evaluation.loss import evaluate_loss, require_predictable
from ..models.architecture import find_layers, input_device
from ..models.feed_forward import feed_forward_targets
from ..models.identity import identify, stored_digest
from ..models.loading import load_model
from ..models.quantised import keep_unpacked
from ..processes import is_main_process, num_processes
from ..progress import track
from ..storage import check_free, new_folder, partial_folder, resumable_folder, write_file
from ..texts.batches import TokenBatches
from ..texts.sequences import read_samples
from ..values.files import PLAN_FILE
from ..values.healing import HEALING_FILE, Healing
from ..values.loss import Loss
from ..values.plan import Plan, TextsIdentity
from ..values.recipe import GLOBAL_BATCH, ModelFacts, Recipe, Resolved
from .losses import Distillation
from .merging import PROBE, stored_plainly
from .patched import PATCHED, patched_cut, settle
from .saving import draw, write_adapters, write_merged
from .training import add_adapters, computing, train

_TRAINING = "training"


def heal(
    path: str | Path,
    texts: Iterable[str],
    out: str | Path,
    recipe: Recipe | None = None,
    eval_texts: Iterable[str] | None = None,
    original: str | Path | None = None,
    merge: bool = False,
    from_patch: bool = False,
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
        texts: to train on, read once, and only as many as the steps take.
        out: a folder that does not exist yet, or is empty.
        recipe: the settings; the paper's by default.
        eval_texts: held out; the adapters of the least loss on them are kept.
        original: the uncut model: its held-out loss is measured, and it teaches if the recipe
            distils.
        merge: fold the adapters into the unquantised weights of the cut.
        from_patch: patch the cut in closed form first, by :func:`shallower.patch` of ``original``
            on ``texts``, and train on from there. Adapters that are not merged need the patched
            cut, which lies beside them.
        overwrite: replace what is at ``out``, once the new folder is complete.
        progress: bars with ETA on standard error; by default if that is a terminal.
        trust_remote_code: run code that comes with the models.

    Raises:
        PlanError: the model was not cut, or not out of ``original``.
        RecipeError: settings that do not fit.
        TextsError: too few texts, or none that are held out.
        ModelError: nothing to adapt, weights that cannot be merged into, a loss that is not
            finite or at no step below that before healing.
        OutputError: ``out`` holds something already, or cannot be written to.
        MissingExtraError: peft, or bitsandbytes for 4 and 8 bits, is not installed.
    """
    _require_peft()
    path, out, recipe = str(path), Path(out), recipe or Recipe()
    check_free(out, overwrite)
    if recipe.distill and original is None:
        raise RecipeError("distillation needs the uncut model: name it (original, --original)")
    plan = read_plan(path)
    resolved = resolve(path, plan, recipe, trust_remote_code)
    uncut = None if original is None else str(original)
    dtype = stored_plainly(path, trust_remote_code) if merge or from_patch else ""
    patched = None
    if from_patch:
        if uncut is None:
            raise RecipeError("a patch needs the uncut model: name it (original, --original)")
        _require_one_process()
        patched = patched_cut(
            path, plan, uncut, texts, out, dtype, resolved.max_length, progress, trust_remote_code
        )
    done = _Run(
        path, plan, resolved, texts, eval_texts, uncut, merge, progress, trust_remote_code, patched
    ).to(out, overwrite)
    if patched is not None:
        shutil.rmtree(patched, ignore_errors=True)
    return done


def read_plan(path: str) -> Plan:
    """The plan beside a cut model.

    Raises:
        PlanError: there is none.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        found: str | None = str(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
    elif folder.exists() or path.startswith(("/", ".", "~")) or folder.suffix == ".gguf":
        kind = "a file" if folder.exists() else "not there"
        raise ModelError(f"{path} is {kind}: expected the folder of a cut, or a hub id")
    else:
        try:
            found = cached_file(path, PLAN_FILE, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise ModelError(f"cannot load {path}: {error}") from error
    if found is None:
        raise PlanError(
            f"{path} was not cut: there is no {PLAN_FILE} beside its weights. Cut a model first: "
            f"shallower prune MODEL --drop 12:20 --out cut"
        )
    return Plan.load(found)


def resolve(path: str, plan: Plan, recipe: Recipe, trust_remote_code: bool = False) -> Resolved:
    """The settings for a cut model, by its config alone.

    Raises:
        RecipeError: settings that do not fit the model or the number of processes.
        ModelError: its config cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the config of {path}: {error}") from error
    return recipe.resolve(_facts(config, plan.num_layers), num_processes())


def require_healable(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    recipe: Recipe,
) -> None:
    """Refuse, before a model is cut, patched and healed, what can be known then.

    Raises:
        RecipeError: settings that do not fit the model, weights of 4 or 8 bits, which nothing is
            merged into, or several processes.
        TextsError: too few texts for one step.
        MissingExtraError: peft is not installed.
    """
    _require_peft()
    _require_one_process()
    if recipe.dtype in ("nf4", "int8"):
        raise RecipeError(
            f"adapters are not merged into weights of {recipe.dtype}: cut plain ones (dtype, "
            f"--dtype bfloat16)"
        )
    resolved = recipe.resolve(_facts(model.config, len(find_layers(model))))
    read_samples(tokenizer, texts, resolved.max_length, resolved.packing, GLOBAL_BATCH)


def _require_peft() -> None:
    if find_spec("peft") is None:
        raise MissingExtraError("peft", "heal", "healing")


def _require_one_process() -> None:
    if num_processes() > 1:
        raise RecipeError(
            "several processes cannot patch together: shallower patch the model first, and heal "
            "what it leaves"
        )


def _facts(config: PretrainedConfig, num_layers: int) -> ModelFacts:
    decoder: Any = config.get_text_config(decoder=True)
    positions = getattr(decoder, "max_position_embeddings", None)
    return ModelFacts(
        model_type=decoder.model_type,
        hidden_size=decoder.hidden_size,
        num_layers=num_layers,
        positions=positions if isinstance(positions, int) and positions > 0 else None,
    )


@dataclass
class _Run:
    """One healing on its way."""

    cut: str
    plan: Plan
    recipe: Resolved
    texts: Iterable[str]
    eval_texts: Iterable[str] | None
    original: str | None
    merge: bool
    progress: bool | None
    trust_remote_code: bool
    patched: Path | None

    @property
    def path(self) -> str:
        """Of the model that is trained."""
        return str(self.patched or self.cut)

    def to(self, out: Path, overwrite: bool) -> Healing:
        held_out = None if self.eval_texts is None else list(self.eval_texts)
        model, tokenizer = self._load(self.path)
        layers = len(find_layers(model))
        if len(self.plan.survivors) != layers:
            raise PlanError(
                f"the plan beside {self.path} leaves {len(self.plan.survivors)} layers, and the "
                f"model has {layers}: it is of another cut"
            )
        if held_out is not None:
            require_predictable(tokenizer, held_out, self.recipe.max_length)
        samples = read_samples(
            tokenizer, self.texts, self.recipe.max_length, self.recipe.packing,
            self.recipe.steps * GLOBAL_BATCH,
        )  # fmt: skip
        targets = feed_forward_targets(model, self.recipe.attention)
        recipe = self.recipe.without_dropout() if targets.parameters else self.recipe
        healing = Healing(
            identify(model),
            stored_digest(self.path),
            self.plan,
            recipe,
            len(targets),
            samples.identity,
            (),
            (),
            0,
        )
        if self.patched is not None and held_out:
            healing = replace(healing, cut=self._unpatched(tokenizer, held_out))
        teacher = self._teacher()
        measured = held_out if held_out is None else _identity(tokenizer, held_out, recipe)
        with _work(out, _job(healing, measured, self.merge), overwrite) as folder:
            if (folder / HEALING_FILE).is_file() and not (folder / _TRAINING).exists():
                return Healing.load(folder)  # all that was left to do was to rename the folder
            if teacher and held_out:
                healing = replace(
                    healing, original=self._loss(teacher, tokenizer, held_out, "loss, uncut")
                )
            distillation = None
            if teacher is not None and recipe.distill:
                distillation = Distillation(model, teacher, self.plan)
            del teacher
            adapted = add_adapters(model, targets, recipe, self._base(out))
            device = input_device(find_layers(model))

            def loss() -> Loss:
                with computing(recipe, device):
                    return self._loss(model, tokenizer, held_out or [], "loss, held out")

            with track(
                "heal", recipe.steps, self.progress if is_main_process() else False
            ) as advance:
                trained = train(
                    adapted, samples, recipe, folder / _TRAINING, loss if held_out else None,
                    distillation, advance,
                )  # fmt: skip
            healing = replace(
                healing,
                steps=trained.steps,
                held_out=trained.held_out,
                best_step=trained.best_step,
                tokens_per_second=trained.tokens_per_second,
            )
            _check_better(healing)
            if is_main_process():
                healing = self._write(
                    folder, trained.checkpoint, healing, adapted, tokenizer, held_out
                )
        return healing

    def _base(self, out: Path) -> str:
        """The name by which the adapters will find their model, from any folder."""
        if self.patched is not None:
            return str(out.absolute() / PATCHED)
        folder = Path(self.path).expanduser()
        return str(folder.resolve()) if folder.exists() else self.path

    def _load(self, path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        device_map: Any = None
        if torch.cuda.is_available():
            several = num_processes() > 1
            device_map = {"": int(os.environ.get("LOCAL_RANK", "0"))} if several else "auto"
        model, tokenizer = load_model(
            path, self.recipe.dtype, device_map, trust_remote_code=self.trust_remote_code
        )
        keep_unpacked(model)
        return model, tokenizer

    def _teacher(self) -> PreTrainedModel | None:
        if self.original is None:
            return None
        teacher, _ = self._load(self.original)
        self.plan.check_model(identify(teacher))
        return teacher

    def _unpatched(self, tokenizer: PreTrainedTokenizerBase, held_out: list[str]) -> Loss:
        cut, _ = self._load(self.cut)
        with computing(self.recipe, input_device(find_layers(cut))):
            return self._loss(cut, tokenizer, held_out, "loss, unpatched")

    def _loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[str],
        description: str,
    ) -> Loss:
        return evaluate_loss(
            model, tokenizer, texts, self.recipe.max_length, self.recipe.batch_size,
            self.progress if is_main_process() else False, description,
        )  # fmt: skip

    def _write(
        self,
        folder: Path,
        checkpoint: Path,
        healing: Healing,
        adapted: Any,
        tokenizer: PreTrainedTokenizerBase,
        held_out: list[str] | None,
    ) -> Healing:
        """Everything that ``out`` holds; the record comes last, then the training goes."""
        try:
            if self.merge:
                trained = None
                if healing.recipe.dtype in ("nf4", "int8"):
                    trained = _logits(adapted, tokenizer, healing.recipe, checkpoint)
                healing = write_merged(
                    folder,
                    self.path,
                    checkpoint,
                    healing,
                    held_out,
                    trained,
                    self.trust_remote_code,
                )
            else:
                write_adapters(folder, self.path, checkpoint, healing, tokenizer)
                if self.patched is not None:
                    settle(self.patched, folder)
            draw(folder, healing)
            write_file(folder / HEALING_FILE, healing.to_bytes())
            shutil.rmtree(folder.parent / "done", ignore_errors=True)
            (folder / _TRAINING).rename(folder.parent / "done")
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write the healed model: {error}") from error
        return healing


@contextmanager
def _work(out: Path, job: str, overwrite: bool) -> Iterator[Path]:
    """The folder that becomes ``out``: of the first process, for all to use."""
    if num_processes() == 1:
        with resumable_folder(out, job, overwrite) as folder:
            yield folder
        return
    state = PartialState(cpu=not torch.cuda.is_available())
    if is_main_process():
        with resumable_folder(out, job, overwrite) as folder:
            state.wait_for_everyone()
            yield folder
            PartialState().wait_for_everyone()
        return
    state.wait_for_everyone()
    yield partial_folder(out) / "folder"
    PartialState().wait_for_everyone()


def _job(healing: Healing, measured: TextsIdentity | None, merge: bool) -> str:
    """What tells this healing from any other; how it is shared among devices does not."""
    recipe = healing.recipe.to_json()
    for name in ("batch_size", "recompute"):
        del recipe[name]
    described = {
        "model": healing.model.fingerprint,
        "weights": healing.weights,
        "recipe": recipe,
        "texts": healing.texts.fingerprint,
        "eval_texts": measured and measured.fingerprint,
        "merge": merge,
    }
    return json.dumps(described, sort_keys=True)


def _identity(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], recipe: Resolved
) -> TextsIdentity:
    batches = TokenBatches(tokenizer, texts, recipe.max_length, 64, min_tokens=2)
    for _ in batches:
        pass
    return batches.identity


def _check_better(healing: Healing) -> None:
    before, after = healing.before, healing.after
    if before and after and after.nats >= before.nats:
        raise ModelError(
            f"healing made it worse: the held-out loss was {before} before it, and {after} at its "
            f"best, step {healing.best_step}; nothing is saved. Lower the learning rate "
            f"(learning_rate, --learning-rate), or give more texts"
        )


def _logits(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, recipe: Resolved, checkpoint: Path
) -> torch.Tensor:
    """The logits on the probe of the kept adapters on the model as it was trained."""
    adapted.load_adapter(str(checkpoint), "default")
    adapted.eval()
    device = input_device(find_layers(adapted.get_base_model()))
    input_ids = tokenizer(PROBE, return_tensors="pt")["input_ids"].to(device)
    with torch.inference_mode(), computing(recipe, device):
        logits: torch.Tensor = adapted(input_ids=input_ids, use_cache=False).logits
    return logits.float()


def merge(
    adapters: str | Path,
    out: str | Path,
    model: str | Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Healing:
    """Fold the adapters of :func:`heal` into the unquantised weights of the cut.

    The sum of a weight and its adapter is made in float32, and rounded once to the dtype that
    the model is stored in. The new checkpoint is reloaded by stock transformers, and its logits
    are compared with those of the adapters on the model.

    Args:
        adapters: the folder that :func:`heal` left.
        out: a folder that does not exist yet, or is empty.
        model: the cut; by default where it was when it was healed.
        overwrite: replace what is at ``out``, once the new folder is complete.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelError: no adapters of shallower, adapters of another model, quantised weights, or
            logits that differ.
        OutputError: ``out`` holds something already, or cannot be written to.
        MissingExtraError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise MissingExtraError("peft", "heal", "merging adapters")
    adapters, out = Path(adapters), Path(out)
    check_free(out, overwrite)
    healing = Healing.load(adapters)
    if healing.merge is not None:
        raise ModelError(f"{adapters} is merged already: expected a folder of adapters")
    base = str(model or _remembered_base(adapters))
    with new_folder(out, overwrite) as folder:
        try:
            healing = write_merged(folder, base, adapters, healing, None, None, trust_remote_code)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {out}: {error}") from error
        draw(folder, healing)
        write_file(folder / HEALING_FILE, healing.to_bytes())
    return healing


def _remembered_base(adapters: Path) -> str:
    try:
        config = json.loads((adapters / "adapter_config.json").read_text(encoding="utf-8"))
        return str(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{adapters} holds no adapters of peft: {error}") from error
