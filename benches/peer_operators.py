"""What other tools put at a cut, from their published formulas: maps of the residual stream.

Rows are tokens. x is the stream before the first dropped layer, y the whole model's stream behind
the last one, m what the feed-forward before the cut has added to x.

- Ghosted Layers (2605.15491): x W, W = I + (XᵀX + 1e-6 I)⁻¹ Xᵀ(Y - X), in float64.
- ReplaceMe (2505.02819): x - m + m T, T = (MᵀM + αI)⁻¹ Mᵀ(Y - X + M), fused into the matrix that
  writes m; α = 0 is the default of their configuration.
- LinearPatch (2505.24680, before distillation): x H diag(d) Hᵀ, H an orthonormal Hadamard matrix, d
  the ratio of the mean |y H| of a text's tokens to the mean |x H|, averaged over texts.
- Prune&Comp (2507.18212): x · E‖y‖ / E‖x‖.

None of their code is used. All of them count the first tokens of texts, which carry massive
activations; the sums keep these apart, so that they can be left out.
"""

import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from shallower.models.layerwise import rows
from shallower.models.residual_writers import find_writers

GHOSTED_RIDGE = 1e-6
"""Added to the sums of squares, as they are."""

SHARES = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0)
"""Ridges to choose from, as shares of the mean sum of squares of an input."""


@dataclass
class Regression:
    """Sums over tokens for a map of inputs to targets, float64."""

    gram: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def of(cls, inputs, targets):
        return cls(inputs.T @ inputs, inputs.T @ targets)

    def __add__(self, other):
        return Regression(self.gram + other.gram, self.cross + other.cross)

    def solve(self, ridge):
        """(F, D), for rows of inputs."""
        return torch.linalg.solve(
            self.gram + ridge * torch.eye(len(self.gram)).double(), self.cross
        )

    def error(self, solution):
        """The sum of squared errors, less that of no map."""
        return float(((self.gram @ solution - 2 * self.cross) * solution).sum())

    @property
    def scale(self):
        return float(self.gram.diagonal().mean())


@dataclass
class Boundary:
    """Sums over the tokens of texts at one cut; those of first tokens are apart."""

    start: int
    stop: int
    change: Regression | None = None
    first_change: Regression | None = None
    mlp: Regression | None = None
    first_mlp: Regression | None = None
    ratios: list = field(default_factory=list)
    norms: list = field(default_factory=list)
    tokens: int = 0
    seconds: dict = field(default_factory=lambda: defaultdict(float))

    def add(self, batch, before, after, written):
        """Add a batch: (B, T, D) each, padded on the right."""
        every = batch.attention_mask.astype(bool)
        first = np.zeros_like(every)
        first[:, 0] = True
        self.tokens += int(every.sum())
        for name, mask in (("", every & ~first), ("first_", first)):
            x, y, m = (rows(states, mask).double() for states in (before, after, written))
            with self._timed("ghosted"):
                self._join(f"{name}change", Regression.of(x, y - x))
            with self._timed("replaceme"):
                self._join(f"{name}mlp", Regression.of(m, y - x + m))
        with self._timed("linear_patch"):
            turn = hadamard(before.shape[-1])
            x, y = (rows(states, every).double() for states in (before, after))
            lengths = every.sum(axis=1).tolist()
            pairs = zip(
                (x @ turn).abs().split(lengths), (y @ turn).abs().split(lengths), strict=True
            )
            self.ratios += [after.mean(0) / before.mean(0) for before, after in pairs]
        with self._timed("prune_comp"):
            self.norms.append([float(states.norm(dim=-1).sum()) for states in (x, y)])

    def _join(self, name, found):
        known = getattr(self, name)
        setattr(self, name, found if known is None else known + found)

    @contextmanager
    def _timed(self, name):
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def ghosted(self, *, first=True, held=None):
        """(D, D): x W. The ridge is theirs, or chosen on held-out sums."""
        sums = self.change + self.first_change if first else self.change
        ridge = GHOSTED_RIDGE if held is None else best_ridge(sums, held.change)
        return torch.eye(len(sums.gram)).double() + sums.solve(ridge)

    def replaceme(self, *, first=True, held=None):
        """(D, D): m T. α is 0, or chosen on held-out sums."""
        sums = self.mlp + self.first_mlp if first else self.mlp
        return sums.solve(0.0 if held is None else best_ridge(sums, held.mlp + held.first_mlp))

    def linear_patch(self):
        """(D, D), symmetric: x P."""
        scales, turn = torch.stack(self.ratios).mean(0), hadamard(len(self.ratios[0]))
        return (turn * scales) @ turn.T

    def prune_comp(self):
        """A factor of x."""
        before, after = np.sum(self.norms, axis=0)
        return float(after / before)


def best_ridge(sums, held):
    """The ridge whose map errs least on the tokens held out."""
    ridges = [share * sums.scale for share in SHARES]
    return min(ridges, key=lambda ridge: held.error(sums.solve(ridge)))


@torch.no_grad()
def collect(model, batches, start, stop):
    """The sums at a cut over all tokens of batches, and the time of the forward in them."""
    found = Boundary(start, stop)
    started = time.perf_counter()
    for batch in batches:
        before_layer = model.run(batch, model.embed(batch), range(start - 1))
        if not found.tokens:
            probe = batch.split(1)[0]
            some = before_layer[:1, : probe.input_ids.shape[1]]
            writer = find_writers(model, start - 1, batch=probe, states=some).feed_forward
        taken = []
        hook = writer.module.register_forward_hook(lambda _m, _a, out, to=taken: to.append(out))
        before = model.run(batch, before_layer, (start - 1,))
        hook.remove()
        written = writer.scale * taken[-1].view_as(before)
        after = model.run(batch, before, range(start, stop))
        found.add(batch, before, after, written)
    elapsed = time.perf_counter() - started
    found.seconds["forward"] = elapsed - sum(found.seconds.values())
    return found


_KNOWN = {}


def hadamard(order):
    """(order, order) float64, orthonormal: Paley's times Sylvester's."""
    if order not in _KNOWN:
        base = next((b for b in range(1, order + 1) if _two(order, b) and _pure(b)), None)
        if base is None:
            raise ValueError(f"no Hadamard matrix of order {order} by Paley and Sylvester")
        found = _paley(base)
        while len(found) < order:
            found = np.kron([[1, 1], [1, -1]], found)
        assert np.array_equal(found @ found.T, order * np.eye(order))
        _KNOWN[order] = torch.from_numpy(found / order**0.5)
    return _KNOWN[order]


def _two(order, base):
    times = order // base
    return order % base == 0 and times & (times - 1) == 0


def _pure(base):
    """Whether Paley has a matrix of the order."""
    second = base // 2 - 1
    return base in (1, 2) or (
        base % 4 == 0 and (_prime(base - 1) or (second % 4 == 1 and _prime(second)))
    )


def _prime(q):
    return q > 2 and all(q % d for d in range(2, int(q**0.5) + 1)) and q % 2 == 1


def _paley(base):
    if base <= 2:
        return np.array([[1, 1], [1, -1]])[:base, :base].astype(float)
    first = _prime(base - 1)
    q = base - 1 if first else base // 2 - 1
    squares = {i * i % q for i in range(1, q)}
    signs = np.array([0, *(1 if i in squares else -1 for i in range(1, q))])
    core = np.zeros((q + 1, q + 1))
    core[0, 1:], core[1:, 0] = 1, -1 if first else 1
    core[1:, 1:] = signs[(np.arange(q)[:, None] - np.arange(q)) % q]
    if first:
        return core + np.eye(q + 1)
    return np.kron(core, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
