"""Selection is brute force: checked against another one, against the closed form, and on every kind of tie."""

import json
import math
import pickle
from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from horizonplan import objective as objectives
from horizonplan.cost import LadderCost, LinearCost
from horizonplan.objective import (
    AccuracyConstraint,
    InfeasibleError,
    MemoryLimit,
    Objective,
    Weighted,
    evaluate,
    select,
)
from horizonplan.rows import Row

# --- random tables against an independent brute force -----------------------------------------------------------------


@st.composite
def rows(draw):
    """A table with few distinct numbers, so that ties, references and unknown rates all occur."""
    horizon = draw(st.integers(1, 6))
    return Row(
        horizon=horizon,
        stride=draw(st.sampled_from([1, horizon])),
        memory_bytes=100 * draw(st.integers(0, 6)),
        rate=draw(st.sampled_from([None, -0.5, 0.25, 0.5, 0.75, 1.0, 1.25])),
        flops=draw(st.sampled_from([None, 1, 2])),
        reference=draw(st.booleans()),
    )


TABLES = st.lists(rows(), min_size=1, max_size=12)
COSTS = st.sampled_from([LinearCost(1.0, 64), LadderCost(1.0, 256), LinearCost(0.25, 128), lambda m: m**2 / 2**10])
OBJECTIVES = st.one_of(
    st.builds(AccuracyConstraint, st.sampled_from([0.0, 0.25, 0.5])),
    st.builds(Weighted, st.sampled_from([0.0, 0.5, 1.0])),
    st.builds(MemoryLimit, st.sampled_from([50, 100, 400])),
)


def score(row, objective, cost):
    """What the paper's prose minimises, written out again; None for what is infeasible."""
    if isinstance(objective, MemoryLimit):
        return -row.horizon if row.memory_bytes <= objective.limit_bytes else None
    if row.rate is None:
        return None
    if isinstance(objective, AccuracyConstraint):
        return cost(row.memory_bytes) if row.rate >= 1 - objective.epsilon else None
    return -row.rate + objective.lam * cost(row.memory_bytes)


def beats(one, other, objective, cost):
    """Whether one row goes before the other: the rule for ties in words, one comparison after another."""
    pairs = [
        (score(one, objective, cost), score(other, objective, cost)),
        (one.flops or math.inf, other.flops or math.inf),
        (-(one.rate if one.rate is not None else -math.inf), -(other.rate if other.rate is not None else -math.inf)),
        (one.horizon, other.horizon),
        (one.stride, other.stride),
        (one.memory_bytes, other.memory_bytes),
    ]
    for a, b in pairs:
        if a != b:
            return a < b
    return False


@given(table=TABLES, objective=OBJECTIVES, cost=COSTS)
def test_selection_is_brute_force(table, objective, cost):
    feasible = [row for row in table if not row.reference and score(row, objective, cost) is not None]
    if not feasible:
        with pytest.raises(ValueError, match=r"no candidate is feasible|references only"):
            select(table, objective, cost)
        return
    best = feasible[0]
    for row in feasible[1:]:
        best = row if beats(row, best, objective, cost) else best
    chosen = select(table, objective, cost)
    assert replace(chosen, cost=None, objective=None, feasible=False) == best
    assert chosen.objective == score(best, objective, cost)
    assert chosen.cost == cost(best.memory_bytes)


@given(table=TABLES, objective=OBJECTIVES, cost=COSTS)
def test_evaluation_fills_every_row_and_changes_nothing_else(table, objective, cost):
    evaluated = evaluate(table, objective, cost)
    assert [replace(row, cost=None, objective=None, feasible=False) for row in evaluated] == table
    for row in evaluated:
        assert row.cost == cost(row.memory_bytes)
        assert row.feasible == (score(row, objective, cost) is not None)
    assert evaluate(evaluated, objective, cost) == evaluated


@given(table=TABLES, objective=OBJECTIVES, seed=st.randoms(use_true_random=False))
def test_selection_does_not_depend_on_the_order_of_the_table(table, objective, seed):
    assume(any(not row.reference and score(row, objective, float) is not None for row in table))
    shuffled = table[:]
    seed.shuffle(shuffled)
    assert select(table, objective) == select(shuffled, objective)


# --- the closed form of Section 3.3, corrected ------------------------------------------------------------------------


def closed_form_table(depth, a, b, c):
    """M(h) = a h + b and cos^2(theta_h) = 1 - c (1 - h/T)^3 for every h."""
    return [Row(horizon=h, memory_bytes=a * h + b, rate=1 - c * (1 - h / depth) ** 3) for h in range(1, depth + 1)]


@given(
    depth=st.integers(4, 60),
    a=st.integers(1, 1000),
    b_over_a=st.integers(0, 50),
    c=st.floats(0.05, 1.0),
    where=st.floats(0, 1),
)
def test_the_weighted_choice_is_the_closed_form_of_section_3_3(depth, a, b_over_a, c, where):
    least, most = 3 * c / (a * depth**3), 3 * c * (depth - 2) ** 2 / (a * depth**3)
    lam = least + where * (most - least)
    optimum = depth * (1 - math.sqrt(a * lam * depth / (3 * c)))
    assert 2 - 1e-9 <= optimum <= depth - 1 + 1e-9
    chosen = select(closed_form_table(depth, a, b_over_a * a, c), Weighted(lam), cost=float).horizon
    assert math.floor(optimum + 1e-9) <= chosen <= math.ceil(optimum - 1e-9)


def test_the_closed_form_as_printed_lacks_a_factor_of_the_depth():
    depth, a, c, lam = 16, 10, 0.8, 0.002
    chosen = select(closed_form_table(depth, a, 100, c), Weighted(lam), cost=float).horizon
    printed, corrected = (depth * (1 - math.sqrt(a * lam * factor / (3 * c))) for factor in (1, depth))
    assert abs(chosen - corrected) < 1
    assert abs(chosen - printed) > 3


# --- ties, tolerance, defaults ----------------------------------------------------------------------------------------

TIED = Row(horizon=4, stride=2, memory_bytes=300, rate=0.95, flops=20)


@pytest.mark.parametrize(
    "better",
    [
        replace(TIED, horizon=8, rate=0.91, flops=19),  # fewer FLOPs before all else
        replace(TIED, horizon=8, rate=0.96),
        replace(TIED, horizon=3, stride=3),
        replace(TIED, stride=1, memory_bytes=400),
        replace(TIED, memory_bytes=299),
    ],
)
def test_ties_go_to_fewer_flops_then_higher_rate_then_smaller_horizon_then_smaller_stride_then_fewer_bytes(better):
    for table in ([TIED, better], [better, TIED]):
        chosen = select(table, AccuracyConstraint(0.1), LadderCost(1.0, 256))
        assert replace(chosen, cost=None, objective=None, feasible=False) == better


def test_unknown_flops_lose_a_tie():
    assert select([replace(TIED, flops=None, rate=1.0), TIED], AccuracyConstraint()).flops == 20


def test_flops_break_ties_only():
    cheap = replace(TIED, memory_bytes=299, flops=10**9)
    assert select([TIED, cheap], AccuracyConstraint()).flops == 10**9


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.7, 0.9])
def test_a_rate_of_exactly_one_minus_epsilon_is_feasible_and_less_is_not(epsilon):
    at, below = (Row(horizon=1, memory_bytes=1, rate=1 - epsilon - gap) for gap in (1e-15, 1e-9))
    assert select([at], AccuracyConstraint(epsilon)).feasible
    with pytest.raises(InfeasibleError):
        select([below], AccuracyConstraint(epsilon))


def test_a_memory_limit_is_exact_to_the_byte():
    limit = MemoryLimit("4TiB")
    fits, exceeds = (Row(horizon=1 + extra, memory_bytes=limit.limit_bytes + extra) for extra in (0, 1))
    assert select([fits, exceeds], limit).horizon == 1
    assert [row.feasible for row in evaluate([fits, exceeds], limit)] == [True, False]


def test_without_a_cost_the_node_is_the_largest_row():
    table = [Row(horizon=h, memory_bytes=100 * h, rate=1.0, reference=h == 4) for h in (1, 2, 4)]
    assert [row.cost for row in evaluate(table, Weighted())] == [0.25, 0.5, 1.0]
    assert [row.cost for row in evaluate(table, Weighted(), LadderCost(3.0))] == [3.0, 3.0, 3.0]
    assert evaluate([Row(horizon=1, memory_bytes=0)], Weighted())[0].cost == 0.0


def test_references_are_evaluated_but_never_chosen():
    table = [Row(horizon=4, memory_bytes=1, rate=1.0, reference=True), Row(horizon=4, memory_bytes=9, rate=1.0)]
    evaluated = evaluate(table, AccuracyConstraint())
    assert evaluated[0].feasible
    assert evaluated[0].objective < evaluated[1].objective
    assert select(table, AccuracyConstraint()).memory_bytes == 9


def test_a_row_without_a_rate_has_no_objective_where_one_is_needed():
    row = Row(horizon=2, memory_bytes=5)
    for objective in (AccuracyConstraint(), Weighted()):
        (evaluated,) = evaluate([row], objective)
        assert (evaluated.objective, evaluated.feasible) == (None, False)
    assert select([row], MemoryLimit(5)).objective == -2.0


# --- infeasible -------------------------------------------------------------------------------------------------------


def test_the_nearest_row_comes_with_the_error_and_the_message_says_what_to_do():
    table = [
        Row(horizon=1, memory_bytes=2**20, rate=0.2),
        Row(horizon=3, memory_bytes=2**21, rate=0.625),
        Row(horizon=5, memory_bytes=2**22),
        Row(horizon=6, memory_bytes=2**22, rate=0.7, reference=True),
    ]
    with pytest.raises(
        InfeasibleError, match=r"at least 0.75 of .* horizon 3 .* rate 0.625 .* 2.0 MiB: raise eps"
    ) as e:
        select(table, AccuracyConstraint(0.25))
    assert e.value.nearest.horizon == 3
    with pytest.raises(InfeasibleError, match=r"within 1.0 KiB; .* horizon 1 .* needs 1.0 MiB: raise limit") as e:
        select(table, MemoryLimit("1KiB"))
    assert e.value.nearest.horizon == 1
    with pytest.raises(InfeasibleError, match=r"has rate unknown .* measure a rate"):
        select([table[2]], Weighted())


def test_shortfall_is_relative_to_what_was_asked():
    assert AccuracyConstraint(0.2).shortfall(0.6, 1.0, 1, 1) == pytest.approx(0.25)
    assert MemoryLimit(400).shortfall(None, 1.0, 500, 1) == 0.25
    assert MemoryLimit(400).shortfall(None, 1.0, 400, 1) == 0.0
    assert Weighted().shortfall(None, 1.0, 1, 1) == math.inf


def test_the_error_survives_pickling():
    error = InfeasibleError("too small", TIED)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.nearest) == ("too small", TIED)


# --- a user's own -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RatePerByte(Objective):
    """The best rate for a byte, of horizon two or more."""

    def value(self, rate, cost, memory_bytes, horizon):
        return None if rate is None else -rate / memory_bytes

    def shortfall(self, rate, cost, memory_bytes, horizon):
        return max(0.0, 2.0 - horizon) / 2


def test_a_users_own_objective_plugs_in():
    table = [Row(horizon=h, memory_bytes=100 * h, rate=0.5 + 0.1 * h) for h in (1, 2, 3)]
    assert select(table, RatePerByte()).horizon == 2
    assert not evaluate([replace(table[1], rate=None)], RatePerByte())[0].feasible
    with pytest.raises(InfeasibleError, match=r"the best by RatePerByte.*relax the objective") as e:
        select(table[:1], RatePerByte())
    assert e.value.nearest.horizon == 1
    assert RatePerByte().to_dict() == {"kind": "custom", "name": "RatePerByte"}


# --- words, files, errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "stored", "words"),
    [
        (AccuracyConstraint(0.1), {"kind": "accuracy", "epsilon": 0.1}, "a rate of at least 0.9 of"),
        (Weighted(0.25), {"kind": "weighted", "lam": 0.25}, "0.25 x cost minus rate"),
        (MemoryLimit("24GiB"), {"kind": "memory", "limit_bytes": 24 * 2**30}, "horizon within 24.0 GiB"),
    ],
)
def test_objectives_survive_json_and_are_described(objective, stored, words):
    assert objective.to_dict() == stored
    assert objectives.from_dict(json.loads(json.dumps(stored))) == objective
    assert words in objective.describe()


def test_a_memory_limit_is_kept_in_bytes():
    assert MemoryLimit("1GiB") == MemoryLimit(2**30)
    assert MemoryLimit("1GiB").limit == MemoryLimit("1GiB").limit_bytes == 2**30


@pytest.mark.parametrize("data", [{"kind": "custom", "name": "RatePerByte"}, {}])
def test_an_objective_without_code_cannot_be_read(data):
    with pytest.raises(ValueError, match="is no stored objective; give 'accuracy'"):
        objectives.from_dict(data)


@pytest.mark.parametrize("number", [-0.1, math.nan, math.inf, True, "0.1", None])
def test_parameters_out_of_range_are_refused(number):
    with pytest.raises(ValueError, match=rf"epsilon={number!r} is out of range; give a number in \[0, 1\)"):
        AccuracyConstraint(number)
    with pytest.raises(ValueError, match=rf"lam={number!r} is out of range; give a number in \[0, inf\)"):
        Weighted(number)
    with pytest.raises(ValueError, match=rf"limit={number!r} is not a size"):
        MemoryLimit(number)


def test_an_epsilon_of_one_and_a_limit_of_zero_ask_for_nothing():
    with pytest.raises(ValueError, match="epsilon=1 is out of range"):
        AccuracyConstraint(1)
    with pytest.raises(ValueError, match="limit=0 is not a size"):
        MemoryLimit(0)


def test_an_empty_table_is_refused():
    with pytest.raises(ValueError, match=r"rows=\(\) leaves nothing"):
        select([], AccuracyConstraint())
    with pytest.raises(ValueError, match="references only"):
        select([replace(TIED, reference=True)], AccuracyConstraint())


@pytest.mark.parametrize("price", [math.nan, math.inf])
def test_a_cost_that_is_no_price_is_refused(price):
    with pytest.raises(ValueError, match=f"cost returned {price} for 300 bytes"):
        select([TIED], Weighted(), lambda memory_bytes: price)


# --- rows -------------------------------------------------------------------------------------------------------------


@given(row=rows())
def test_rows_survive_json(row):
    assert Row.from_dict(json.loads(json.dumps(row.to_dict(), allow_nan=False))) == row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cosine": 1.01}, r"cosine=1.01 is not in \[-1, 1\]; clip"),
        ({"cosine": math.nan}, "cosine=nan"),
        ({"rate": math.nan}, "rate=nan is not finite; give None"),
        ({"rate": -math.inf}, "rate=-inf is not finite"),
        ({"memory_bytes": -1}, "memory_bytes=-1 is negative"),
        ({"stride": 0}, "stride=0, horizon=4: give 1 <= stride <= horizon"),
        ({"stride": 5}, "stride=5, horizon=4"),
        ({"memory_source": "guessed"}, "memory_source='guessed' is no source; give one of measured, fitted"),
        ({"cosine_source": ""}, "cosine_source=''"),
        ({"rate_source": None}, "rate_source=None"),
        ({"step_seconds_source": "Measured"}, "step_seconds_source='Measured'"),
    ],
)
def test_rows_refuse_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TIED, **change)


def test_a_negative_cosine_and_rate_are_possible():
    assert Row(horizon=1, memory_bytes=1, cosine=-1.0, rate=-0.3).rate == -0.3
