"""The race by itself: synthetic losses, an oracle that knows all of them, and the books of the budget."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horizonplan.racing import ORDERS, Standing, race
from horizonplan.rates import tail_of


class Synthetic:
    """Losses exp(-r k / 100) after k steps with some noise; ``None`` is back-propagation, r = 1."""

    def __init__(self, rates, noise=0.0, late=None, prices=None):
        self.rates, self.noise, self.late, self.prices = rates, noise, late or {}, prices or {}
        self.done, self.spent, self.calls = {}, 0.0, []

    def price(self, who, steps, order):
        return self.prices.get(who, 1.0) * max(0, steps - self.done.get((who, order), 0))

    def advance(self, who, steps, order):
        self.spent += self.price(who, steps, order)
        self.done[who, order] = max(steps, self.done.get((who, order), 0))
        self.calls.append((who, steps, order))
        return [self._loss(who, k, order) for k in range(steps)]

    def start(self, steps, order):
        return [1.0] * tail_of(steps)

    def _loss(self, who, k, order):
        rate = 1.0 if who is None else self.rates[who]
        if rate is None:
            return math.nan
        if who in self.late:
            rate -= self.late[who] * math.log2(1 + k / 8)
        shake = random.Random(f"{who}/{k}/{order}").gauss(0, self.noise)
        return math.exp(-rate * (k + 1) / 100 + shake)


def cheapest(threshold):
    """The constraint: the smallest horizon (then stride) whose rate is no less; None: back-propagation."""

    def choose(rates):
        return min((who for who, rate in rates.items() if rate is not None and rate >= threshold), default=None)

    return choose


def weighted(lam):
    def choose(rates):
        values = {who: -rate + lam * who[0] for who, rate in rates.items() if rate is not None}
        best = min(values, key=lambda who: (values[who], who), default=None)
        return None if best is None or values[best] > -1 + lam * 10 else best

    return choose


GROWING = {(h, s): 1 - (1 - h / 10) ** 2 - 0.03 * (s == 1) for h in range(1, 10) for s in {1, h}}
CHOICES = {"cheap": cheapest(0.5), "strict": cheapest(0.97), "none": cheapest(2.0), "weighted": weighted(0.06)}


def rivalled(outcome, choose):
    return choose({who: outcome.rate(who) for who in outcome.standings})


@pytest.mark.parametrize("choice", CHOICES)
def test_without_a_budget_the_race_finds_what_brute_force_finds(choice):
    choose, track = CHOICES[choice], Synthetic(GROWING)
    outcome = race(dict.fromkeys(GROWING), track, choose, math.inf, 64)
    assert rivalled(outcome, choose) == choose(GROWING)
    for standing in outcome.standings.values():
        assert not standing.steps or standing.steps <= 64


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 1500),
    st.integers(1, 100),
    st.sampled_from(sorted(CHOICES)),
    st.floats(0, 0.3),
    st.floats(0.3, 3),
)
def test_no_budget_is_ever_exceeded(budget, goal, choice, noise, price):
    track = Synthetic(GROWING, noise, prices=dict.fromkeys(GROWING, price))
    outcome = race(dict.fromkeys(GROWING), track, CHOICES[choice], budget, goal)
    assert outcome.spent == track.spent <= budget + 1e-9


@pytest.mark.parametrize("choice", ["cheap", "strict", "weighted"])
@pytest.mark.parametrize("seed", range(3))
def test_the_truth_survives_where_noise_allows(choice, seed):
    noisy = {who: rate + random.Random(f"{who}{seed}").uniform(-0.01, 0.01) for who, rate in GROWING.items()}
    choose, track = CHOICES[choice], Synthetic(noisy, noise=0.01)
    outcome = race(dict.fromkeys(noisy), track, choose, math.inf, 64)
    assert choose(noisy) in {*outcome.rivals, rivalled(outcome, choose)}


def test_what_cannot_be_chosen_does_not_run():
    track = Synthetic(GROWING)
    race(dict.fromkeys(GROWING), track, cheapest(-5.0), math.inf, 64)
    assert {who for who, _ in track.done} <= {None, *GROWING}
    assert track.done[(1, 1), 0] == 64
    far_behind = [who for who in GROWING if track.done.get((who, 0), 0) == 64]
    assert far_behind == [(1, 1)]


def test_nobody_runs_where_no_rate_can_change_the_choice():
    track = Synthetic(GROWING)
    outcome = race(dict.fromkeys(GROWING), track, CHOICES["none"], math.inf, 64)
    everything_known = race({}, track, cheapest(0.5), math.inf, 64)
    assert everything_known.steps == 0
    assert rivalled(outcome, CHOICES["none"]) is None


def test_runs_are_continued_and_their_steps_double():
    track = Synthetic(GROWING)
    race(dict.fromkeys(GROWING), track, cheapest(0.5), math.inf, 64)
    steps = [steps for who, steps, order in track.calls if who == (3, 3) and order == 0]
    assert steps == sorted(steps)
    assert set(steps) <= {16, 32, 64}
    assert track.spent == sum(track.done.values())


def test_more_orders_of_the_data_where_one_does_not_decide():
    close = {(1, 1): 0.5, (2, 2): 0.5}
    choose = lambda rates: max((w for w in rates if rates[w] is not None), key=lambda w: rates[w], default=None)  # noqa: E731
    noisy, clear = Synthetic(close, noise=0.2), Synthetic({(1, 1): 0.3, (2, 2): 0.9}, noise=0.001)
    race(dict.fromkeys(close), noisy, choose, math.inf, 64)
    race(dict.fromkeys(close), clear, choose, math.inf, 64)
    assert {order for _, order in noisy.done} == set(range(ORDERS))
    assert {order for _, order in clear.done} == {0}


def test_what_diverges_is_out_and_costs_no_more():
    rates = {**GROWING, (3, 3): None, (2, 2): None}
    track = Synthetic(rates)
    outcome = race(dict.fromkeys(rates), track, cheapest(0.5), math.inf, 64)
    assert outcome.standings[3, 3].diverged
    assert outcome.standings[3, 3].rate is None
    assert track.done[(3, 3), 0] == 16  # the first round
    assert rivalled(outcome, cheapest(0.5)) == cheapest(0.5)({w: r for w, r in rates.items() if r is not None})


def test_a_rate_that_falls_lengthens_the_race_as_the_budget_allows():
    rates = {(1, 1): 1.0}
    for budget, goal in ((200, 64), (300, 128), (600, 256)):
        track = Synthetic(rates, late={(1, 1): 0.1})
        outcome = race(dict.fromkeys(rates), track, cheapest(0.1), budget, 64)
        assert outcome.steps == goal
        assert outcome.standings[1, 1].falling > 0
    steady = race(dict.fromkeys(rates), Synthetic(rates), cheapest(0.1), 600, 64)
    assert (steady.steps, steady.standings[1, 1].falling) == (64, 0.0)


def test_without_a_fall_of_back_propagation_there_is_no_race():
    class Flat(Synthetic):
        def _loss(self, who, k, order):
            return 1.0

    track = Flat(GROWING)
    outcome = race(dict.fromkeys(GROWING), track, cheapest(0.5), math.inf, 64)
    assert not outcome.exact_fell
    assert max(steps for _, steps, _ in track.calls) <= 64
    assert all(standing.rate is None for standing in outcome.standings.values())


def test_intervals_narrow_with_steps_and_orders():
    def width(standing):
        low, high = standing.interval(64)
        return high - low

    one = Standing((0.5,), (0.1,), 16)
    assert width(one) > width(Standing((0.5,), (0.1,), 32)) > width(Standing((0.5,), (0.1,), 64))
    assert Standing((0.5, 0.5), (0.1, 0.1), 64).stderr == pytest.approx(0.1 / math.sqrt(2))
    assert Standing((0.4, 0.6), (0.01, 0.01), 64).stderr == pytest.approx(0.1)
    assert Standing().rate is Standing().stderr is None
