"""Any list of windows becomes operations that find what they need, leave nothing, and cost what the formulas say."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import schedules

from horizonplan.schedule import Drop, Loss, Pull, Rerun, Run, Schedule, Window, count_units


def simulate(schedule, stem_trains=False, trainable=None):
    """Execute operations on nothing but names; returns (gradients taken, most graphs alive, times each block ran).

    A gradient is ``(block, loss)``: block -1 is the stem. Every read is checked against what is there.
    """
    states, graphs, cotangents = {0}, set(), {}
    taken, ran, most, order = Counter(), Counter(), 0, []
    ops = list(schedule.ops(stem_trains, trainable))
    for place, op in enumerate(ops):
        following = next((later for later in ops[place + 1 :] if not isinstance(later, Drop)), None)
        if isinstance(op, Run):
            assert op.t in states
            assert not cotangents, "a cotangent outlives its window"
            states.add(op.t + 1)
            graphs |= {op.t} if op.graph else set()
            order.append(op.t)
        elif isinstance(op, Rerun):
            assert op.t in states or op.t - 1 in graphs, f"{op} finds no input"
            assert op.t not in graphs, f"{op} rebuilds a graph that is alive"
            graphs.add(op.t)
            ran[op.t] += 1
        elif isinstance(op, Loss):
            assert op.end in states
            assert not cotangents
            assert op.final == (op.end == schedule.depth)
            cotangents |= {op.end: op.end} if isinstance(following, Pull | Rerun) else {}
        elif isinstance(op, Pull):
            end = cotangents.pop(op.t + 1)
            assert op.t in graphs, f"{op} finds no graph"
            assert op.weights or op.input, f"{op} does nothing"
            taken[op.t, end] += op.weights
            taken[-1, end] += op.input and op.t == 0
            cotangents |= {op.t: end} if op.input and op.t > 0 else {}
            if not op.keep:
                graphs.remove(op.t)
        elif isinstance(op, Drop):
            assert op.state not in graphs, f"{op} is the input of a living graph"
            states.remove(op.state)
        most = max(most, len(graphs))
    assert order == list(range(schedule.depth)), "each block runs once, in order"
    assert not graphs
    assert not states
    assert not cotangents
    return +taken, most, ran


def defined(schedule, stem_trains=False, trainable=None):
    """The gradients that the windows define."""
    trains = trainable or (True,) * schedule.depth
    taken = Counter((t, w.end) for w in schedule.windows for t in range(w.first, w.stop) if trains[t])
    return taken + Counter((-1, w.end) for w in schedule.windows if w.first == 0 and stem_trains)


@given(schedule=schedules(), stem_trains=st.booleans())
def test_operations_take_the_gradients_that_the_windows_define(schedule, stem_trains):
    taken, most, ran = simulate(schedule, stem_trains)
    assert taken == defined(schedule, stem_trains)
    longest = max(w.end - w.first for w in schedule.windows)
    if schedule.recompute:
        assert most <= min(longest, schedule.recompute)
        assert ran == Counter(t for w in schedule.windows for t in range(w.first, w.end))
    else:
        assert most == longest
        assert not ran


@given(schedule=schedules(), stem_trains=st.booleans(), data=st.data())
def test_frozen_blocks_are_neither_trained_nor_pulled_below_the_lowest_trainable_one(schedule, stem_trains, data):
    trainable = tuple(data.draw(st.lists(st.booleans(), min_size=schedule.depth, max_size=schedule.depth)))
    taken, _, _ = simulate(schedule, stem_trains, trainable)
    assert taken == defined(schedule, stem_trains, trainable)
    assert count_units(schedule.ops(stem_trains, trainable)) <= schedule.units(stem_trains)


@given(schedule=schedules())
def test_frozen_through_and_through_costs_forwards_and_the_terminal_loss_only(schedule):
    ops = [op for op in schedule.ops(False, (False,) * schedule.depth) if not isinstance(op, Drop)]
    assert ops == [*(Run(t, graph=False) for t in range(schedule.depth)), Loss(schedule.depth, final=True)]


@given(schedule=schedules(max_depth=6))
def test_states_are_kept_only_while_something_reads_them(schedule):
    ops = list(schedule.ops())
    alive, graphs, current = {0}, set(), 0
    for place, op in enumerate(ops):
        if isinstance(op, Run):
            current = op.t + 1
            alive.add(current)
            graphs |= {op.t} if op.graph else set()
        elif isinstance(op, Rerun):
            graphs.add(op.t)
        elif isinstance(op, Pull) and not op.keep:
            graphs.discard(op.t)
        elif isinstance(op, Drop):
            alive.discard(op.state)
        if place + 1 < len(ops) and isinstance(ops[place + 1], Run):
            read = {later.t for later in ops[place:] if isinstance(later, Rerun)}
            assert alive <= graphs | read | {current}


@given(schedule=schedules(), stem_trains=st.booleans())
def test_units_count_forwards_and_pulls(schedule, stem_trains):
    taken, _, ran = simulate(schedule, stem_trains)
    weights = sum(n for (t, _), n in taken.items() if t >= 0)
    inputs = sum(w.end - w.first - (w.first > 0 or not stem_trains) for w in schedule.windows)
    assert schedule.units(stem_trains) == schedule.depth + ran.total() + weights + inputs


@given(depth=st.integers(1, 40), data=st.data())
def test_stride_one_costs_the_paper_s_family(depth, data):
    h = data.draw(st.integers(1, depth))
    assert Schedule.horizon(depth, h).units() == 2 * depth + (depth - h + 1) * (h - 1)


@given(parts=st.integers(1, 10), h=st.integers(1, 10))
def test_disjoint_windows_cost_less_than_back_propagation(parts, h):
    depth = parts * h
    assert Schedule.horizon(depth, h, h).units() == 3 * depth - depth // h
    assert Schedule.horizon(depth, h, h).windows == Schedule.local(depth, parts).windows


@given(s=st.integers(1, 6), extra=st.integers(0, 6), steps=st.integers(0, 6))
def test_any_stride_costs_the_general_formula(s, extra, steps):
    h = s + extra
    depth = h + steps * s
    assert Schedule.horizon(depth, h, s).units() == 2 * depth + (steps + 1) * (h - 1)


@pytest.mark.parametrize(
    ("h", "s", "recompute", "units"), [(12, 1, 0, 35), (12, 1, 1, 47), (12, 1, 3, 47), (6, 6, 1, 46), (6, 1, 1, 101)]
)
def test_units_at_depth_twelve_are_the_documented_ones(h, s, recompute, units):
    assert Schedule.horizon(12, h, s, recompute).units() == units


@pytest.mark.parametrize("depth", range(1, 9))
def test_horizon_is_the_definition_for_every_h_and_s(depth):
    for h in range(1, depth + 1):
        for s in range(1, h + 1):
            schedule = Schedule.horizon(depth, h, s)
            ends = {t: w.end for w in schedule.windows for t in range(w.first, w.stop)}
            assert ends == {t: min(s * (t // s) + h, depth) for t in range(depth)}


@given(depth=st.integers(1, 20), data=st.data())
def test_loco_looks_one_stage_ahead_and_summed_adds_its_own_loss(depth, data):
    stages = data.draw(st.integers(1, depth))
    ends = sorted({w.end for w in Schedule.local(depth, stages).windows})
    sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    own = {t: next(i for i, end in enumerate(ends) if t < end) for t in range(depth)}
    split, summed = Schedule.loco(depth, stages), Schedule.loco(depth, stages, summed=True)
    ahead = Counter((t, ends[min(i + 1, stages - 1)]) for t, i in own.items())
    assert simulate(split)[0] == ahead
    both = Counter((t, end) for t, i in own.items() for end in {ends[i], ends[min(i + 1, stages - 1)]})
    assert simulate(summed)[0] == both


@given(schedule=schedules())
def test_a_schedule_survives_its_own_dictionary(schedule):
    assert Schedule.from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"depth": 4, "horizon": 0}, ["horizon=0", "between 1 and 4"]),
        ({"depth": 4, "horizon": 5}, ["horizon=5", "between 1 and 4"]),
        ({"depth": 4, "horizon": 2, "stride": 3}, ["stride=3", "between 1 and 2"]),
        ({"depth": 4, "horizon": 2, "stride": 0}, ["stride=0", "between 1 and 2"]),
        ({"depth": 4, "horizon": 2.0}, ["horizon=2.0", "whole number"]),
        ({"depth": 4, "horizon": True}, ["horizon=True", "whole number"]),
        ({"depth": 0, "horizon": 1}, ["depth=0", ">= 1"]),
        ({"depth": 4, "horizon": 2, "recompute": -1}, ["recompute=-1", ">= 0"]),
    ],
)
def test_a_horizon_out_of_range_is_refused_by_name_and_value(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        Schedule.horizon(**arguments)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        ([Window(0, 2, 2)], ["exactly one window", "depth=3"]),
        ([Window(0, 1, 3), Window(1, 3, 3)], ["exactly one window", "depth=3"]),
        ([Window(0, 1, 2), Window(0, 1, 1), Window(1, 3, 3)], ["windows[1]", "ends may not decrease"]),
        ([Window(0, 1, 1), Window(2, 3, 3)], ["[1]", "updated by no window"]),
        ([Window(0, 0, 3)], ["windows[0]", "first < stop"]),
        ([Window(0, 4, 4)], ["windows[0]", "depth=3"]),
        ([Window(-1, 3, 3)], ["windows[0]", "0 <= first"]),
        ([Window(0, 3, 2)], ["windows[0]", "stop <= end"]),
        ([], ["exactly one window"]),
    ],
)
def test_windows_that_break_a_rule_are_refused_by_place(windows, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        Schedule(3, tuple(windows))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("parts", "name"), [(0, "parts=0"), (5, "parts=5")])
def test_more_parts_than_blocks_are_refused(parts, name):
    with pytest.raises(ValueError, match=name):
        Schedule.local(4, parts)
    with pytest.raises(ValueError, match=name.replace("parts", "stages")):
        Schedule.loco(4, parts)
