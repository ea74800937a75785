"""How many layers are to go."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower import PlanError
from shallower.judgement.choosing_size import choose_size, curve_sizes, knee
from shallower.results.scores import Difference
from shallower.settings.target import Target


class Model:
    """Losses and parameters by the number of layers that go, which note what they are asked."""

    def __init__(self, losses, parameters=None):
        self.losses, self.parameters = losses, parameters or []
        self.asked = []

    def lost(self, n):
        self.asked.append(n)
        return Difference(self.losses[n], 0.0, 8)

    def left(self, n):
        self.asked.append(n)
        return sum(self.parameters[n:])

    def left_at_least(self, n):
        return sum(sorted(self.parameters)[: len(self.parameters) - n])

    def choose(self, **target):
        return choose_size(
            Target(**target), len(self.losses), lost=self.lost, left=self.left,
            left_at_least=self.left_at_least,
        )  # fmt: skip


def test_a_number_and_a_fraction_ask_for_no_loss():
    model = Model([0.0] * 12)
    assert model.choose(n=5).n == 5
    assert model.choose(fraction=0.25).n == 3
    assert model.asked == []


@given(
    steps=st.lists(st.floats(0.001, 1), min_size=3, max_size=60),
    most=st.floats(0.001, 20),
)
def test_the_most_layers_within_a_loss(steps, most):
    """A bisection finds what a look at every size does, as losses grow with the layers."""
    losses = [math.fsum(steps[:n]) for n in range(len(steps))]
    model = Model(losses)
    fitting = [n for n in range(1, len(losses)) if losses[n] <= most]
    assert model.choose(max_loss=most).n == max(fitting, default=1)
    assert len(set(model.asked)) <= 2 * math.log2(len(losses)) + 4


@given(parameters=st.lists(st.integers(1, 9), min_size=2, max_size=20), most=st.integers(1, 100))
def test_the_fewest_layers_that_leave_so_few_parameters(parameters, most):
    model = Model([0.0] * len(parameters), parameters)
    if sum(parameters) <= most:
        with pytest.raises(PlanError, match=f"{sum(parameters)} parameters, which is no more than"):
            model.choose(params=most)
        return
    fitting = [n for n in range(1, len(parameters)) if sum(parameters[n:]) <= most]
    if not fitting:
        with pytest.raises(PlanError, match="no cut leaves"):
            model.choose(params=most)
        return
    assert model.choose(params=most).n == min(fitting)
    # Where layers are of one size, the one cut that does it is the first that is looked at.
    if len(set(parameters)) == 1:
        assert len(model.asked) == 1


def test_the_fewest_layers_that_leave_so_little_of_the_time():
    """A tenth of the time lies outside the layers."""

    class Timed(Model):
        def left(self, n):
            return 0.1 + super().left(n)

        def left_at_least(self, n):
            return 0.1 + super().left_at_least(n)

    model = Timed([0.0] * 6, [0.15] * 6)
    found = model.choose(latency=0.6)
    assert (found.n, found.reason) == (
        3, "the fewest layers whose absence leaves at most 0.6 of the time of a token"
    )  # fmt: skip
    with pytest.raises(PlanError, match=r"no cut leaves at most 0.2 of the time .*still"):
        model.choose(latency=0.2)


@given(st.integers(2, 40), st.floats(0.01, 9))
def test_the_knee_is_before_the_end(count, scale):
    """Also of a curve nowhere below the line, whose end is above itself by rounding."""
    lost = {n: Difference(scale * n**0.5, 0.0, 8) for n in range(1, count)}
    assert knee(lost).n == 1
    assert "no knee" in knee(lost).reason


def test_a_memory_that_the_model_has_already_or_that_no_cut_has():
    model = Model([0.0] * 4, [10**9] * 4)
    assert model.choose(memory=2 * 10**9).n == 2
    with pytest.raises(PlanError, match=r"the model takes 4\.0 GB of weights and cache, at 2,048"):
        model.choose(memory=4 * 10**9)
    with pytest.raises(PlanError, match=r"no cut leaves at most 0\.5 GB .* takes 1\.0 GB"):
        model.choose(memory=5 * 10**8)


def test_the_knee_is_where_the_curve_bends():
    losses = [0.02 * n if n <= 4 else 0.08 + 0.3 * (n - 4) for n in range(30)]
    found = Model(losses).choose()
    assert found.n == 4
    assert found.reason == (
        "the knee of the curve: up to 4, a layer costs 0.020 nats a token; from there to 12, 0.300"
    )


@given(st.floats(0.01, 100), st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_the_knee_does_not_depend_on_the_unit(scale, steps):
    sizes = [1, 2, 4, 8, 12, 16]
    curve = [0.5 * math.fsum(steps[: place + 1]) ** 2 for place in range(6)]
    one, other = (
        knee({n: Difference(factor * v, 0.0, 8) for n, v in zip(sizes, curve, strict=True)})
        for factor in (1, 2.0 ** round(math.log2(scale)))
    )
    assert one.n == other.n


@pytest.mark.parametrize("curve", [{1: 0.5, 2: 0.9, 4: 1.0}, {1: 0.1, 2: 0.2}, {1: 0.3}])
def test_a_curve_without_a_knee_gives_its_least_size(curve):
    found = knee({n: Difference(value, 0.0, 8) for n, value in curve.items()})
    assert (found.n, found.reason) == (1, "the least size, as the curve has no knee")


def test_sizes_of_a_curve():
    assert curve_sizes(30) == [1, 2, 4, 8, 12]
    assert curve_sizes(80)[-1] == 32
    assert curve_sizes(2) == curve_sizes(3) == [1]
