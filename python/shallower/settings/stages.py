"""Settings of ``scan``, ``patch`` and ``eval``: their options and defaults, checked when made."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import PatchError, PositionsError, SettingsError
from ..values.layers import layer_number, parse_sizes
from ..values.positions import Positions
from ..values.tokens import SPEECH_TOKENS, BatchSize
from . import options as option
from .options import THREADS, Settings, parse_names
from .recipe import SHARE, check_share
from .until import DEFAULT_TOLERANCE, Until


@dataclass(frozen=True, kw_only=True)
class ScanSettings(Settings):
    """Settings of :func:`shallower.scan`.

    No text's values depend on ``batch_size`` but for rounding. Of positions, a text that has fewer
    tokens gives all of its own; they follow from the seed and the index of the text alone. The
    first token, which can be among ``random`` and ``all``, has massive activations in most models.
    A batch's states take (L+1) D values a token in memory. ``until`` may also be an :class:`Until`:
    the scan is then that of the texts so far, and keeps the values of single samples meanwhile.
    :attr:`Scan.settled` says which sizes were sure, and when.

    Raises:
        TextsError, PositionsError, SettingsError: a number that is out of range, no positions, or
            what says when a scan stops where nothing stops it.
    """

    metrics: Sequence[str] = option.measures(
        ("angular", "cosine"),
        "Metrics to measure, comma-separated: angular, cosine, relative_l2, norm_ratio.",
        "NAMES",
        read=parse_names,
    )
    positions: Positions = option.measures(
        Positions(),
        "Tokens of a text to compare: last, last:K, random:K or all. Errors are clustered by text.",
        "WHICH",
        read=str,
    )
    seed: int = option.measures(0, "Seed of --positions random:K.", "N", least=0)
    threads: int | None = option.memory(None, THREADS, "N", least=1)
    keep_samples: bool = option.measures(
        False,
        "Keep the distances of every sample for plan --bootstrap: 4 bytes times samples times "
        "pairs of layers, for each metric.",
    )
    experts: bool = option.measures(
        False,
        "Also gather statistics of a mixture's routed experts, over all tokens, for plan "
        "--experts; takes the time of the experts twice.",
    )
    until: float | Until | None = option.measures(
        None,
        "Stop as soon as the best blocks are, with probability P, such as 0.99, no worse than the "
        "best there are by more than --tolerance.",
        "P",
    )
    tolerance: float | None = option.measures(
        None, "Tolerance of --until; 0.005 by default.", "DISTANCE"
    )
    n: Sequence[int] | None = option.measures(
        None, "Block sizes that --until is of; by default 1,2,4,8.", "SIZES", read=parse_sizes
    )
    exact: bool = option.measures(
        False, "Bet instead of trusting --until's limit theorem; takes more texts."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.metrics, str):  # which is refused where names are checked
            object.__setattr__(self, "metrics", tuple(self.metrics))
        self._check_least("seed", 0, PositionsError)
        positions: Any = self.positions
        if isinstance(positions, str):
            positions = Positions.parse(positions, self.seed)
        elif self.seed and positions.kind == "random":  # changed since they were read
            positions = replace(positions, seed=self.seed)
        object.__setattr__(self, "positions", positions)
        if self.n is not None:
            sizes = self.n if isinstance(self.n, Iterable) else [self.n]
            object.__setattr__(self, "n", tuple(map(layer_number, sizes)))
        _ = self.stops

    @property
    def stops(self) -> Until | None:
        """When the scan stops before its texts end; None where it does not."""
        if isinstance(self.until, float | int):
            tolerance = DEFAULT_TOLERANCE if self.tolerance is None else self.tolerance
            return Until(self.until, tolerance, tuple(self.n or ()), self.exact)
        if self.exact or (self.tolerance, self.n) != (None, None):
            raise SettingsError(
                "--tolerance, --n and --exact say when a scan stops: add --until 0.99, say"
            )
        if not isinstance(self.until, Until | None):
            raise SettingsError(
                f"until = {self.until!r}: expected a probability, as 0.99 (--until)"
            )
        return self.until

    def to_json(self) -> dict[str, Any]:
        """Give all settings that a scan depends on, as plain JSON values."""
        return {
            "tokens": asdict(self.tokens),
            "metrics": list(self.metrics),
            "positions": asdict(self.positions),
            "keep_samples": self.keep_samples,
            "until": self.stops and asdict(self.stops),
            **({"experts": True} if self.experts else {}),
        }


@dataclass(frozen=True, kw_only=True)
class PatchSettings(Settings):
    """Settings of :func:`shallower.patch`.

    The states of the tokens that are fitted, with those of prompts, lie in temporary files: at most
    three times ``num_tokens`` times D values. Of texts and answers, where either are at their end,
    the others go on. Answers that ``max_length`` leaves no token of are left out, with a warning.

    Raises:
        TextsError, PatchError, RecipeError: a number that is out of range.
    """

    batch_size: BatchSize = option.memory(16, "Texts in one forward.", "N", least=1)
    num_tokens: int | None = option.repair(
        None, "Tokens to fit at most. By default 131,072; on a CPU 32,768.", "N", least=1
    )
    share: float = option.repair(0.5, SHARE, "X")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.share)
        if self.num_tokens is not None:
            self._check_least("num_tokens", 1, PatchError)


@dataclass(frozen=True, kw_only=True)
class TaskSettings(Settings):
    """How tasks are measured, by ``eval`` and by studies."""

    tasks_dir: str | Path | None = option.measures(
        None, "A folder of task files of lm-eval.", "FOLDER"
    )
    data: str | Path | None = option.measures(
        None, "Data of task files; $SHALLOWER_DATA by default.", "FOLDER"
    )
    max_items: int | None = option.measures(
        None, "Items of a task at most, drawn by --seed.", "N", least=1
    )
    num_shots: int | None = option.measures(None, "Solved examples before each item.", "N", least=0)
    pass_at: int | None = option.measures(
        None, "Also sample K answers where the answer is text: pass@K.", "K", least=1
    )


@dataclass(frozen=True, kw_only=True)
class EvalSettings(TaskSettings):
    """Settings of ``shallower eval``: by the option of each measure what it is of, and how."""

    texts: str | None = option.basic(
        None,
        "Held-out texts for the loss: a .jsonl, .txt or .parquet file, or a hub dataset.",
        "TEXTS",
    )
    perplexity: str | None = option.basic(
        None,
        "A text file for the perplexity in windows; of .jsonl and .parquet the documents, parted "
        "by a blank line.",
        "FILE",
    )
    tasks: str | None = option.basic(
        None,
        "Tasks of lm-eval, comma-separated: boolq, gsm8k, hellaswag, lambada, mmlu, any other.",
        "NAMES",
    )
    speech: str | None = option.basic(
        None,
        "How it speaks beside the whole model, on prompts: a .jsonl file with prompt or messages; "
        "without one 120 built-in prompts.",
        "[PROMPTS]",
    )
    speech_tokens: int = option.measures(
        SPEECH_TOKENS, "Tokens of an answer of --speech at most.", "N", least=1
    )
    context: int = option.measures(2048, "Tokens of a window of --perplexity.", "N", least=2)
    bos: bool = option.measures(False, "Begin each window with the beginning-of-text token.")
    seed: int = option.measures(0, "Seed of items, examples and samples.", "S", least=0)
    max_texts: int | None = option.measures(None, "Read the first N texts only.", "N", least=1)
