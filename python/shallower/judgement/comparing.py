"""The comparison of criteria on one model that is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from ..errors import TextsError
from ..evaluation.loss import fitting_tokens
from ..models.decoder import Decoder
from ..models.layerwise import Layerwise
from ..patching.quick import QuickPatch
from ..progress import track
from ..texts.batches import TokenBatches
from ..texts.options import OptionItem
from ..texts.splits import FEWEST_CHOOSING, FEWEST_FITTING, FEWEST_REPORTING, Splits
from ..values.comparison import ComparedModel, Row
from ..values.layers import check_sizes
from ..values.tokens import Tokens
from .contest import Contest, with_regret
from .criterion import Criterion
from .held_out_cuts import HeldOutCuts, Store, judge_inputs
from .judges.judge import Judge, judged_batches
from .judges.kl import KLJudge
from .judges.loss import LossJudge
from .judges.options import OptionsJudge
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
        identities: by the same names what tells these texts from others, for the store.
        reported: the same of the texts that report.
        judge: name of the judge that chooses.
        choosing: items of a task that choose, of the judge ``options``.
        reporting: those that report.
        tokens: length of texts, and how many make one forward.
        seed: of whatever is drawn.
        progress: bars with ETA on standard error; by default if that is a terminal.
    """

    criteria: Sequence[Criterion]
    sizes: Sequence[int]
    texts: Mapping[str, Splits]
    identities: Mapping[str, str]
    reported: str
    judge: str = "loss"
    choosing: Sequence[OptionItem] = ()
    reporting: Sequence[OptionItem] = ()
    tokens: Tokens = field(default_factory=Tokens)
    seed: int = 0
    progress: bool | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a comparison found on one model.

    Attributes:
        model: the whole model.
        rows: every choice.
        skipped: by criterion, and calibration text where there are several, why it could not
            choose.
        splits: how many texts fit, choose and report: those of two tokens at least.
        is_complete: whether nothing was skipped or left out, which may go well another time.
    """

    model: ComparedModel
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]
    splits: Mapping[str, int]
    is_complete: bool


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
        judge = judge_of(terms.judge, tokenizer, report, items=terms.reporting, tokens=tokens)
    held_out = HeldOutCuts(
        model, losses, judge, store=store, texts=terms.reported,
        num_rejected=len(report) - losses.num_items,
    )  # fmt: skip
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    counts: dict[str, int] = {}
    for texts in terms.texts:
        subject = _subject(model, tokenizer, terms, tokens=tokens, store=store, texts=texts)
        _require_enough(subject, losses)
        contest = Contest(
            subject, terms.criteria, held_out, QuickPatch(model, subject.batches), store,
            model_name=name, texts_name=texts, fitted=terms.identities[texts],
            chosen_on={"seed": terms.seed, **judge_inputs(subject.trials.judge)},
        )  # fmt: skip
        with track(f"compare on {texts}", contest.steps, terms.progress) as advance:
            rows += contest.rows(contest.choices(advance), advance)
        several = f" on {texts}" if len(terms.texts) > 1 else ""
        skipped |= {f"{key}{several}": why for key, why in contest.skipped.items()}
        if not counts:  # what is said once is said of the first texts
            counts = {"fit": subject.num_texts, "choose": subject.trials.judge.num_items}
    return Outcome(
        held_out.compared(name), tuple(with_regret(rows, held_out)), skipped,
        {**counts, "report": losses.num_items},
        held_out.is_complete and not skipped,
    )  # fmt: skip


def _require_enough(subject: Subject, report: Judge) -> None:
    """Refuse sets that are too small without their texts of a single token."""
    sets = (
        (subject.num_texts, FEWEST_FITTING, "to fit", "--texts, --max-texts"),
        (subject.trials.judge.num_items, FEWEST_CHOOSING, "to choose", "--texts, --max-texts"),
        (report.num_items, FEWEST_REPORTING, "to report", "--eval-texts, --max-eval-texts"),
    )
    for number, fewest, purpose, options in sets:
        if number < fewest:
            raise TextsError(
                f"too few texts {purpose}: {number} of at least two tokens, expected {fewest}; "
                f"give more, or longer ones ({options}, --max-length)"
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
    judge = judge_of(terms.judge, tokenizer, splits.choose, items=terms.choosing, tokens=tokens)
    journal = store.journal("trials", {"items": terms.identities[texts], **judge_inputs(judge)})
    trials = Trials(model, judge, meter=meter, journal=journal)
    return Subject(
        model.head.decoder, tokenizer, batches, trials, terms.sizes, texts=(fitted.identity,),
        seed=terms.seed, meter=meter, progress=False,
    )  # fmt: skip


def judge_of(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    tokens: Tokens,
    items: Sequence[OptionItem] = (),
) -> Judge:
    """Make a judge.

    Args:
        name: of the judge.
        tokenizer: of the model.
        texts: that it judges on, but for ``options``.
        tokens: length of texts, and how many make one forward.
        items: that the judge ``options`` judges on.

    Returns:
        The judge.

    Raises:
        TextsError: no text has two tokens.
    """
    if name == "options":
        return OptionsJudge(items, tokenizer, tokens=tokens)
    batches = judged_batches(tokenizer, texts, tokens)
    return LossJudge(batches) if name == "loss" else KLJudge(batches)
