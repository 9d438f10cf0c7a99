"""The frontier is what brute force says it is, and what is recommended lies on it.

Oracle: the definition in words, over all pairs of rows.
"""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import horizonplan as hp
from horizonplan.choice import recommend
from horizonplan.cost import MixedNodes
from horizonplan.frontier import dominates, frontier
from horizonplan.objective import MoneyToLoss, TimeToLoss, evaluate, select
from horizonplan.savings import savings


@st.composite
def rows(draw):
    """A table with few distinct numbers, so that ties and unknown numbers all occur."""
    horizon = draw(st.integers(1, 6))
    source = draw(st.sampled_from(["measured", "derived"]))
    return hp.Row(
        horizon=horizon,
        stride=draw(st.sampled_from([1, horizon])),
        memory_bytes=100 * draw(st.integers(1, 5)),
        rate=draw(st.sampled_from([None, -0.5, 0.25, 0.5, 0.75, 1.0])),
        rate_source=source,
        cosine_source=draw(st.sampled_from(["measured", "derived"])),
        step_seconds=draw(st.sampled_from([None, 1.0, 2.0, 3.0])),
        flops=draw(st.sampled_from([None, 1, 2])),
        reference=draw(st.booleans()),
        fits=draw(st.sampled_from([None, None, True, False])),
    )


TABLES = st.lists(rows(), min_size=1, max_size=12)
OBJECTIVES = st.one_of(
    st.builds(hp.AccuracyConstraint, st.sampled_from([0.0, 0.25, 0.5])),
    st.builds(hp.Weighted, st.sampled_from([0.0, 0.5, 1.0])),
    st.builds(hp.MemoryLimit, st.sampled_from([100, 250, 400])),
    st.builds(TimeToLoss, st.sampled_from([1, 100]), st.sampled_from([None, 250])),
    st.builds(MoneyToLoss, st.sampled_from([1, 100]), st.sampled_from([None, 250])),
)
COSTS = st.sampled_from(
    [
        hp.LinearCost(1.0, 64),
        hp.LadderCost(1.0, 256),
        hp.LadderCost(3.0, 1000),
        MixedNodes([hp.Card("small", 150, 1.0), hp.Card("large", 400, 2.5)]),
    ]
)


def beaten(row, table):
    """The definition, written out: some complete row that fits is no worse in all three and better in one."""
    for other in table:
        if None in (row.rate, row.step_seconds, other.rate, other.step_seconds) or other.fits is False:
            continue
        only_derived = other.rate_source == "derived" and other.cosine_source != "derived"
        if only_derived and (row.rate_source == "measured" or row.cosine_source == "derived"):
            continue
        no_worse = (
            other.memory_bytes <= row.memory_bytes and other.step_seconds <= row.step_seconds and other.rate >= row.rate
        )
        better = other.memory_bytes < row.memory_bytes or other.step_seconds < row.step_seconds or other.rate > row.rate
        if no_worse and better:
            return True
    return False


def complete(row):
    return row.fits is not False and row.rate is not None and row.step_seconds is not None


@given(table=TABLES)
def test_the_frontier_is_what_no_row_beats(table):
    found = frontier(table)
    assert sorted(map(repr, found)) == sorted(repr(r) for r in table if complete(r) and not beaten(r, table))
    assert frontier(found) == found


@given(table=TABLES)
def test_dominance_is_a_strict_order_and_leads_to_the_frontier(table):
    for a in table:
        assert not dominates(a, a)
        for b in table:
            assert not (dominates(a, b) and dominates(b, a))
            assert all(dominates(a, c) for c in table if dominates(a, b) and dominates(b, c))
    edge = frontier(table)
    for row in filter(complete, table):
        assert row in edge or any(dominates(other, row) for other in edge)


@given(table=TABLES, objective=OBJECTIVES, cost=COSTS)
def test_no_dominated_plan_is_recommended(table, objective, cost):
    judged = evaluate(table, objective, cost)
    candidates = [row for row in judged if not row.reference]
    assume(any(row.feasible for row in candidates))
    chosen = recommend(table, objective, cost)
    assert chosen in candidates
    assert chosen.feasible
    assert not any(dominates(row, chosen) for row in candidates if row.feasible)
    if complete(chosen):
        assert chosen in frontier([row for row in candidates if row.feasible])
    best = select(preferred(judged), objective, cost)
    if not isinstance(objective, hp.MemoryLimit):  # all others only grow with memory and time, and fall with the rate
        assert chosen.objective == best.objective
        assert not any(dominates(row, chosen) for row in candidates if row.fits is not False)


def preferred(judged):
    """Rows whose rate is known, if one of them may be chosen."""
    known = [row for row in judged if row.rate is not None]
    return known if any(row.feasible and not row.reference for row in known) else judged


@given(table=TABLES, objective=OBJECTIVES, cost=COSTS)
def test_what_is_not_dominated_is_select_s_choice(table, objective, cost):
    judged = evaluate(table, objective, cost)
    assume(any(row.feasible and not row.reference for row in judged))
    best = select(preferred(judged), objective, cost)
    if not any(dominates(row, best) for row in preferred(judged) if row.feasible and not row.reference):
        assert recommend(table, objective, cost) == best


def test_whole_nodes_tie_and_the_dominated_row_of_fewer_flops_is_passed_over():
    cost = hp.LadderCost(1.0, 1000)
    slow = hp.Row(horizon=2, memory_bytes=900, rate=0.9, step_seconds=3.0, flops=1)
    better = hp.Row(horizon=3, memory_bytes=800, rate=0.95, step_seconds=2.0, flops=2)
    objective = hp.AccuracyConstraint(0.2)
    assert hp.select([slow, better], objective, cost).horizon == 2  # fewer FLOPs: the contract's rule for ties
    assert recommend([slow, better], objective, cost).horizon == 3


def test_a_derived_rate_does_not_overrule_a_measured_one():
    row = hp.Row(horizon=3, memory_bytes=100, rate=0.7, rate_source="measured", step_seconds=1.0)
    model = replace(row, horizon=2, memory_bytes=90, rate=0.9, rate_source="derived")
    exact = replace(model, horizon=4, rate=1.0, cosine=1.0, cosine_source="derived")
    assert frontier([row, model]) == (model, row)
    assert frontier([row, replace(model, rate_source="measured")]) == (replace(model, rate_source="measured"),)
    assert frontier([row, exact]) == (exact,)


# --- time and money to a loss -----------------------------------------------------------------------------------------


@given(table=TABLES, steps=st.sampled_from([0.5, 3, 1000]), cost=COSTS)
def test_time_and_money_are_brute_force_over_steps_seconds_and_price(table, steps, cost):
    known = [row for row in table if complete(row) and row.rate > 0]
    for objective, price in ((TimeToLoss(steps), lambda m: 1.0), (MoneyToLoss(steps), lambda m: cost(m) / 3600)):
        judged = evaluate(table, objective, cost)
        values = [price(r.memory_bytes) * steps * r.step_seconds / r.rate for r in known]
        assert [row.objective for row in judged if row.feasible] == pytest.approx(values)
        candidates = [row for row in judged if row.feasible and not row.reference]
        if candidates:
            assert hp.select(table, objective, cost).objective == min(row.objective for row in candidates)


def test_a_limit_keeps_out_what_needs_more():
    table = [hp.Row(horizon=h, memory_bytes=100 * h, rate=h / 4, step_seconds=1.0) for h in (1, 2, 3, 4)]
    assert hp.select(table, TimeToLoss()).horizon == 4
    assert hp.select(table, TimeToLoss(limit=250)).horizon == 2
    assert hp.select([replace(r, device_bytes=r.memory_bytes + 60) for r in table], TimeToLoss(limit=250)).horizon == 1
    with pytest.raises(hp.InfeasibleError, match="within 50 B"):
        hp.select(table, MoneyToLoss(limit=50))


@pytest.mark.parametrize("steps", [0, -1, math.inf, math.nan, True, "10"])
@pytest.mark.parametrize("kind", [TimeToLoss, MoneyToLoss])
def test_steps_are_a_positive_number(kind, steps):
    with pytest.raises(ValueError, match="steps="):
        kind(steps)


@pytest.mark.parametrize("objective", [TimeToLoss(10), MoneyToLoss(7.5, "1GiB"), TimeToLoss(limit=5)])
def test_stored_objectives_come_back(objective):
    from horizonplan.objective import from_dict

    assert from_dict(objective.to_dict()) == objective


def test_an_objective_of_a_user_s_own_sees_what_it_always_saw():
    class Own(hp.Objective):
        def value(self, rate, cost, memory_bytes, horizon):
            return memory_bytes + horizon

        def shortfall(self, rate, cost, memory_bytes, horizon):
            return 0.0

    table = [hp.Row(horizon=h, memory_bytes=100 - h, step_seconds=1.0) for h in (1, 2, 3)]
    assert [row.objective for row in evaluate(table, Own())] == [100, 100, 100]
    assert hp.select(table, Own()).horizon == 1


# --- fewer nodes ------------------------------------------------------------------------------------------------------


@given(table=TABLES, cost=COSTS)
def test_savings_are_the_best_rate_that_less_money_allows(table, cost):
    chosen = max(table, key=lambda row: row.memory_bytes)
    found = savings(table, chosen, cost)
    if isinstance(cost, hp.LinearCost):
        assert found == ()
        return
    able = [row for row in table if row.rate is not None and row.fits is not False]
    cheaper = sorted({cost(row.memory_bytes) for row in able if cost(row.memory_bytes) < cost(chosen.memory_bytes)})
    wanted, best = [], None
    for price in cheaper:  # a price is worth telling if it buys a better rate than less money does
        rate = max(row.rate for row in able if cost(row.memory_bytes) <= price)
        if best is None or rate > best:
            wanted, best = [(price, rate), *wanted], rate
    assert [(cost(saving.row.memory_bytes), saving.row.rate) for saving in found] == wanted
    for saving in found:
        assert saving.cost == cost(chosen.memory_bytes) - cost(saving.row.memory_bytes)
        if isinstance(cost, hp.LadderCost):
            assert saving.nodes < saving.instead_of
            assert (saving.nodes - 1) * cost.node_memory_bytes < saving.row.memory_bytes
            assert saving.row.memory_bytes <= saving.nodes * cost.node_memory_bytes
