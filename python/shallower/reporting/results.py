"""Results of a run, as they are written into its folder before each next step."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cutting.metadata import card_text, with_results
from ..errors import OutputError, ShallowerError, raise_output_error, why
from ..results.healing import Healing
from ..results.loss import Loss
from ..results.recommendation import Recommended
from ..results.speech import Speech
from ..settings.target import Target
from ..storage import claimed, holds, rewrite, sha256_of, write_file
from ..values.files import (
    CHECKPOINT_FOLDER,
    CHECKPOINT_GGUF,
    EVAL_FILE,
    HEALED_FOLDER,
    RESULTS_FILE,
    SCAN_FILE,
)
from ..values.layers import layer_count
from ..values.plan import Plan
from ..values.schema import of_type
from .stories.evaluation import Values, evaluation_record
from .story import PromptSample
from .words import compared, costs, domain_learned

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from ..scanning.scan import Scan


COLLAPSE = 4.0
"""Paired errors from which on the choice by distance is said to fail beside the verified one."""


@dataclass(frozen=True, slots=True)
class Run:
    """The results of a run, and where they are."""

    out: Path  # the folder
    target: Target
    scan: "Scan"
    whole: Loss  # loss on the test set
    splits: dict[str, int]  # numbers of calibration, selection and test texts
    recommended: Recommended | None = None  # the cut; None until it is known
    continuations: tuple[PromptSample, ...] = ()  # of the first prompts, greedily
    # By `whole`, `cut`, `patched` and `healed`.
    speech: Mapping[str, Speech] = field(default_factory=dict)
    difference: float = math.nan  # of logits, the reloaded checkpoint to the model, at most
    healing: Healing | None = None
    command: str = ""  # the command line to make it again, without places
    loaded: str = "MODEL"  # the model's words in a command line
    evaluated: str = ""  # options of `shallower eval` for the test set
    # Name of the model's folder or file, bytes of its weights.
    source: tuple[str, int] | None = None
    # Of this run and its weights; whether it has ended.
    marks: dict[str, str | None] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path | None:
        """The folder or GGUF file of the recommended model, if its plan is known and it is made."""
        if self.recommended is None or "plan_only" in self.marks:
            return None
        cut = CHECKPOINT_GGUF if "gguf" in self.marks else CHECKPOINT_FOLDER
        return self.out / (HEALED_FOLDER if self.recommended.healed else cut)

    @property
    def reached(self) -> str:
        """How far a run came that was cut short, in words."""
        if self.healing is not None:
            return "the healed model is saved"
        reached = "the layers are compared"
        if self.recommended is not None:
            reached = "the layers are chosen"
        if "checkpoint" in self.marks:
            reached = "the recommended cut is saved"
        return reached

    @property
    def warnings(self) -> list[str]:
        """What a user should know before trusting the result; nothing mostly."""
        best = self.recommended
        if best is None:
            return []
        found = [why for why in (best.unpatched, best.unhealed) if why]
        most, lost, worse = best.max_loss, best.difference, best.by_distance
        if most is not None and lost.mean > most:
            found.append(
                f"the {best.state} model loses {lost} nats a token on the test set, more "
                f"than the {most:g} that it was chosen for on others (max_loss, --max-loss)"
            )
        shares = best.shares
        if best.state in self.speech:
            cut, now, whole = (
                self.speech[one].of("divergence") for one in ("cut", best.state, "whole")
            )
            shares["the whole model's own words, by divergence"] = now.recovered(cut, whole)
        found += domain_learned(shares)
        if worse and worse.stderr > 0 and worse.mean > COLLAPSE * worse.stderr:
            found.append(
                f"distance misleads here: the loss of its block of "
                f"{layer_count(len(best.plan.dropped))} is {compared(worse)} than that of the "
                f"verified plan, before a patch"
            )
        return found

    @property
    def is_unhealed(self) -> bool:
        """Whether the training was tried before, to its end, and made the model no better."""
        best = self.recommended
        return "ended" in self.marks and best is not None and best.unhealed is not None

    def to_json(self) -> dict[str, Any]:
        """Give the content of ``results.json``; ``checkpoint`` is a path below the run's folder."""
        place, best = self.checkpoint, self.recommended
        return {
            "format": "shallower.run",
            "version": 2,
            "recommended": best
            and {**best.to_json(), "cost": costs(best.measured), "warnings": self.warnings},
            "checkpoint": place and place.relative_to(self.out).as_posix(),
            "wish": self.target.to_json(),
            "whole": self.whole.to_record(),
            "splits": self.splits,
            "num_layers": self.scan.num_layers,
            "num_samples": self.scan.num_samples,
            "num_rejected": self.scan.num_rejected,
            "dtype": self.scan.model and self.scan.model.dtype,
            "continuations": [one.to_json() for one in self.continuations],
            "speech": {name: one.to_record() for name, one in self.speech.items()},
            "max_logits_difference": None if math.isnan(self.difference) else self.difference,
            "healing": self.healing and self.healing.to_json(),
            "command": self.command,
            "loaded": self.loaded,
            "evaluated": self.evaluated,
            "source": self.source and list(self.source),
            "marks": self.marks,
        }

    @classmethod
    def load(cls, out: str | Path) -> "Run":
        """Read a run from its folder, as far as it has come."""
        from ..scanning.scan import Scan

        out = Path(out)
        try:
            values = of_type(dict, json.loads((out / RESULTS_FILE).read_bytes()))
            done, difference = values["recommended"], values["max_logits_difference"]
            source, speech = values["source"], of_type(dict, values["speech"])
            results = cls(
                out,
                Target(**values["wish"]),
                Scan.load(out / SCAN_FILE),
                Loss.from_json(values["whole"]),
                dict(values["splits"]),
                None if done is None else Recommended.from_json(done),
                tuple(map(PromptSample.from_json, values["continuations"])),
                {name: Speech.from_json(one) for name, one in speech.items()},
                math.nan if difference is None else of_type(float, difference),
                command=of_type(str, values["command"]),
                loaded=of_type(str, values["loaded"]),
                evaluated=of_type(str, values["evaluated"]),
                source=source and (of_type(str, source[0]), of_type(int, source[1])),
                marks=dict(values["marks"]),
            )
            healed = values["healing"] is not None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, ShallowerError) as error:
            place = out / RESULTS_FILE
            message = f"{place} is not of a run, or is damaged: {why(error, place)}"
            raise OutputError(message) from error
        return replace(results, healing=Healing.load(out / HEALED_FOLDER)) if healed else results

    def save(self) -> None:
        """Write ``results.json`` into the folder of the run."""
        content = json.dumps(self.to_json(), indent=2) + "\n"
        write_file(self.out / RESULTS_FILE, content.encode())


def write_evaluation(
    out: Path, values: Values, dtype: str, *, plan: Plan | None, overwrite: bool = True
) -> None:
    """Write what ``eval --json`` prints, unless that is there; OutputError if something else is."""
    record = evaluation_record(values, dtype, plan)
    place, content = out / EVAL_FILE, (json.dumps(record, indent=2) + "\n").encode()
    if not holds(place, content):
        with claimed(place, overwrite):
            write_file(place, content)


def weights_mark(folder: Path) -> str:
    """Hash all bytes of a checkpoint's weights, SHA-256 in hex; of nothing without a folder."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")]):
        digest.update(bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


def check_results(card: Path) -> None:
    """Refuse a card that no results can be written into: OutputError."""
    if not card.is_file():
        raise OutputError(
            f"there is no card {card}: results are put on that of a local folder or GGUF file; "
            f"write one first, or leave --card out"
        )
    with raise_output_error(card):
        with_results(card_text(card), ())


def state_results(card: Path, results: "Sequence[EvalResult]") -> None:
    """Write results into the front matter of a card, in place of those of the same measure."""
    with raise_output_error(card):
        name = card.resolve().parent.name
        rewrite(card, with_results(card_text(card), results, name=name).encode())
