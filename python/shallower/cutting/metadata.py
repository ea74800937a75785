"""The front matter of a card as the hub reads it: what a model is of, and what was measured of it.

What was measured stands in its ``model-index``, which huggingface_hub reads and writes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import why
from ..texts.sources import HUB_DATASET
from ..values.counts import counted, with_error
from .exports import to_yaml
from .source import FRONT_MATTER, place_name

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from ..results.loss import Loss

LAYERS_TAG, EXPERTS_TAG = "layer-pruning", "expert-pruning"

_CARRIED_KEYS = ("license", "license_name", "license_link", "language")
_LOSS = "loss"
_INDEX = re.compile(r"^model-index:.*\n(?:(?:[ \t]+|- )\S.*\n|[ \t]*\n(?=[ \t-]))*", re.MULTILINE)


def front_matter(
    inherited: Mapping[str, Any],
    *,
    base: str | None,
    relation: str,
    library: str,
    pruned: Sequence[str] = (LAYERS_TAG,),
    tags: Sequence[str] = (),
) -> str:
    """The lines between the two ``---`` of a cut's card, as the hub reads them.

    Without a ``base``, the source's own is the nearest ancestor on the hub. ``relation`` is a word
    of the hub's, which has none for a model with fewer layers.
    """
    base_model = base or inherited.get("base_model")
    theirs = inherited.get("tags", [])
    theirs = [theirs] if isinstance(theirs, str) else theirs
    metadata = {
        "base_model": base_model,
        "base_model_relation": relation if base_model else None,
        "library_name": library,
        "pipeline_tag": inherited.get("pipeline_tag", "text-generation"),
        **{key: inherited.get(key) for key in _CARRIED_KEYS},
        "tags": list(dict.fromkeys([*theirs, "shallower", *pruned, *tags])),
    }
    return to_yaml({key: value for key, value in metadata.items() if value})


def loss_results(loss: "Loss", before: "Loss | None", texts: str) -> "list[EvalResult]":
    """The held-out loss of a model as the hub's results, and what it is above that ``before``.

    ``texts`` names the texts as ``--texts`` does, by a local path too; empty where they have no
    name.
    """
    of = {**dataset_of(texts), "task_name": "next-token prediction"}
    count = counted(loss.num_texts, "text")
    found = [one_result(of, _LOSS, loss.nats, stderr=loss.stderr, what=f"nats a token, {count}")]
    if loss.by_byte is not None:
        bits, stderr = loss.by_byte.mean, loss.by_byte.stderr
        found.append(
            one_result(of, "bits_per_byte", bits, stderr=stderr, what=f"bits a byte, {count}")
        )
    if before is not None and before.by_text is not None and loss.by_text is not None:
        more, what = loss.minus(before), "nats a token above the whole model, paired by text"
        found.append(one_result(of, "loss_increase", more.mean, stderr=more.stderr, what=what))
    return found


def with_results(card: str, results: "Sequence[EvalResult]", *, name: str = "model") -> str:
    """A card with results, which replace those of the same measure on the same texts.

    The model is named by the title, or else ``name``. Raises ValueError for unreadable front
    matter.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import (
        eval_results_to_model_index,
        model_index_to_eval_results,
    )

    before, front, after, index = _apart(card)
    title = re.search(r"^# (.*)$", after, re.MULTILINE)
    model, old = title[1].strip() if title else name, list[EvalResult]()
    try:
        if index:
            model, old = model_index_to_eval_results(index)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"its model-index cannot be read: {why(error)}") from error
    new = {(one.unique_identifier, one.metric_type) for one in results}
    left = [one for one in old if (one.unique_identifier, one.metric_type) not in new]
    if not (left or results):
        return f"{before}{front}{after}"
    index = eval_results_to_model_index(model, [*left, *results])
    block = yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)
    return f"{before}{front}{block}{after}"


def card_text(path: Path) -> str:
    """The text of a card with its own ends of lines; ValueError where it is no UTF-8."""
    return path.read_bytes().decode("utf-8-sig")


def without_results(card: str) -> str:
    """A card without its results; one whose front matter cannot be read stays as it is."""
    if "model-index:" not in card:
        return card
    try:
        before, front, after, _ = _apart(card)
    except ValueError:
        return card
    return f"{before}{front}{after}" if front.strip() else after.partition("\n")[2]


def _apart(card: str) -> tuple[str, str, str, list[Any]]:
    """A card as text before, front matter without results, text behind, and the results.

    ValueError where these cannot be read, are not in lines of their own, or are of several models.
    """
    found = FRONT_MATTER.match(card)
    if found is None:
        return "---\n", "", f"---\n{card}", []
    begin = card.index("\n", card.index("---")) + 1
    end = begin + len(found[1] or "")
    front = card[begin:end]
    if re.search(r"(^|[\s{,])<<\s*:", front):  # which may double with every line
        raise ValueError("its front matter merges keys (<<): write them out")
    rest = _INDEX.sub("", front, count=1)
    try:
        whole, left = (yaml.safe_load(part) or {} for part in (front, rest))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"its front matter is no YAML: {why(error)}") from error
    if not isinstance(whole, dict):
        raise ValueError("its front matter has no keys")
    index = whole.pop("model-index", None) or []
    if whole != left:
        raise ValueError("its model-index is not in lines of its own: write it as a block")
    if not isinstance(index, list) or len(index) > 1:
        raise ValueError("its model-index is not a list of one model")
    return card[:begin], rest, card[end:], index


def dataset_of(texts: str) -> dict[str, str | None]:
    """What the hub calls the dataset of a result, by the name of the texts."""
    name, *parts = texts.split(":") if HUB_DATASET.fullmatch(texts) else [place_name(texts)]
    return {
        "dataset_type": name or "held-out",
        "dataset_name": name or "held-out texts",
        "dataset_config": parts[0] if len(parts) > 1 else None,
        "dataset_split": parts[-1] if parts else None,
    }


def one_result(
    of: Mapping[str, Any], metric: str, value: float, *, stderr: float, what: str
) -> "EvalResult":
    """A measure of a dataset, as :func:`dataset_of` has it, as the hub has it."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        metric_type=metric,
        metric_value=round(value, 6),
        metric_name=f"{with_error(value, stderr, 3)} {what}",
        metric_args={"stderr": round(stderr, 6)} if math.isfinite(stderr) else None,
        **of,
    )
