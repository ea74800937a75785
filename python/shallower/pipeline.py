"""The stages joined: scan a model, measure cuts, and the whole way from a model to a
shallower one. The only room that knows them all.
"""

import json
import time
from collections.abc import Iterable, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .accumulation import ScanBuilder
from .artifacts import (
    CHECKPOINT_FOLDER,
    PARTIAL_FILE,
    PLAN_FILE,
    RESULTS_FILE,
    SCAN_FILE,
    Block,
    Comparison,
    Cut,
    Loss,
    Plan,
)
from .calibration import TokenBatches
from .errors import LayersError, ModelError, ScanError, TextsError
from .evaluation import evaluate_loss, require_predictable
from .hidden_states import stream
from .kept_states import StatesWriter, keep_states_in
from .models.architecture import find_layers, input_device
from .models.identity import identify, stored_dtype
from .models.loading import load_model, load_weights
from .positions import Positions
from .progress import track
from .pruning import save_model, without_layers
from .selection import check_size, deepest_block
from .similarity import Scan
from .storage import check_free, write_file

SECONDS_BETWEEN_CHECKPOINTS = 20.0


def scan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    max_length: int = 256,
    batch_size: int = 8,
    metrics: Sequence[str] = ("angular", "cosine"),
    threads: int | None = None,
    progress: bool | None = None,
    checkpoint: str | Path | None = None,
    total: int | None = None,
    keep_samples: bool = False,
    cka_batch: int | None = None,
    positions: str | Positions = "last",
    seed: int = 0,
    keep_states: str | Path | None = None,
    overwrite: bool = False,
) -> Scan:
    """Compare all L+1 states of a model, at one token of every text or more, in one pass.

    Args:
        model: a causal language model of transformers, quantised or not, on any device.
        tokenizer: its tokenizer.
        texts: any iterable of strings, read once, tokenised as the tokenizer does by default
            and truncated to ``max_length`` tokens.
        max_length: tokens of a text at most.
        batch_size: texts in one forward.
        metrics: of ``angular``, ``cosine``, ``relative_l2``, ``norm_ratio``.
        threads: threads of the Rust core, all by default.
        progress: a bar with ETA on standard error; by default if that is a terminal.
        checkpoint: a file that keeps the work so far, every 20 seconds; if it is there, the
            scan goes on from it. It stays when the scan is done: delete it.
        total: how many texts there are, for the ETA, where ``len(texts)`` does not tell.
        keep_samples: keep the values of single samples for :meth:`Scan.bootstrap`, 4 bytes
            times texts times L(L+1)/2 a metric, in memory and in the file.
        cka_batch: also find linear CKA, from minibatches of so many consecutive texts, 4 to
            1024; not with ``checkpoint``. See :attr:`Scan.cka`. Minibatches are of tokens, if
            several of a text are compared, which are not independent.
        positions: the tokens of every text that are compared: ``last`` that is no padding,
            ``last:K``, ``random:K`` different ones, or ``all``; all of a text that has fewer.
            Standard errors are clustered by text. The first token, which can be among
            ``random`` and ``all``, has massive activations in most models. A batch's states
            take (L+1) D values a token in memory.
        seed: of ``random:K``; a text's tokens follow from the seed and its index alone.
        keep_states: a ``.safetensors`` file to write the states to, in the model's dtype: L+1
            times D values a compared token. :func:`analyse_states` makes the same scan of it.
        overwrite: replace what is at ``keep_states``, once the new file is complete.

    Raises:
        PositionsError: there are no such positions.
        TextsError: no texts, or one that is no string.
        StatesError: no text could be compared. Single texts without a token, or whose
            states hold NaN, infinity or only zeros, are counted and named, with a warning.
        ModelError: the model has no list of decoder layers.
        ScanError: ``checkpoint`` is of another model, of other texts or positions, or does not go
            with ``cka_batch``, whose minibatches a file of sums cannot cut through.
        OutputError: something is at ``keep_states`` already, or it cannot be written to.
    """
    if checkpoint and cka_batch is not None:
        raise ScanError("a scan with cka_batch keeps no checkpoint: leave out one of them")
    if isinstance(positions, str):
        positions = Positions.parse(positions, seed)
    layers = find_layers(model)
    batches = TokenBatches(tokenizer, texts, max_length, batch_size)
    identity = identify(model)
    builder = ScanBuilder(
        len(layers) + 1, metrics, threads, identity, keep_samples, cka_batch, positions
    )
    if total is None and isinstance(texts, Sized):
        total = len(texts)
    saved = time.monotonic()
    with ExitStack() as stack:
        advance = stack.enter_context(track("scan", total, progress))
        kept = None
        if keep_states:
            kept = stack.enter_context(keep_states_in(keep_states, identity, positions, overwrite))
        if checkpoint and Path(checkpoint).exists():
            _resume(builder, batches, Path(checkpoint), kept)
            advance(batches.num_texts)
        for window in batches.windows():
            for batch, states, samples in stream(model, window, positions):
                sequences = None if positions.one_a_text else samples
                builder.add(states, samples, state_first=True, sequences=sequences)
                if kept:
                    kept.add(states, samples, state_first=True)
                advance(len(batch))
            builder.reject(*batches.take_rejections())
            if checkpoint and time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                _save(builder.so_far(batches.identity), batches, Path(checkpoint), kept)
                saved = time.monotonic()
        if batches.num_texts == 0:
            raise TextsError("there are no texts to scan")
        done = builder.finish((batches.identity,))
        if checkpoint:
            _save(done, batches, Path(checkpoint), kept)
        if kept:
            kept.finish(batches.identity, batches.num_rejected, batches.rejections)
    return done


def _save(
    scanned: Scan, batches: TokenBatches, checkpoint: Path, kept: StatesWriter | None
) -> None:
    """Save the work so far; the states first, so that a scan never knows more than they."""
    if kept:
        kept.mark(batches.identity)
    scanned.save(checkpoint)


def _resume(
    builder: ScanBuilder, batches: TokenBatches, checkpoint: Path, kept: StatesWriter | None
) -> None:
    before = Scan.load(checkpoint)
    try:
        builder.resume(before, batches.skip(sum(texts.num_texts for texts in before.texts)))
        if kept:
            kept.resume(batches.identity)
        batches.take_rejections()  # the scan before has them
    except ScanError as error:
        raise ScanError(
            f"cannot go on from {checkpoint}: {error}; delete it to start anew"
        ) from error


def check_sizes(sizes: Sequence[int], num_layers: int) -> None:
    """Refuse block sizes that the model cannot lose, before any long work.

    Raises:
        LayersError: a size is not in ``1 .. num_layers-1``.
    """
    if not sizes:
        raise LayersError("no block size is named: name at least one")
    for n in sizes:
        check_size(num_layers, n)


def compare_cuts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scanned: Scan,
    texts: Iterable[str],
    sizes: Sequence[int],
    max_length: int = 256,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Comparison:
    """Measure the loss of the best block and of the deepest one, for every size.

    ``texts`` should be held out; they are read once. The model is as before afterwards.

    Raises:
        LayersError: a size that the model cannot lose, or a scan of another number of layers.
        TextsError: as :func:`evaluate_loss`.
    """
    num_layers = len(find_layers(model))
    if scanned.num_layers != num_layers:
        raise LayersError(f"the scan is of {scanned.num_layers} layers, the model has {num_layers}")
    check_sizes(sizes, scanned.num_layers)
    texts = list(texts)
    options: dict[str, Any] = {
        "max_length": max_length,
        "batch_size": batch_size,
        "progress": progress,
    }
    base = evaluate_loss(model, tokenizer, texts, description="loss, all layers", **options)
    losses: dict[Block, Loss] = {}
    cuts = []
    for n in sizes:
        best, deepest = (
            scanned.best_block(n),
            scanned.scored(deepest_block(num_layers, n)),
        )
        for strategy, block in (("similarity", best), ("deepest", deepest)):
            if block not in losses:
                with without_layers(model, [block]):
                    losses[block] = evaluate_loss(
                        model, tokenizer, texts, description=f"loss without {block}", **options
                    )
            cuts.append(Cut(strategy, block, losses[block]))
    return Comparison(base, tuple(cuts))


def logits_difference(
    model: PreTrainedModel, path: str | Path, layers: Sequence[Block], input_ids: torch.Tensor
) -> float:
    """How far the saved checkpoint is from the model with its layers skipped.

    Loads ``path``, a folder or a GGUF file, with stock transformers and gives the greatest
    absolute difference of the logits on ``input_ids`` (B, T). ``model`` is the uncut one;
    nothing is changed.

    Raises:
        ModelError: the checkpoint cannot be loaded, or lacks weights.
    """
    reloaded: Any
    if Path(path).suffix == ".gguf":
        dtype: Any = stored_dtype(model)
        reloaded, _ = load_model(path, dtype)
    else:
        reloaded = load_weights(str(path), model.dtype)
    device = input_device(find_layers(model))
    reloaded.to(device)
    with torch.inference_mode():
        with without_layers(model, layers):
            expected = model(input_ids=input_ids.to(device), use_cache=False).logits
        got = reloaded(input_ids=input_ids.to(device), use_cache=False).logits
    return float((got.float() - expected.float()).abs().max())


def verify_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    layers: Sequence[Block],
    text: str,
) -> float:
    """Check a saved cut by :func:`logits_difference` on one text; gives the difference.

    Raises:
        ModelError: it exceeds 1e-5 in float32, or 0.1 in the other dtypes.
    """
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :128]
    difference = logits_difference(model, path, layers, input_ids)
    tolerance = 1e-5 if model.dtype == torch.float32 else 0.1
    if not difference <= tolerance:
        raise ModelError(
            f"the checkpoint {path} is not the model with its layers skipped: its logits are off "
            f"by {difference:.2g}, more than {tolerance:.0e}"
        )
    return difference


def continue_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, num_tokens: int = 24
) -> str:
    """The greedy continuation of a prompt."""
    encoded = tokenizer(prompt, return_tensors="pt").to(input_device(find_layers(model)))
    generate: Any = model.generate
    with torch.inference_mode():
        output = generate(**encoded, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


@dataclass(frozen=True, slots=True)
class Run:
    """What a run found and where it left it."""

    scan: Scan
    comparison: Comparison
    plan: Plan
    difference: float
    before: str
    after: str
    out: Path

    def to_json(self) -> dict[str, Any]:
        """The run as plain JSON values."""
        return {
            "format": "shallower.run",
            "version": 1,
            "num_layers": self.scan.num_layers,
            "num_samples": self.scan.num_samples,
            "num_rejected": self.scan.num_rejected,
            **self.comparison.to_json(),
            "plan": self.plan.to_json(),
            "max_logits_difference": self.difference,
            "continuation": {"before": self.before, "after": self.after},
        }


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    eval_texts: Iterable[str],
    out: str | Path,
    sizes: Sequence[int] = (1, 2, 4, 8),
    max_length: int = 256,
    batch_size: int = 8,
    threads: int | None = None,
    prompt: str = "The most important thing about a good plan is",
    overwrite: bool = False,
    progress: bool | None = None,
    total: int | None = None,
) -> Run:
    """From a model to a shallower one: scan, measure every size, save the largest cut.

    Leaves in ``out``: ``scan.safetensors``, ``shallower_plan.json``, ``results.json`` and
    ``checkpoint/``, which is reloaded with stock transformers and compared. An interrupted
    scan goes on where it was. The model is as before afterwards.

    Raises:
        OutputError, LayersError, TextsError, StatesError, ModelError: as the stages do.
    """
    out = Path(out)
    check_sizes(sizes, len(find_layers(model)))
    for name in (RESULTS_FILE, CHECKPOINT_FOLDER):
        check_free(out / name, overwrite)
    eval_texts = list(eval_texts)
    require_predictable(tokenizer, eval_texts, max_length)
    partial = out / PARTIAL_FILE
    if overwrite:
        partial.unlink(missing_ok=True)
    scanned = scan(
        model, tokenizer, texts, max_length, batch_size,
        threads=threads, progress=progress, checkpoint=partial, total=total,
    )  # fmt: skip
    scanned.save(out / SCAN_FILE)
    comparison = compare_cuts(
        model, tokenizer, scanned, eval_texts, sizes, max_length, batch_size, progress
    )
    plan = scanned.plan(max(sizes))
    plan.save(out / PLAN_FILE)
    cut = next(cut for cut in comparison.cuts if cut.block == plan.blocks[0])
    losses = comparison.base, cut.loss
    before = continue_text(model, tokenizer, prompt)
    with without_layers(model, plan.blocks):
        save_model(model, tokenizer, out / CHECKPOINT_FOLDER, plan, overwrite, losses)
        after = continue_text(model, tokenizer, prompt)
    difference = verify_checkpoint(
        model, tokenizer, out / CHECKPOINT_FOLDER, plan.blocks, max(eval_texts, key=len)
    )
    done = Run(scanned, comparison, plan, difference, before, after, out)
    write_file(out / RESULTS_FILE, (json.dumps(done.to_json(), indent=2) + "\n").encode())
    partial.unlink(missing_ok=True)
    return done
