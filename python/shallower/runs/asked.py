"""Asked: what a run is to do, with the texts that it does it on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..texts.splits import Splits
from ..values.target import Target
from ..values.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a run is asked for.

    Attributes:
        target: how shallow the model is to become.
        splits: texts that fit, choose and report.
        out: the folder of the run.
        top: proposals of every criterion.
        blocks: blocks at most; None for any number.
        tokens: length of texts, and how many make one forward.
        threads: threads of the Rust core, all by default.
        prompts: texts to continue.
        seed: of whatever is drawn.
        identities: what tells the texts that fit and choose, and those that report, from others.
        job: what tells this run from others; None where that is not known.
        command: the words on the command line that asked, without places; empty if none did.
        progress: bars with ETA on standard error.
    """

    target: Target
    splits: Splits
    out: Path
    top: int
    blocks: int | None
    tokens: Tokens
    threads: int | None
    prompts: Sequence[str]
    seed: int
    identities: tuple[str, str]
    job: str | None
    command: str
    progress: bool | None
