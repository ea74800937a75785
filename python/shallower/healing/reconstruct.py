"""A cut healed locally: the layer before each block fitted to the uncut model's stream behind it.

All weights of that layer are trained by a few hundred steps of Adam on states that are made once
(XMerge, 2609.02083): there is no head and no loss of tokens, and no other weight changes. The
result is a standard checkpoint.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.in_model import without_layers
from ..errors import ModelError, OutputError, ProcessesError, RecipeError
from ..evaluation.loss import measure_loss, require_predictable
from ..models.decoder import Decoder
from ..models.dtypes import computing
from ..models.identity import stored_digest
from ..models.layerwise import Layerwise
from ..patching.saving import PATCH_FILE
from ..processes import num_processes
from ..progress import Advance, track
from ..storage import new_folder, write_file
from ..texts.batches import Batch
from ..texts.sequences import Samples, read_samples
from ..values.healing import HEALING_FILE, Healing, Measured, Step
from ..values.identity import ModelIdentity
from ..values.loss import Loss
from ..values.plan import Plan
from ..values.recipe import GLOBAL_BATCH, Resolved
from ..values.tokens import Tokens
from .checks import require_plan_of
from .determinism import deterministic
from .distillation import join_of
from .layer_fit import SequenceStates, batch_of, fit_layer
from .loaded_models import LoadedOnce, Uncut
from .patched import copy_to
from .saving import write_reconstructed

NUM_TOKENS = 131_072
"""Tokens whose states are kept, at most, and gone through again: as many as a patch fits."""


def require_reconstructible(plan: Plan) -> None:
    """Refuse what cannot be healed locally, before a model is loaded.

    Args:
        plan: of the cut.

    Raises:
        RecipeError: there is no layer before a block.
        ProcessesError: this is one of several processes.
    """
    if plan.blocks[0].start == 0:
        raise RecipeError(
            f"there is no layer before the block {plan.blocks[0]} that could be fitted: choose "
            f"another objective (objective, --objective), or drop later layers"
        )
    if num_processes() > 1:
        raise ProcessesError(
            "several processes cannot reconstruct together: reconstruct in one, and heal what it "
            "leaves by another objective"
        )


@dataclass(frozen=True, slots=True)
class _Fitted:
    """What was trained of a cut: float32 weights by its layers, and how it went."""

    identity: ModelIdentity
    weights: dict[int, dict[str, torch.Tensor]]
    steps: tuple[Step, ...]
    before: Loss | None


@dataclass
class Reconstruction:
    """A local healing; of all models it holds one at a time.

    Attributes:
        cut: the cut that it starts from, patched or not: a folder or hub id.
        plan: its plan.
        recipe: the settings.
        texts: texts to train on.
        held_out: held-out texts, if there are any.
        uncut: the uncut model.
        losses: the losses of the uncut model and of the cut that are known already.
        patched: the folder of the cut if it was patched for this healing.
        progress: whether to show bars; by default if standard error is a terminal.
        trust_remote_code: run code that comes with the models.
    """

    cut: str
    plan: Plan
    recipe: Resolved
    texts: Iterable[str]
    held_out: list[str] | None
    uncut: Uncut
    losses: tuple[Loss | None, Loss | None]
    patched: Path | None
    progress: bool | None
    trust_remote_code: bool

    def to(self, out: Path, dtype: str, *, overwrite: bool) -> Healing:
        """Heal into a folder, which appears whole or not at all.

        Args:
            out: a folder that does not exist yet, or is empty.
            dtype: the dtype that the cut is stored in.
            overwrite: replace what is there, once the new folder is complete.

        Returns:
            The record.

        Raises:
            ShallowerError: as :func:`shallower.heal`.
        """
        # Of two dtypes float32 holds the values of both.
        computed = dtype if dtype == self.recipe.dtype else "float32"
        with tempfile.TemporaryDirectory(prefix="shallower-") as folder:
            samples, wanted, known = self._run_uncut(Path(folder), computed)
            fitted = self._fit(Path(folder), samples, wanted, computed)
        model, tokenizer = self._load(dtype).load(dtype)
        _set_weights(Decoder.of(model), fitted.weights)
        held_out = []
        if self.held_out and fitted.before is not None:
            after = self._loss(Decoder.of(model), tokenizer, "loss, reconstructed")
            held_out = [Measured(0, fitted.before), Measured(self.recipe.steps, after)]
        healing = Healing(
            model=fitted.identity, weights=stored_digest(self.cut), plan=self.plan,
            recipe=self.recipe, adapted=sum(map(len, fitted.weights.values())),
            texts=samples.identity, steps=fitted.steps, held_out=tuple(held_out),
            best_step=self.recipe.steps, original=known.get("original"), cut=known.get("cut"),
        )  # fmt: skip
        if held_out and healing.after and not healing.after.nats < held_out[0].loss.nats:
            healing = self._without_training(healing)
        return self._write(out, model, tokenizer, healing=healing, overwrite=overwrite)

    def _without_training(self, healing: Healing) -> Healing:
        """The record where the loss did not fall: a patch that was made for it is kept."""
        if self.patched is not None:
            return replace(healing, best_step=0)
        raise ModelError(
            f"the reconstruction made it worse: the held-out loss was {healing.before} before it, "
            f"and {healing.after} after it; nothing is saved. Lower the learning rate "
            f"(learning_rate, --learning-rate), or give more texts"
        )

    def _write(
        self,
        out: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        healing: Healing,
        overwrite: bool,
    ) -> Healing:
        with new_folder(out, overwrite) as folder:
            try:
                if self.patched is not None and healing.best_step == 0:
                    copy_to(self.patched, folder)
                else:
                    write_reconstructed(model, tokenizer, folder, base=self.cut, healing=healing)
                write_file(folder / HEALING_FILE, healing.to_bytes())
            except (OSError, SafetensorError) as error:
                raise OutputError(f"cannot write the healed model: {error}") from error
        return healing

    def _run_uncut(
        self, folder: Path, dtype: str
    ) -> tuple[Samples, list[SequenceStates], dict[str, Loss]]:
        """The sequences, the uncut model's states behind every block, and known losses."""
        model, tokenizer = self.uncut.load(dtype)
        if self.held_out is not None:
            require_predictable(tokenizer, self.held_out, self.recipe.max_length)
        enough = max(GLOBAL_BATCH, NUM_TOKENS // self.recipe.max_length)
        samples = read_samples(
            tokenizer, self.texts, max_length=self.recipe.max_length, packing=self.recipe.packing,
            num_samples=min(enough, self.recipe.steps * GLOBAL_BATCH),
        )  # fmt: skip
        known = self._known(model, tokenizer)
        runner, batches = Layerwise(model), list(self._batches(samples))
        runner.check(batches[0])
        wanted: list[SequenceStates] = []
        with self._bar("states of the uncut model", len(batches) * len(self.plan.blocks)) as bar:
            for number, block in enumerate(self.plan.blocks):
                start = self.plan.blocks[number - 1].stop if number else 0
                before = wanted[-1] if number else None
                after = _states(folder / f"wanted {number}", samples, model)
                self._run(runner, batches, range(start, block.stop), before, after, bar)
                wanted.append(after)
        self.uncut.release()
        return samples, wanted, known

    def _fit(
        self, folder: Path, samples: Samples, wanted: Sequence[SequenceStates], dtype: str
    ) -> _Fitted:
        """The cut's layers before the blocks, trained one after the other."""
        cut = self._load(dtype)
        model, tokenizer = cut.load(dtype)
        decoder = Decoder.of(model)
        require_plan_of(decoder, self.plan, self.cut)
        before = self._before(decoder, tokenizer)
        model.requires_grad_(False)
        runner, batches = Layerwise(model), list(self._batches(samples))
        states = _states(folder / "given", samples, model)
        weights: dict[int, dict[str, torch.Tensor]] = {}
        steps: list[Step] = []
        done: int | None = None
        total = len(wanted) * (len(batches) + self.recipe.steps)
        with deterministic(decoder.device), self._bar("reconstruct", total) as bar:

            def report(step: Step) -> None:
                steps.append(replace(step, step=len(steps) + 1))
                bar(1, f"error {step.loss:.4f}")

            for block, goal in zip(self.plan.blocks, wanted, strict=True):
                layer = join_of(self.plan, block) - 1
                _require_own_weights(decoder, layer)
                source = None if done is None else states
                self._run(runner, batches, range(done or 0, layer), source, states, bar)
                weights[layer] = fit_layer(
                    runner, layer, samples, given=states, wanted=goal, recipe=self.recipe,
                    report=report,
                )  # fmt: skip
                done = layer
        cut.release()
        return _Fitted(decoder.identity, weights, tuple(steps), before)

    def _load(self, dtype: str) -> LoadedOnce:
        return LoadedOnce(self.cut, trust_remote_code=self.trust_remote_code)

    def _batches(self, samples: Samples) -> Iterator[Batch]:
        size = self.recipe.batch_size
        for start in range(0, len(samples), size):
            yield batch_of(samples, range(start, min(start + size, len(samples))))

    def _run(
        self,
        runner: Layerwise,
        batches: Sequence[Batch],
        layers: range,
        before: SequenceStates | None,
        after: SequenceStates,
        bar: Advance,
    ) -> None:
        """Run layers over all sequences, from the embedding or from states."""
        for batch in batches:
            states = runner.embed(batch) if before is None else before.take(batch)
            after.put(batch, runner.run(batch, states, layers))
            bar(1)

    def _bar(self, name: str, total: int) -> AbstractContextManager[Advance]:
        return track(name, total, self.progress)

    @property
    def _starts_patched(self) -> bool:
        return (Path(self.cut).expanduser() / PATCH_FILE).is_file()

    def _known(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Loss]:
        """The losses of the uncut model, and of the cut before its patch."""
        original, cut = self.losses
        decoder = Decoder.of(model)
        if self.held_out and original is None:
            original = self._loss(decoder, tokenizer, "loss, uncut")
        if self.held_out and cut is None and self.patched is not None:
            with without_layers(model, self.plan.blocks):
                cut = self._loss(decoder, tokenizer, "loss, unpatched")
        named = {"original": original, "cut": cut if self._starts_patched else None}
        return {name: loss for name, loss in named.items() if loss is not None}

    def _before(self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> Loss | None:
        """The held-out loss of the cut that is trained."""
        if not self.held_out:
            return None
        given = None if self._starts_patched else self.losses[1]
        return given or self._loss(decoder, tokenizer, "loss, before")

    def _loss(self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, description: str) -> Loss:
        with computing(self.recipe, decoder.device):
            return measure_loss(
                decoder, tokenizer, self.held_out or [],
                tokens=Tokens(self.recipe.max_length, self.recipe.batch_size),
                progress=self.progress, description=description,
            )  # fmt: skip


def _states(file: Path, samples: Samples, model: PreTrainedModel) -> SequenceStates:
    width = model.config.get_text_config(decoder=True).hidden_size
    return SequenceStates(file, samples, width, model.dtype)


def _set_weights(decoder: Decoder, weights: dict[int, dict[str, torch.Tensor]]) -> None:
    """Put trained weights into layers, rounded once."""
    with torch.no_grad():
        for layer, by_name in weights.items():
            stored = dict(decoder.layers.modules[layer].named_parameters())
            for name, weight in by_name.items():
                stored[name].copy_(weight)


def _require_own_weights(decoder: Decoder, layer: int) -> None:
    """Refuse to train a layer of which another part of the model would change."""
    module = decoder.layers.modules[layer]
    own = {id(weight) for weight in module.parameters()}
    inside = set(module.modules())
    for other in decoder.model.modules():
        if other not in inside and any(id(w) in own for w in other.parameters(recurse=False)):
            raise ModelError(
                f"layer {layer} of {type(decoder.model).__name__} shares weights with others, and "
                f"cannot be fitted alone: choose another objective (objective, --objective)"
            )
