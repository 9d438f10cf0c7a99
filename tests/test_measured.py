"""Plans of measurements made elsewhere. Oracles: the paper's algorithm in NumPy, and the library's parts."""

import json
import math
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import horizonplan as hp
from horizonplan.measured import (
    ANEW,
    Card,
    MeasurementError,
    Strided,
    measurements_of,
    plan_from_measurements,
    replan,
    replan_for_cards,
)

GIB = 2**30
POINTS = (12, [1, 4, 8, 12], [3 * GIB, 6 * GIB, 10 * GIB, 14 * GIB], [0.3, 0.8, 0.97, 1.0])


def quiet(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hp.PoorFitWarning)
        return plan_from_measurements(*args, **kwargs)


@st.composite
def measurements(draw):
    """Any that are allowed."""
    depth = draw(st.integers(2, 40))
    horizons = draw(st.lists(st.integers(1, depth), min_size=2, max_size=8, unique=True))
    memory = [draw(st.integers(1, 2**50)) for _ in horizons]
    cosine = [draw(st.floats(-1, 1)) for _ in horizons]
    return depth, horizons, memory, cosine


def brute_force(depth, horizons, memory, cosine, epsilon):
    """Algorithm 1: the cheapest h whose squared cosine is large enough; None where there is none."""
    line = np.polyfit(horizons, memory, 1)
    order = min(3, len(set(horizons) - {depth}))
    powers = np.stack([(np.array(horizons) / depth - 1) ** k for k in range(1, order + 1)], 1)
    inner = np.linalg.lstsq(powers, np.array(cosine) - 1, rcond=None)[0]
    best = None
    for h in range(1, depth + 1):
        size, angle = max(1, round(np.polyval(line, h))), 1.0
        if h < depth:
            angle = np.clip(1 + sum(c * (h / depth - 1) ** (k + 1) for k, c in enumerate(inner)), -1, 1)
        if h in horizons:
            size = memory[horizons.index(h)]
            angle = cosine[horizons.index(h)] if h < depth else 1.0
        if abs(angle**2 - (1 - epsilon)) < 1e-6:
            return "too close"
        if angle**2 >= 1 - epsilon and (best is None or size < best[0]):
            best = size, h
    return best


@given(measurements(), st.floats(0, 0.99))
def test_it_is_the_paper_s_algorithm(points, epsilon):
    expected = brute_force(*points, epsilon)
    assume(expected != "too close")
    plan = quiet(*points, hp.AccuracyConstraint(epsilon))
    assert plan.row.memory_bytes == pytest.approx(expected[0], rel=1e-6, abs=2)
    assert plan.row.memory_bytes == min(row.memory_bytes for row in plan.rows if row.feasible)


@given(measurements())
def test_measurements_stand_in_the_table_as_they_are(points):
    depth, horizons, memory, cosine = points
    rows = {row.horizon: row for row in quiet(*points, hp.Weighted(0.1)).rows}
    assert list(rows) == list(range(1, depth + 1))
    for h, size, angle in zip(horizons, memory, cosine, strict=True):
        assert (rows[h].memory_bytes, rows[h].memory_source) == (size, "measured")
        if h < depth:
            assert (rows[h].cosine, rows[h].cosine_source) == (angle, "measured")
            assert (rows[h].rate, rows[h].rate_source) == (angle**2, "derived")
    assert (rows[depth].cosine, rows[depth].rate, rows[depth].cosine_source) == (1.0, 1.0, "derived")
    assert {rows[h].memory_source for h in rows.keys() - set(horizons)} <= {"fitted"}
    assert {rows[h].cosine_source for h in rows.keys() - {*horizons, depth}} <= {"fitted"}


@given(measurements())
def test_it_survives_a_file(points):
    plan = quiet(*points, hp.Weighted(0.1))
    text = json.dumps(plan.to_dict(), allow_nan=False)
    assert hp.Plan.from_dict(json.loads(text)) == plan
    assert "Made from measurements that were given" in plan.explain()


@given(measurements(), st.floats(0, 5), st.sampled_from([hp.LinearCost, hp.LadderCost]))
def test_judged_anew_is_judged_at_once(points, lam, kind):
    cost = kind(2.0, GIB)
    first = quiet(*points, hp.Weighted(0.1))
    again = replan(first, hp.Weighted(lam), cost)
    at_once = quiet(*points, hp.Weighted(lam), cost)
    assert (again.row, again.rows, again.cost) == (at_once.row, at_once.rows, at_once.cost)
    assert replan(again, first.objective, first.cost).rows == first.rows


def test_a_node_left_open_is_back_propagation_s_memory():
    plan = plan_from_measurements(*POINTS, cost=hp.LinearCost(5.0))
    assert plan.cost.node_memory_bytes == 14 * GIB
    assert plan.rows[-1].cost == 5.0
    assert replan(plan, cost=hp.LadderCost(5.0)).cost.node_memory_bytes == 14 * GIB


def test_judging_anew_keeps_what_is_not_given():
    plan = plan_from_measurements(*POINTS, hp.AccuracyConstraint(0.3), hp.LadderCost(2.0, GIB))
    same = replan(plan)
    assert (same.rows, same.objective, same.cost) == (plan.rows, plan.objective, plan.cost)
    assert same.notes == (ANEW, *plan.notes)
    assert replan(same).notes == same.notes


def test_what_nothing_meets_names_the_nearest():
    plan = plan_from_measurements(*POINTS)
    with pytest.raises(hp.InfeasibleError) as error:
        replan(plan, hp.MemoryLimit(GIB))
    assert error.value.nearest.horizon == 1


def test_unequal_blocks_lead_the_memory_between():
    sizes = [8, 1, 1, 1, 1, 1, 1, 1]

    def true(h):
        return 100 + max(sum(sizes[t : t + h]) for t in range(len(sizes) - h + 1))

    asked = (8, [1, 4, 8], [true(1), true(4), true(8)], [0.5, 0.9, 1.0], hp.Weighted(0.1))
    rows = quiet(*asked, block_bytes=sizes).rows
    assert [row.memory_bytes for row in rows] == pytest.approx([true(h) for h in range(1, 9)], abs=1)
    last = [1, 1, 1, 1, 1, 1, 1, 8]
    assert [row.memory_bytes for row in quiet(*asked, block_bytes=last).rows] == [row.memory_bytes for row in rows]


def test_equal_blocks_are_the_paper_s_line():
    plain = quiet(*POINTS)
    blocks = quiet(*POINTS, block_bytes=[GIB] * 12)
    assert [r.memory_bytes for r in blocks.rows] == pytest.approx([r.memory_bytes for r in plain.rows], abs=1)


def test_rates_of_short_runs_come_before_the_cosine():
    plan = plan_from_measurements(*POINTS, rates=[None, 0.95, None, None])
    row = plan.rows[3]
    assert (row.rate, row.rate_source) == (0.95, "measured")
    assert plan.horizon == 4
    assert plan_from_measurements(*POINTS).horizon > 4


def test_times_are_shown_where_they_were_measured():
    plan = plan_from_measurements(*POINTS, step_seconds=[0.1, None, 0.3, 0.2])
    assert [row.step_seconds for row in plan.rows if row.step_seconds] == [0.1, 0.3, 0.2]
    assert {row.step_seconds_source for row in plan.rows} == {"measured", "unmeasured"}


def test_strides_are_chosen_by_rates_of_short_runs_only():
    cosine_only = [Strided(4, 4, 5 * GIB, cosine=0.999)]
    asked = (*POINTS, hp.AccuracyConstraint(0.1))
    rates = [None, 0.95, None, None]
    plan = plan_from_measurements(*asked, rates=rates, strided=cosine_only)
    assert (plan.horizon, plan.stride) == (4, 1)
    assert plan.rows[-1].rate is None
    assert any("never chosen" in note for note in plan.notes)
    run = [Strided(4, 4, 5 * GIB, cosine=0.7, rate=0.96)]
    plan = plan_from_measurements(*asked, rates=rates, strided=run)
    assert (plan.horizon, plan.stride, plan.row.memory_bytes) == (4, 4, 5 * GIB)


def test_cards_are_bought_whole_and_the_cheapest_will_do():
    plan = plan_from_measurements(*POINTS)
    small, large = Card("small", 6 * GIB, 1.0), Card("large", 80 * GIB, 3.5)
    best, card = replan_for_cards(plan, [small, large])
    assert card == small
    assert best.row.cost == math.ceil(best.row.memory_bytes / small.memory_bytes) * small.price
    dear = Card("small", 6 * GIB, 2.0)
    best, card = replan_for_cards(plan, [dear, large])
    assert (card, best.row.cost) == (large, 3.5)
    assert "small" in best.notes[0]
    assert "large is taken" in best.notes[0]
    with pytest.raises(hp.InfeasibleError):
        replan_for_cards(plan, [small, large], hp.MemoryLimit(1))


@pytest.mark.parametrize(
    ("points", "word"),
    [((12, [1, 12], [1000, 2000], [0.5, 1.0]), "order 1"), ((12, *[POINTS[1], [1, 9, 1, 9], POINTS[3]]), "poorly")],
)
def test_what_to_distrust_is_warned_of_and_noted(points, word):
    with pytest.warns(hp.PoorFitWarning):
        plan = plan_from_measurements(*points, hp.Weighted(0.1))
    assert any(word in note for note in plan.notes)


@given(measurements())
def test_what_was_measured_is_read_back(points):
    h = min(max(2, points[0] // 2), points[0] - 1)
    strided = [Strided(h, 2, 77, 0.5, 0.6, 0.7), Strided(h, h, 78)][: 0 if h < 2 else 1 if h == 2 else 2]
    more = {"rates": [0.5 if t < points[0] else None for t in sorted(points[1])], "strided": strided}
    depth, *lists = points
    points = depth, *zip(*sorted(zip(*lists, strict=True)), strict=True)  # by horizon
    plan = quiet(*points, hp.Weighted(0.1), **more)
    found = measurements_of(plan)
    again = quiet(**found, objective=plan.objective)
    assert (again.row, again.rows) == (plan.row, plan.rows)
    assert list(points[1]) == found["horizons"]


def with_(**changes):
    return dict(zip(("depth", "horizons", "memory_bytes", "cosine"), POINTS, strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"depth": 1}, "depth"),
        ({"depth": True}, "depth"),
        ({"depth": 12.0}, "depth"),
        ({"depth": 10**30}, "depth"),
        ({"horizons": [1, 4, 8, 13]}, "horizons[3]"),
        ({"horizons": [1, 4, True, 12]}, "horizons[2]"),
        ({"horizons": [1, 4, 4, 12]}, "horizons[2]"),
        ({"horizons": [1]}, "horizons"),
        ({"horizons": [1, 4, 8]}, "memory_bytes"),
        ({"memory_bytes": [1, 2, 3, -1]}, "memory_bytes[3]"),
        ({"memory_bytes": [1, 2, math.nan, 4]}, "memory_bytes[2]"),
        ({"memory_bytes": [1, 2, 10**40, 4]}, "memory_bytes[2]"),
        ({"memory_bytes": [1, None, 3, 4]}, "memory_bytes[1]"),
        ({"cosine": [0.1, 0.2, 0.3]}, "cosine"),
        ({"cosine": [0.1, 1.0001, 0.3, 1]}, "cosine[1]"),
        ({"cosine": [0.1, math.inf, 0.3, 1]}, "cosine[1]"),
        ({"rates": [1.0]}, "rates"),
        ({"rates": [None, math.nan, None, None]}, "rates[1]"),
        ({"step_seconds": [None, -1.0, None, None]}, "step_seconds[1]"),
        ({"block_bytes": [1]}, "block_bytes"),
        ({"block_bytes": [1] * 11 + [0]}, "block_bytes[11]"),
        ({"strided": [Strided(12, 2, 5)]}, "strided[0].horizon"),
        ({"strided": [Strided(4, 5, 5)]}, "strided[0].stride"),
        ({"strided": [Strided(4, 2, 0)]}, "strided[0].memory_bytes"),
        ({"strided": [Strided(4, 2, 5, cosine=2.0)]}, "strided[0].cosine"),
        ({"strided": [Strided(4, 2, 5), Strided(4, 2, 6)]}, "strided[1]"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_with_its_name(changes, field):
    with pytest.raises(MeasurementError) as error:
        plan_from_measurements(**with_(**changes))
    assert error.value.field == field
    assert str(error.value).startswith(f"{field}: ")
    again = pickle.loads(pickle.dumps(error.value))
    assert (again.field, str(again)) == (field, str(error.value))


@pytest.mark.parametrize(
    ("cards", "field"),
    [
        ([], "cards"),
        ([Card("a", 0, 1.0)], "cards[0].memory_bytes"),
        ([Card("a", 1, math.nan)], "cards[0].price"),
        ([Card("a", 1, 1.0), Card("a", 2, 1.0)], "cards[1].name"),
    ],
)
def test_cards_that_are_none_are_refused(cards, field):
    with pytest.raises(MeasurementError) as error:
        replan_for_cards(plan_from_measurements(*POINTS), cards)
    assert error.value.field == field


def test_a_reference_does_not_make_an_objective_feasible():
    plan = plan_from_measurements(*POINTS)
    least = min(row.memory_bytes for row in plan.rows)
    checkpointed = replace(plan.rows[-1], recompute=1, memory_bytes=least - 1, reference=True)
    with pytest.raises(hp.InfeasibleError):
        replan(replace(plan, rows=(*plan.rows, checkpointed)), hp.MemoryLimit(least - 1))
