"""How much of a block's output no linear map of its input makes."""

import numpy as np

from ...progress import track
from ...values.costs import Costs
from ..criterion import Criterion
from ..kept_states import kept_states
from ..subject import Subject
from ..token_states import ALL_TOKENS


class LinearMap(Criterion):
    """1 − R² of x⁽ˡ⁾ + ΔT x⁽ˡ⁾ as a prediction of x⁽ᵐ⁾, on texts held out.

    ΔT = argmin Σₜ ‖x⁽ᵐ⁾ − x⁽ˡ⁾ − ΔT x⁽ˡ⁾‖² + Σᵢ λᵢ ‖ΔTᵢ‖², ΔTᵢ the column for channel i and λᵢ its
    sum of squares over the N tokens, times D/N: the channels of a stream differ a
    thousandfold in size. The penalty is on the change, so that the map falls back to doing
    nothing. R² is of the variance of x⁽ᵐ⁾, which the layers behind the block read, so blocks of
    all sizes can be compared. First tokens and others that carry massive activations are left
    out: they outweigh all others together.

    A layer that only scales the states costs next to nothing: a linear map can stand in for it.
    """

    name = "linear_map"
    summary = "1 less the R² of a linear map in place of the block, on texts held out."
    cost = (
        "One pass over about 8,192 tokens, shared with reachable; (L+1)·D values for each of 4,608 "
        "of them, and L(L+1)/2 products of (512 × 4,096) by (4,096 × D)."
    )

    def costs(self, subject: Subject) -> Costs:
        """Measure as :meth:`Criterion.costs`."""
        kept, size = kept_states(subject), subject.num_layers + 1
        blocks, errors = np.zeros((2, size, size))
        with track(self.name, subject.num_layers, subject.progress) as advance:
            for start in range(subject.num_layers):
                found = kept.unexplained(start, kept.fitted[start], kept.held_out[start])
                for stop, scores in enumerate(found, start + 1):
                    blocks[start, stop], errors[start, stop] = scores.mean, scores.stderr
                advance(1)
        return Costs.of_blocks(
            blocks, stderr=errors, metric=self.name, model=subject.decoder.identity,
            texts=subject.texts, positions=ALL_TOKENS,
        )  # fmt: skip
