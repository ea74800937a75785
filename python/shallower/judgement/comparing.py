"""The comparison of criteria on one model that is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..evaluation.loss import fitting_tokens
from ..healing.quick_patch import QuickPatch
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..progress import track
from ..texts.batches import TokenBatches
from ..texts.options import OptionItem
from ..values.comparison import ComparedModel, Row
from ..values.layers import check_sizes
from ..values.tokens import Tokens
from .contest import Contest, with_regret
from .criterion import Criterion
from .half_blocks import half_blocks
from .judges.judge import Judge, judged_batches
from .judges.kl import KLJudge
from .judges.loss import LossJudge
from .judges.options import OptionsJudge
from .referee import Referee, Store
from .splits import Splits
from .subject import Subject
from .trials import Trials
from .work import Meter


@dataclass(frozen=True)
class Terms:
    """What is compared, on which texts.

    Attributes:
        criteria: those that take part.
        sizes: how many layers go, ascending.
        texts: the three sets of texts by the name of the calibration texts; all report the same.
        identities: by the same names what tells these texts from others, for the store; that of
            the texts that report under an empty name.
        judge: name of the judge that chooses.
        choosing: items of a task that choose, of the judge ``options``.
        reporting: those that report.
        tokens: length of texts, and how many make one forward.
        seed: of whatever is drawn.
        spill: a folder for the states that trials share, which are in memory by default.
        halves: whether single attentions and feed-forwards are judged too.
        progress: bars with ETA on standard error; by default if that is a terminal.
    """

    criteria: Sequence[Criterion]
    sizes: Sequence[int]
    texts: Mapping[str, Splits]
    identities: Mapping[str, str]
    judge: str = "loss"
    choosing: Sequence[OptionItem] = ()
    reporting: Sequence[OptionItem] = ()
    tokens: Tokens = field(default_factory=Tokens)
    seed: int = 0
    spill: Path | None = None
    halves: bool = False
    progress: bool | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a comparison found on one model.

    Attributes:
        model: the whole model.
        rows: every choice.
        skipped: by criterion, and calibration text where there are several, why it could not
            choose.
        half_blocks: single attentions and feed-forwards, if asked for.
    """

    model: ComparedModel
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]
    half_blocks: tuple[Mapping[str, Any], ...]


def compare_on(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    terms: Terms,
    *,
    name: str,
    store: Store,
) -> Outcome:
    """Compare criteria on one model.

    Args:
        decoder: the model, which is as before afterwards.
        tokenizer: its tokenizer.
        terms: what is compared.
        name: of the model.
        store: what was measured before, and where results are kept as they are found.

    Returns:
        The rows with their regret.

    Raises:
        LayersError: a size that the model cannot lose.
        ModelError: its layers cannot be run one by one, or a loss is not finite.
        TextsError: no text has two tokens.
    """
    check_sizes(terms.sizes, len(decoder))
    tokens = fitting_tokens(decoder, terms.tokens)
    model = Layerwise(decoder)
    report = next(iter(terms.texts.values())).report
    losses = LossJudge(judged_batches(tokenizer, report, tokens))
    model.check(losses.batches[0])
    judge: Judge = losses
    if terms.judge != "loss":
        judge = _judge(terms.judge, tokenizer, report, items=terms.reporting, tokens=tokens)
    referee = Referee(
        model, losses, judge, store=store, texts=terms.identities[""],
        num_rejected=len(report) - losses.num_items, spill=terms.spill,
    )  # fmt: skip
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    halves: list[Mapping[str, Any]] = []
    for texts in terms.texts:
        subject = _subject(model, tokenizer, terms, tokens=tokens, store=store, texts=texts)
        contest = Contest(
            subject, terms.criteria, referee, QuickPatch(model, subject.batches), store,
            model_name=name, texts_name=texts, fitted=terms.identities[texts],
            chosen_on={"judge": terms.judge, "seed": terms.seed},
        )  # fmt: skip
        with track(f"compare on {texts}", contest.steps, terms.progress) as advance:
            rows += contest.rows(contest.choices(advance), advance)
        several = f" on {texts}" if len(terms.texts) > 1 else ""
        skipped |= {f"{key}{several}": why for key, why in contest.skipped.items()}
        if terms.halves and not halves:
            halves += [{"model": name, **half.to_json()} for half in half_blocks(subject)]
    return Outcome(
        referee.compared(name), tuple(with_regret(rows, referee)), skipped, tuple(halves)
    )


def _subject(
    model: Layerwise,
    tokenizer: PreTrainedTokenizerBase,
    terms: Terms,
    *,
    tokens: Tokens,
    store: Store,
    texts: str,
) -> Subject:
    """The model on the texts of one name that fit and that choose."""
    splits = terms.texts[texts]
    fitted = TokenBatches(tokenizer, splits.fit, tokens, min_tokens=2)
    batches, meter = list(fitted), Meter()
    judge = _judge(terms.judge, tokenizer, splits.choose, items=terms.choosing, tokens=tokens)
    journal = store.journal("trials", {"judge": terms.judge, "items": terms.identities[texts]})
    trials = Trials(model, judge, meter=meter, journal=journal, spill=terms.spill)
    return Subject(
        model.head.decoder, tokenizer, batches, trials, terms.sizes, texts=(fitted.identity,),
        seed=terms.seed, meter=meter, progress=False,
    )  # fmt: skip


def _judge(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    items: Sequence[OptionItem],
    tokens: Tokens,
) -> Judge:
    if name == "options":
        return OptionsJudge(items, tokenizer, tokens=tokens)
    batches = judged_batches(tokenizer, texts, tokens)
    return LossJudge(batches) if name == "loss" else KLJudge(batches)
