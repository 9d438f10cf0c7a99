"""Hypothesis strategies: schedules of every kind, valid by construction."""

from hypothesis import strategies as st

from horizonplan.schedule import Schedule, Window


@st.composite
def windowed(draw, max_depth=8, recompute=3, min_depth=1):
    """Any valid list of windows: nested, overlapping, with the same end, in order of their ends."""
    depth = draw(st.integers(min_depth, max_depth))
    ends = sorted(draw(st.lists(st.integers(1, depth - 1), max_size=5))) if depth > 1 else []
    windows = []
    for end in ends:
        first = draw(st.integers(0, end - 1))
        windows.append(Window(first, draw(st.integers(first + 1, end)), end))
    missing = set(range(depth)) - {t for w in windows for t in range(w.first, w.stop)}
    low, high = min(missing, default=depth - 1), max(missing, default=0)
    first = draw(st.integers(0, low))
    stop = draw(st.integers(max(high, first) + 1, depth))
    return Schedule(depth, (*windows, Window(first, stop, depth)), draw(st.integers(0, recompute)))


@st.composite
def horizons(draw, max_depth=12, recompute=3, min_depth=1):
    """The paper's family with strides: horizon(T, h, s)."""
    depth = draw(st.integers(min_depth, max_depth))
    horizon = draw(st.integers(1, depth))
    return Schedule.horizon(depth, horizon, draw(st.integers(1, horizon)), draw(st.integers(0, recompute)))


def schedules(max_depth=8, recompute=3, min_depth=1):
    """Any schedule at all."""
    return st.one_of(windowed(max_depth, recompute, min_depth), horizons(max_depth, recompute, min_depth))
