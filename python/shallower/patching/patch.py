"""Repair in minutes: the layer before a cut is solved in closed form, then all behind it descend.

Least squares fits that layer's last matrices to x^(stop) of the whole model; then all matrices
descend towards its next-token distributions and the next tokens. No parameter is added.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.in_model import drop_layers, without_layers
from ..cutting.laid_over import narrower_dtype
from ..errors import PatchError
from ..models.architecture import text_config
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..results.patch import Patch, check_patchable
from ..results.speech import Answer
from ..settings.stages import PatchSettings
from ..texts.batches import AnyTexts
from ..texts.sequences import check_answers, mixed, usable_answers
from ..values.layers import Layers
from ..values.plan import Plan
from .checkpoint import Changes
from .solver import Solver
from .states import divide, no_layer_before

NUM_TOKENS, CPU_TOKENS = 131_072, 32_768
"""Tokens to fit by default, at most, on a GPU and on a CPU."""

PATCH_TOKENS = 196_608
"""Tokens that the patch of a run fits, at most: as many as its steps take."""

CPU_WORK = 3e13
"""Tokens times parameters that a CPU patches in some ten minutes."""


def fitted_tokens(on_cpu: bool) -> int:
    """The tokens that a patch fits by default."""
    return CPU_TOKENS if on_cpu else NUM_TOKENS


def patch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Plan | Layers,
    *,
    texts: AnyTexts,
    answers: Sequence[Answer] = (),
    settings: PatchSettings | None = None,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Patch:
    """Drop layers and repair the cut in minutes, in place.

    Args:
        model: the whole model, in float32, bfloat16 or float16. If its layers are streamed, they
            are read twice a step, and what is held of the matrices that move lies in temporary
            files.
        tokenizer: its tokenizer.
        layers: a plan, whose score, metric, texts and strategy are kept; or blocks, ranges or
            indices to drop, 0-based.
        texts: calibration texts, read once; every eighth is held out, to choose by and to
            report on.
        answers: what the whole model said to prompts, to fit and choose on beside the texts, as
            :func:`shallower.answer_prompts` gives it; each once, behind its prompt, which is only
            given.
        settings: the settings; by default those of :class:`PatchSettings`. The matrices that move
            are held four times in the memory of the CPU. A model on the CPU takes up to a quarter
            of what is free for the graphs of its layers.
        checkpoint: a folder that keeps the work so far: the matrices that were solved and, every 20
            seconds or more, the state of the steps. It takes at most five times the size of the
            weights that move. The same patch resumes from it. It stays when the patch is done:
            delete it.
        progress: whether to show a bar on standard error; by default if that is a terminal.
        options: settings by keyword, as ``num_tokens=65_536``: any field of :class:`PatchSettings`.

    Weights of a checkpoint that stores fewer bits than ``model`` has are rounded to its dtype, in
    which they are saved.

    Returns:
        The plan that was carried out; the layers that were solved anew; the losses in nats a token
        of the whole model, the cut and the patched cut on the held-out texts.

    Raises:
        SettingsError: there is no such setting.
        PatchError: the loss on held-out text would not fall; there is no layer before a
            block; a layer does not write by a plain linear map (mixtures of experts, norms
            behind the feed-forward, quantised weights); there is not enough memory. The model
            is then as it was.
        TextsError: there are too few texts, or answers that are none of this model.
        RecipeError: ``share`` is out of range.
        PlanError: the plan is for another model.
        LayersError, ModelError: as :func:`shallower.drop_layers`.

    Example:
        >>> plan = scan.plan(8)
        >>> done = sh.patch(model, tokenizer, plan, texts=texts)
        >>> done.patched < done.cut
        True
        >>> sh.save_patched(model, tokenizer, "patched", done=done)
    """
    with _solved(
        model,
        tokenizer,
        layers,
        texts=texts,
        answers=answers,
        settings=settings,
        checkpoint=checkpoint,
        progress=progress,
        **options,
    ) as (done, changes):
        drop_layers(model, done.plan.blocks)
        changes.commit()
    return done


@contextmanager
def with_patch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: Plan | Layers, **how: Any
) -> Iterator[Patch]:
    """Patch a model inside the ``with`` statement, as :func:`patch`; it is as before afterwards."""
    with (
        _solved(model, tokenizer, layers, **how) as (done, _),
        without_layers(model, done.plan.blocks),
    ):
        yield done


@contextmanager
def _solved(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Plan | Layers,
    *,
    texts: AnyTexts,
    answers: Sequence[Answer] = (),
    settings: PatchSettings | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> Iterator[tuple[Patch, Changes]]:
    """Solve a model's matrices, and yield the patch and its changes; they stay if committed."""
    settings = PatchSettings.of(settings, options)
    tokens, share = settings.tokens, settings.share
    plan = plan_of(model, layers)
    most = settings.num_tokens or fitted_tokens(Decoder.of(model).device.type == "cpu")
    answers = [*answers]
    if answers:
        check_answers(answers, text_config(model).vocab_size)
        answers = usable_answers(answers, tokens.max_length)
        texts = mixed(tokenizer, texts, answers, share=share, max_length=tokens.max_length)
    fitted, held_out = divide(tokenizer, texts, tokens=tokens, num_tokens=most)
    changes = Changes()
    try:
        try:
            kept = None if checkpoint is None else Path(checkpoint)
            with torch.no_grad():
                solver = Solver(Layerwise(model), plan, fitted, held_out, changes, kept)
                done = solver.solve(progress)
                del solver  # whose files take room on the disk
                if narrow := narrower_dtype(model):
                    changes.round_to(narrow)
        except torch.OutOfMemoryError as error:
            raise PatchError(
                f"there is not enough memory to patch with {tokens.texts} texts of at most "
                f"{tokens.max_length} tokens in one forward: lower batch_size (--batch-size), or "
                f"let layers stay in CPU memory (device_map, --device-map)",
                see="streaming",
            ) from error
        if not done.patched < done.cut:
            raise PatchError(
                f"the patch does not help: the loss on {done.num_held_out} held-out tokens is "
                f"{done.patched:.4f} nats with it and {done.cut:.4f} without, of "
                f"{done.original:.4f} before the cut; give more texts, or drop other layers"
            )
        done = replace(
            done,
            max_length=tokens.max_length,
            batch_size=tokens.texts,
            most_tokens=most,
            share=share if answers else None,
        )
        yield done, changes
    finally:
        changes.undo()


def plan_of(model: PreTrainedModel, layers: Plan | Layers) -> Plan:
    """The plan of a cut that can be patched."""
    decoder = Decoder.of(model)
    plan = Plan.of(len(decoder), layers)
    plan.check_model(decoder.identity)
    check_patchable(plan)
    if plan.blocks[0].start == 0:
        raise no_layer_before(plan.blocks[0])
    return replace(plan, model=decoder.identity)


def patch_tokens(parameters: int, *, on_cpu: bool) -> int:
    """The tokens that the patch of a run fits: ``PATCH_TOKENS``, or fewer on a CPU.

    On a CPU a model of more than some 150 million parameters gets fewer, but at least a sixth.
    """
    if not on_cpu:
        return PATCH_TOKENS
    affordable = int(CPU_WORK / parameters)
    return min(PATCH_TOKENS, max(CPU_TOKENS, affordable))
