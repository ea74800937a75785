"""A local search: one layer that is gone exchanged for one that stays."""

from collections.abc import Callable, Iterator

Cut = frozenset[int]

TRIED = 8
"""Exchanges of a step that are judged: those that are guessed to be the best."""


def exchanges(
    score: Callable[[Cut], float],
    guess: Callable[[Cut], float],
    start: Cut,
    *,
    num_layers: int,
    base: Cut,
    allows: Callable[[Cut], bool],
    goes_on: Callable[[], bool],
) -> Iterator[Cut]:
    """Search for a better cut of as many layers.

    There are n (L - n) exchanges. What one is worth is guessed by the sum of its halves: the
    score with the one layer back and that without the other one too, L trials in all. The most
    promising are judged, and the search goes on from the best of them as long as it gains.

    Args:
        score: of a cut; infinity for one that cannot be judged.
        guess: the same, of fewer items.
        start: where the search begins.
        num_layers: L.
        base: layers that stay gone.
        allows: whether a cut may be.
        goes_on: is asked before each step.

    Yields:
        Every cut that was judged.
    """
    best, tried = start, {start}
    while len(best) + 1 < num_layers and goes_on():
        here = score(best)
        back = {layer: guess(best - {layer}) for layer in sorted(best - base)}
        stays = [layer for layer in range(num_layers) if layer not in best]
        out = {layer: guess(best | {layer}) for layer in reversed(stays)}
        guesses = sorted((back[i] + out[j], i, j) for i in back for j in out)
        cuts = [best - {i} | {j} for _, i, j in guesses]
        cuts = [cut for cut in cuts if cut not in tried and allows(cut)][:TRIED]
        for cut in cuts:
            tried.add(cut)
            score(cut)
            yield cut
        better = [cut for cut in cuts if score(cut) < here]
        if not better:
            return
        best = min(better, key=score)
