"""The whole way: scan, measure every size, save the largest cut."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cutting.memory import without_layers
from ..cutting.saving import save_model, verify_checkpoint
from ..evaluation.loss import require_predictable
from ..judgement.compare import compare_cuts
from ..models.architecture import find_layers, input_device
from ..scanning.model import scan
from ..scanning.scan import Scan
from ..storage import check_free, write_file
from ..values.files import CHECKPOINT_FOLDER, PARTIAL_FILE, PLAN_FILE, RESULTS_FILE, SCAN_FILE
from ..values.layers import check_sizes
from ..values.loss import Comparison
from ..values.plan import Plan


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
            "dtype": self.scan.model and self.scan.model.dtype,
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
        model, tokenizer, texts, max_length=max_length, batch_size=batch_size,
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
        save_model(
            model,
            tokenizer,
            out / CHECKPOINT_FOLDER,
            plan=plan,
            overwrite=overwrite,
            losses=losses,
        )
        after = continue_text(model, tokenizer, prompt)
    difference = verify_checkpoint(
        model,
        tokenizer,
        out / CHECKPOINT_FOLDER,
        layers=plan.blocks,
        text=max(eval_texts, key=len),
    )
    done = Run(scanned, comparison, plan, difference, before, after, out)
    write_file(out / RESULTS_FILE, (json.dumps(done.to_json(), indent=2) + "\n").encode())
    partial.unlink(missing_ok=True)
    return done
