"""The front matter of a card as the hub reads it: what a model is of, and what was measured of it.

What was measured stands in its ``model-index``, which huggingface_hub reads and writes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import OutputError, raise_output_error, why
from ..progress import hushed
from ..storage import write_file
from ..texts.sources import HUB_DATASET
from ..values.counts import counted, with_error
from .exports import to_yaml
from .source import FRONT_MATTER, place_name

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

    from ..values.loss import Loss
    from ..values.perplexity import Perplexity
    from ..values.task_scores import TaskScores

LAYERS_TAG, EXPERTS_TAG = "layer-pruning", "expert-pruning"

_CARRIED_KEYS = ("license", "license_name", "license_link", "language")
_LOSS = "loss"


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

    Without a ``base``, the source's own is the nearest ancestor that the hub knows; ``relation`` is
    a word of the hub's, which has none for a model with fewer layers.
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

    ``texts`` names the texts as ``--texts`` does, by a place of this machine too; empty where they
    have no name.
    """
    of = {**_dataset(texts), "task_name": "next-token prediction"}
    count = counted(loss.num_texts, "text")
    found = [_result(of, _LOSS, loss.nats, stderr=loss.stderr, what=f"nats a token, {count}")]
    if loss.by_byte is not None:
        bits, stderr = loss.by_byte.mean, loss.by_byte.stderr
        found.append(
            _result(of, "bits_per_byte", bits, stderr=stderr, what=f"bits a byte, {count}")
        )
    if before is not None and before.by_text is not None and loss.by_text is not None:
        more, what = loss.minus(before), "nats a token above the whole model, paired by text"
        found.append(_result(of, "loss_increase", more.mean, stderr=more.stderr, what=what))
    return found


def measured_results(
    values: "Mapping[str, Mapping[str, Any]]", names: Mapping[str, str]
) -> "list[EvalResult]":
    """What was measured of a model as the hub's results; it has no words for speech.

    ``values`` are by kind of measure, and by side: the model is ``model`` or ``base``, and the
    whole one that it is compared with ``against``. ``names`` are of the texts, by kind.
    """
    found = []
    for kind, sides in values.items():
        value, texts = sides.get("model", sides.get("base")), names.get(kind, "")
        if kind == "loss":
            found += loss_results(value, sides.get("against"), texts)
        elif kind == "perplexity":
            found.append(_perplexity_result(value, texts))
        elif kind == "tasks":
            found += map(_task_result, value)
    return found


def _perplexity_result(found: "Perplexity", text: str) -> "EvalResult":
    windows = counted(len(found.by_window), "window")
    what = f"perplexity, {windows} of {counted(found.context, 'token')}"
    return _result(_dataset(text), "perplexity", found.value, stderr=found.stderr, what=what)


def _task_result(found: "TaskScores") -> "EvalResult":
    of = {"dataset_type": found.task, "dataset_name": found.task}
    shots = counted(found.num_shots, "solved example")
    what = f"{found.metric} of {counted(len(found.items), 'item')}, {shots}"
    return _result(of, found.metric, found.mean, stderr=found.stderr, what=what)


def with_results(card: str, results: "Sequence[EvalResult]", *, name: str = "model") -> str:
    """A card with results; those that it has of the same measure on the same texts go.

    The model is named by the title, or else ``name``. Raises ValueError where its front matter
    cannot be read.
    """
    read = _read(card)
    data: Any = read.data
    old: Sequence[EvalResult] = data.eval_results or ()
    new = {(one.unique_identifier, one.metric_type) for one in results}
    left = [one for one in old if (one.unique_identifier, one.metric_type) not in new]
    title = re.search(r"^# (.*)$", card, re.MULTILINE)
    data.model_name = data.model_name or (title[1] if title else name)
    data.eval_results = [*left, *results]
    return str(read)


def check_results(card: Path) -> None:
    """Refuse a card that no results can be written into: OutputError."""
    if not card.is_file():
        raise OutputError(
            f"there is no card {card}: results are put on that of a local folder or GGUF file; "
            f"write one first, or leave --card out"
        )
    with raise_output_error(card):
        _with(card, ())


def state_results(card: Path, results: "Sequence[EvalResult]") -> None:
    """Write results into the front matter of a card, in place of those of the same measure.

    OutputError where it cannot be read or written.
    """
    with raise_output_error(card):
        write_file(card, _with(card, results).encode())


def _with(card: Path, results: "Sequence[EvalResult]") -> str:
    """The text of a card with results."""
    text = card.read_text(encoding="utf-8")
    return with_results(text, results, name=card.resolve().parent.name)


def without_results(card: str) -> str:
    """A card without its results, where they are of a model that was changed since.

    One that cannot be read stays as it is: the hub shows no results of it.
    """
    if "model-index:" not in card:
        return card
    try:
        read = _read(card)
    except ValueError:
        return card
    data: Any = read.data
    return str(_stripped(read)) if data.eval_results else card


def words_of(card: str) -> list[str]:
    """All that a card says but its results: its front matter and its text."""
    try:
        read = _stripped(_read(card))
    except ValueError:
        return [card]
    return [read.data.to_yaml(), read.text]


def _stripped(read: "ModelCard") -> "ModelCard":
    """Take the results out of a card."""
    data: Any = read.data
    data.eval_results = data.model_name = None
    return read


def _read(card: str) -> "ModelCard":
    """A card as huggingface_hub has it; ValueError where its front matter cannot be read."""
    from huggingface_hub import ModelCard

    front = FRONT_MATTER.match(card)
    if front and "<<" in front[0]:
        raise ValueError("its front matter merges keys (<<): write them out")
    try:
        with hushed():
            return ModelCard(card)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"its front matter is no YAML: {why(error)}") from error


def _dataset(texts: str) -> dict[str, str | None]:
    """What the hub calls the dataset of a result, by the name of the texts."""
    name, *parts = texts.split(":") if HUB_DATASET.fullmatch(texts) else [place_name(texts)]
    return {
        "dataset_type": name or "held-out",
        "dataset_name": name or "held-out texts",
        "dataset_config": parts[0] if len(parts) > 1 else None,
        "dataset_split": parts[-1] if parts else None,
    }


def _result(
    of: Mapping[str, Any], metric: str, value: float, *, stderr: float, what: str
) -> "EvalResult":
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        metric_type=metric,
        metric_value=round(value, 6),
        metric_name=f"{with_error(value, stderr, 3)} {what}",
        metric_args={"stderr": round(stderr, 6)} if math.isfinite(stderr) else None,
        **of,
    )
