"""Plans verified on one model: proposals of several criteria, raced by a judge."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CriterionError, LayersError, OutputError, PlanError, TextsError
from ..models.source import ModelSource
from ..processes import refuse_several
from ..texts.options import options_fingerprint
from ..values.layers import check_sizes, layer_number
from ..values.plan import Plan
from ..values.tokens import BatchSize, Tokens
from ..values.verification import AFTER, Verified
from .cache import Cache, open_cache
from .contestants import InMemory, ModelStore, digest, inputs_of_one, one_contestant

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..judgement.splits import Splits

MAX_TEXTS = 128
"""Calibration texts by default: 32 that fit, and 96 that choose."""

JUDGES = ("loss", "kl")


@dataclass(frozen=True, kw_only=True)
class VerificationJob:
    """A verification, which is checked when it is made; :func:`verify` says what it does.

    Attributes:
        model: the model, in memory or where it is.
        texts: as for :func:`verify`; so are all others that have its names.
        sizes: how many layers are to go.
        top: the best so many blocks of each criterion are proposals.
        after: ``none`` or ``patch``.
        max_blocks: blocks at most.
        judge: what chooses.
        tokens: length of texts, and how many make one forward.
        max_texts: texts that are read.
        seed: of the order of the texts that choose.
        more: further proposals by size; where they know their model, it must be this one.
        spill: a folder for states that cuts share.
        cache: of what was measured before.
        progress: bars with ETA on standard error.

    Raises:
        LayersError, PlanError, CriterionError, TextsError, OutputError, ProcessesError: as
            :func:`verify`.
    """

    model: ModelSource | InMemory
    texts: Iterable[str]
    sizes: Sequence[int]
    top: int = 4
    after: str = "patch"
    max_blocks: int | None = None
    judge: str = "loss"
    tokens: Tokens = field(default_factory=Tokens)
    max_texts: int = MAX_TEXTS
    seed: int = 0
    more: Mapping[int, Sequence[Plan]] = field(default_factory=dict)
    spill: Path | None = None
    cache: Cache = field(default_factory=lambda: Cache(None))
    progress: bool | None = None

    def __post_init__(self) -> None:
        refuse_several("verifications are")
        object.__setattr__(self, "sizes", sorted({layer_number(size) for size in self.sizes}))
        if not self.sizes or self.sizes[0] < 1:
            raise LayersError("expected sizes of at least 1 layer (n, --n)")
        named = {"top, --verify": self.top, "max_blocks, --blocks": self.max_blocks}
        for name, value in named.items():
            if value is not None and layer_number(value) < 1:
                raise LayersError(f"{value}: expected at least 1 ({name})")
        if self.after not in AFTER:
            raise PlanError(
                f"unknown time {self.after!r} to judge at: expected {' or '.join(AFTER)} "
                f"(after, --after)"
            )
        if self.judge not in JUDGES:
            raise CriterionError(
                f"unknown judge {self.judge!r}: expected {' or '.join(JUDGES)} (judge)"
            )
        if self.spill is not None and not self.spill.is_dir():
            raise OutputError(f"there is no folder {self.spill} for states (spill)")
        _ = self.splits

    @cached_property
    def splits(self) -> "Splits":
        """The texts that fit and those that choose."""
        from ..judgement.splits import fit_and_choose

        if self.max_texts < 1:
            raise TextsError(f"the number of texts must be at least 1, got {self.max_texts}")
        if isinstance(self.texts, str | bytes) or not isinstance(self.texts, Iterable):
            raise TextsError("texts must be an iterable of strings")
        texts = islice(self.texts, self.max_texts)
        return fit_and_choose(texts, seed=self.seed)

    def run(self) -> dict[int, Verified]:
        """Verify, or give what the cache has.

        Returns:
            By size what came of it.

        Raises:
            ModelError, LayersError, PatchError, TextsError, CacheError: as :func:`verify`.
        """
        from ..judgement.verifying import verifier_of
        from ..models.decoder import Decoder

        store = ModelStore(self.cache, inputs_of_one(self.model, self.cache), [])
        loaded, tokenizer = self.model.load()
        decoder = Decoder.of(loaded)
        check_sizes(self.sizes, len(decoder))
        for plan in (plan for plans in self.more.values() for plan in plans):
            plan.check_model(decoder.identity)
        verifier = verifier_of(
            decoder, tokenizer, self.splits, store=store, texts=self._identity,
            tokens=self.tokens, top=self.top, after=self.after, max_blocks=self.max_blocks,
            judge=self.judge, seed=self.seed, spill=self.spill, progress=self.progress,
        )  # fmt: skip
        return {n: verifier.verify(n, more=self.more.get(n, ())) for n in self.sizes}

    @property
    def _identity(self) -> str:
        """What tells the texts from others, as for a comparison."""
        splits = self.splits
        return digest(splits.fit, splits.choose, asdict(self.tokens), options_fingerprint([]))


def verify(
    model: "PreTrainedModel | ModelSource | str | Path",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    texts: Iterable[str] = (),
    *,
    n: int | Sequence[int],
    top: int = 4,
    after: str = "patch",
    max_blocks: int | None = None,
    judge: str = "loss",
    max_length: int = 256,
    batch_size: BatchSize = "auto",
    max_texts: int = MAX_TEXTS,
    seed: int = 0,
    spill: str | Path | None = None,
    cache: bool = True,
    progress: bool | None = None,
) -> dict[int, Verified]:
    """Find the best plans of some sizes, by a race of what several criteria propose.

    Proposed are the best blocks, and sets of layers, by criteria that need no loss, and all
    contiguous blocks. The judge looks at them on a few texts, looks for neighbours of the best
    that are better still, and races what is left on more and more texts, as they are cut or after
    a quick patch (the last matrix of the feed-forward before each block, solved anew). It takes
    at most a quarter of the work of an exhaustive search of contiguous blocks, about: two
    candidates are judged on all texts in any case.

    Of the candidates whose loss after a patch is within one paired standard error of the least,
    the one wins that loses least as it is cut, on the first of the texts that choose: so the plan
    is good both ways.

    What was measured is kept in the cache, also of a verification that was cut short.

    Args:
        model: a causal language model of transformers; or the source or the place that it is
            loaded from.
        tokenizer: the tokenizer of a model in memory.
        texts: calibration texts. Up to 32 of them, and no more than half, fit patches, and
            criteria look at them; the others choose.
        n: how many layers are to go; or several such numbers.
        top: the best so many blocks of each criterion are proposals.
        after: when the judge looks: ``none``, at proposals as they are cut; ``patch``, after a
            quick patch.
        max_blocks: blocks of a plan at most; no limit by default.
        judge: what chooses: ``loss``, the next-token loss; ``kl``, the divergence from the whole
            model's next-token distributions.
        max_length: tokens of a text at most.
        batch_size: texts in one forward; ``auto`` is as many as the device has memory for, on a
            CPU 8 at most.
        max_texts: read the first so many texts only.
        seed: of the order of the texts that choose.
        spill: a folder on a disk with room, for the states that cuts share; by default they lie
            in memory, as many as a quarter of it takes.
        cache: keep what is measured, and use what was measured before.
        progress: bars with ETA on standard error; by default if that is a terminal.

    Returns:
        For each size the winner with its margin, and those that cannot be told from it.

    Raises:
        LayersError: a size that the model cannot lose; a number is less than 1.
        PlanError: ``after`` is unknown.
        CriterionError: the judge is unknown.
        TextsError: too few texts to fit and to choose, or broken ones.
        PatchError: no proposal can be patched.
        ModelError: the model cannot be loaded or run.
        OutputError: there is no folder ``spill``, or it cannot be written to.
        CacheError: what the cache holds is damaged.
        ProcessesError: this is one of several processes, as torchrun starts them.

    Example:
        >>> found = sh.verify(model, tokenizer, texts, n=2, after="none", max_texts=24)
        >>> len(found[2].plan.dropped), found[2].num_items
        (2, 12)
    """
    job = VerificationJob(
        model=one_contestant(model, tokenizer), texts=texts,
        sizes=[n] if isinstance(n, int) else n, top=top, after=after, max_blocks=max_blocks,
        judge=judge, tokens=Tokens(max_length, batch_size),
        max_texts=max_texts, seed=seed, spill=None if spill is None else Path(spill),
        cache=open_cache(not cache), progress=progress,
    )  # fmt: skip
    return job.run()
