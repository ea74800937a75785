"""The judge's score without each single layer: Shortened LLaMA (2402.02834)."""

from ...progress import track
from ...values.costs import Costs
from ..criterion import Criterion
from ..subject import Subject


class OneShot(Criterion):
    """The mean score without a layer less that of the whole model, on the same items.

    The error is that of the paired difference.
    """

    name = "one_shot"
    summary = "What the judge's score loses without each single layer."
    cost = "L(L+1)/2 layers a text; the states of one path."

    def costs(self, subject: Subject) -> Costs:
        """Measure as :meth:`Criterion.costs`."""
        trials, layers = subject.trials, range(subject.num_layers)
        whole = trials.scores(())
        with track(self.name, len(layers), subject.progress) as advance:
            differences = {}
            for layer in reversed(layers):  # the deepest first: what they share is kept longest
                differences[layer] = trials.scores((layer,)).minus(whole)
                advance(1)
        return Costs.of_layers(
            [differences[layer].mean for layer in layers],
            stderr=[differences[layer].stderr for layer in layers],
            metric=self.name,
            model=subject.decoder.identity,
        )
