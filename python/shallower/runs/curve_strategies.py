"""The layers that every strategy of a curve would drop, by their number."""

from functools import cached_property

from transformers import PreTrainedTokenizerBase

from ..judgement.criteria import criteria
from ..judgement.criterion import Criterion
from ..judgement.held_out_cuts import HeldOutCuts, Store, judge_inputs
from ..judgement.stored_costs import stored_choice, stored_costs
from ..models.decoder import Decoder
from ..scanning.model import scan
from ..scanning.scan import Scan
from ..values.files import PARTIAL_FILE, SCAN_FILE
from ..values.layers import deepest_block
from ..values.plan import Plan
from ..values.target import Target
from ..values.tokens import Tokens
from .asked import Asked
from .curve_terms import CurveTerms
from .sizes import Sizes


class CurveStrategies:
    """The plans of the strategies on one model that is loaded, each found when asked for.

    Args:
        decoder: the whole model, which is as before afterwards.
        tokenizer: its tokenizer.
        terms: what is asked for.
        referee: the model on the texts that report.
        tokens: length of texts, and how many make one forward.
        store: what was measured before, and where results are kept as they are found.
        goes_on: whether a scan in the folder is of this very curve.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        terms: CurveTerms,
        *,
        referee: HeldOutCuts,
        tokens: Tokens,
        store: Store,
        goes_on: bool,
    ) -> None:
        self._decoder, self._tokenizer, self._terms = decoder, tokenizer, terms
        self._referee, self._tokens, self._store = referee, tokens, store
        self._goes_on = goes_on

    def plan(self, strategy: str, n: int) -> Plan:
        """Choose layers.

        Args:
            strategy: its name; those that are not of the curve itself are criteria.
            n: layers that go.

        Returns:
            The layers to drop.

        Raises:
            LayersError, ModelError, CriterionError, CostsError, StatesError, TextsError: the
                strategy cannot choose.
        """
        if strategy == "deepest":
            size = len(self._decoder)
            return Plan(size, (deepest_block(size, n),), "deepest")
        if strategy == "similarity":
            return self._scan.plan(n)
        if strategy == "best_plan":
            return self._scan.best_plan(n, n)
        if strategy == "recommended":
            return self.sizes.verify(n).plan
        return self._by(criteria[strategy], n)

    @cached_property
    def sizes(self) -> Sizes:
        """The verified plan of every size, and the quick patch that they are raced after."""
        terms = self._terms
        asked = Asked(
            target=Target(), splits=terms.splits, out=terms.out, top=terms.top, blocks=None,
            tokens=terms.tokens, threads=terms.threads, prompts=(), seed=terms.seed,
            identities=terms.identities, job=terms.job, command="", progress=False,
        )  # fmt: skip
        return Sizes(
            self._decoder, self._tokenizer, asked, scanned=lambda: self._scan,
            referee=self._referee, tokens=self._tokens, store=self._store,
        )  # fmt: skip

    def _by(self, criterion: Criterion, n: int) -> Plan:
        """The choice of a criterion, which looks at the texts that proposals are verified on."""
        verifier = self.sizes.verifier
        subject = verifier.subject
        inputs = {
            "criterion": criterion.name, "fitted": verifier.texts, "num_texts": subject.num_texts,
            "seed": subject.seed, **judge_inputs(subject.trials.judge),
        }  # fmt: skip
        if type(criterion).costs is not Criterion.costs:
            stored_costs(criterion, subject, self._store, inputs=inputs)
        return stored_choice(criterion, subject, n, store=self._store, inputs=inputs)[0]

    @cached_property
    def _scan(self) -> Scan:
        """The comparison of all layers on the texts that fit, as it lies in the folder."""
        terms, place = self._terms, self._terms.out / SCAN_FILE
        if self._goes_on and place.exists():
            return Scan.load(place)
        partial = terms.out / PARTIAL_FILE
        scanned = scan(
            self._decoder.model, self._tokenizer, terms.splits.fit,
            max_length=self._tokens.max_length, batch_size=self._tokens.batch_size,
            threads=terms.threads, checkpoint=partial, progress=False,
        )  # fmt: skip
        scanned.save(place)
        partial.unlink(missing_ok=True)
        return scanned
