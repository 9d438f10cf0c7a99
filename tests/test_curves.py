"""The fits are numpy's where the paper is meant, pinned where the cosine is known, and honest about their error."""

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from horizonplan.curves import Curve, PoorFitWarning, fit_cosine, fit_memory

DEPTH = 12
COSINES = st.floats(-1, 1)


def theorem(h, depth=DEPTH, c=0.6):
    """A cubic cosine that is 1 at the depth, of the shape Theorem 3.4 suggests."""
    return 1 - c * (1 - np.asarray(h) / depth) ** 3


@st.composite
def measurements(draw, smallest=4, depth=DEPTH):
    """A depth, at least four distinct horizons, one to three batches at each."""
    distinct = draw(st.lists(st.integers(1, depth), min_size=smallest, max_size=depth, unique=True))
    horizons = [h for h in distinct for _ in range(draw(st.integers(1, 3)))]
    return horizons, draw(st.lists(COSINES, min_size=len(horizons), max_size=len(horizons)))


def quietly(fit, *args, **kwargs):
    """A fit of arbitrary data, which may warn that it is poor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoorFitWarning)
        return fit(*args, **kwargs)


# --- the paper's fits -------------------------------------------------------------------------------------------------


@given(a=st.integers(0, 2**35), b=st.integers(0, 2**35), h=st.lists(st.integers(1, 100), min_size=2, unique=True))
def test_memory_recovers_a_straight_line(a, b, h):
    curve = fit_memory(h, [a * t + b for t in h])
    assert curve.coefficients == pytest.approx((a, b), rel=1e-6, abs=1e-6 * (100 * a + b) + 1e-9)
    assert curve.residual <= 1e-9 * (100 * a + b) + 1e-9
    assert not curve.poor


def test_memory_is_numpys_polyfit_of_order_one():
    h, memory = [1, 3, 7, 12], [10.0, 33.0, 68.0, 121.0]
    assert fit_memory(h, bytes=memory).coefficients == tuple(np.polyfit(h, memory, 1))


@given(data=measurements())
def test_unpinned_cosine_is_numpys_polyfit_of_order_three_exactly(data):
    h, cos = data
    curve = quietly(fit_cosine, h, cos, DEPTH, pinned=False)
    expected = np.polyfit(h, cos, 3)
    assert curve.coefficients == tuple(expected)
    assert curve(range(1, DEPTH + 1)).tolist() == np.polyval(expected, np.arange(1, DEPTH + 1)).tolist()


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("depth", [12, 48, 200])
def test_cosine_recovers_a_cubic(depth, pinned):
    h = [1, depth // 4, depth // 2, 3 * depth // 4, depth - 1]
    curve = fit_cosine(h, theorem(h, depth), depth, pinned)
    everywhere = np.arange(1, depth + 1)
    assert curve(everywhere) == pytest.approx(theorem(everywhere, depth), abs=1e-9)
    assert curve.coefficients == pytest.approx((0.6 / depth**3, -1.8 / depth**2, 1.8 / depth, 0.4), rel=1e-5)
    assert curve.residual < 1e-9
    assert not curve.poor


# --- the pin ----------------------------------------------------------------------------------------------------------


@given(data=measurements())
def test_pinned_cosine_is_one_at_the_depth_and_a_cosine_everywhere(data):
    curve = quietly(fit_cosine, *data, DEPTH)
    values = curve(np.arange(1, DEPTH + 1))
    assert curve(DEPTH) == values[-1] == 1.0
    assert np.all(np.abs(values) <= 1)
    assert np.polyval(curve.coefficients, DEPTH) == pytest.approx(1.0, abs=1e-6)


@given(data=measurements())
def test_pinned_cosine_is_the_best_cubic_through_the_pin(data):
    """Against a slow reference: the equality-constrained least squares solved by its Lagrange system."""
    h, cos = data
    assume(len(set(h) - {DEPTH}) >= 3)
    x = np.array(h) / DEPTH
    powers = x[:, None] ** np.arange(3, -1, -1)
    system = np.block([[powers.T @ powers, np.ones((4, 1))], [np.ones((1, 4)), np.zeros((1, 1))]])
    reference = np.linalg.solve(system, np.append(powers.T @ np.array(cos), 1.0))[:4]
    curve = quietly(fit_cosine, h, cos, DEPTH)
    scaled = np.array(curve.coefficients) * float(DEPTH) ** np.arange(3, -1, -1)
    assert scaled == pytest.approx(reference, rel=1e-5, abs=1e-5 * np.abs(reference).max())


def test_measuring_the_depth_itself_changes_nothing():
    h, cos = [1, 4, 8, 10], [0.31, 0.72, 0.94, 0.99]
    without, with_depth = fit_cosine(h, cos, DEPTH), fit_cosine([*h, DEPTH], [*cos, 1.0], DEPTH)
    assert with_depth.coefficients == pytest.approx(without.coefficients, rel=1e-9)
    assert with_depth.interval(6) == pytest.approx(without.interval(6), rel=1e-9)


def test_values_are_clipped_only_when_pinned():
    h, cos = [1, 2, 10, 11, 12], [-0.99, 0.2, 0.99, 0.985, 1.0]
    pinned, bare = quietly(fit_cosine, h, cos, DEPTH), quietly(fit_cosine, h, cos, DEPTH, pinned=False)
    assert pinned(6) == 1.0 < np.polyval(pinned.coefficients, 6)
    assert bare(6) == np.polyval(bare.coefficients, 6) > 1.0


# --- a curve ----------------------------------------------------------------------------------------------------------


def test_a_curve_maps_numbers_to_floats_and_arrays_to_arrays():
    curve = fit_memory([1, 2], [10, 20])
    assert type(curve(3)) is type(curve(3.0)) is type(curve(np.int64(3))) is float
    assert curve([1, 2]).tolist() == pytest.approx([10.0, 20.0])
    assert curve(np.ones((2, 3))).shape == (2, 3)


def test_residual_is_the_root_mean_square_over_every_batch():
    curve = fit_memory([1, 1, 2, 2], [9.0, 11.0, 19.0, 21.0])
    assert curve([1, 2]).tolist() == pytest.approx([10.0, 20.0])
    assert curve.residual == pytest.approx(1.0)
    assert (curve.horizons, curve.values) == ((1, 1, 2, 2), (9.0, 11.0, 19.0, 21.0))


@pytest.mark.parametrize(
    "curve",
    [
        fit_memory([1, 4, 8], [1e9, 2e9, 3.2e9]),
        fit_cosine(np.array([1, 4, 8, 12]), np.array([0.3, 0.7, 0.95, 1.0]), DEPTH),
        fit_cosine([1, 4, 8, 12], [0.3, 0.7, 0.95, 1.0], DEPTH, pinned=False),
    ],
)
def test_curves_survive_json(curve):
    stored = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert Curve.from_dict(stored) == curve
    assert stored["residual"] == curve.residual
    assert stored["unit"] == curve.unit == ("bytes" if curve.quantity == "memory" else "1")


# --- intervals --------------------------------------------------------------------------------------------------------


def test_interval_is_the_textbook_one_for_a_line():
    h, y = np.array([1, 2, 4, 7, 11]), np.array([12.0, 19.0, 41.0, 69.0, 112.0])
    line = stats.linregress(h, y)
    s = np.sqrt(np.sum((y - line.intercept - line.slope * h) ** 2) / 3)
    half = stats.t(3).ppf(0.975) * s * np.sqrt(1 + 1 / 5 + (9 - h.mean()) ** 2 / np.sum((h - h.mean()) ** 2))
    centre = line.intercept + 9 * line.slope
    assert fit_memory(h, y).interval(9) == pytest.approx((centre - half, centre + half), rel=1e-9)


@pytest.mark.parametrize("pinned", [True, False])
def test_cosine_intervals_cover_95_percent_of_new_measurements(pinned):
    rng, h, hits = np.random.default_rng(0), np.array([1, 1, 3, 3, 5, 5, 7, 8, 8]), 0
    for _ in range(2000):
        curve = quietly(fit_cosine, h, theorem(h) + 0.003 * rng.standard_normal(len(h)), DEPTH, pinned)
        low, high = curve.interval(6)
        hits += low <= theorem(6) + 0.003 * rng.standard_normal() <= high
    assert 0.935 <= hits / 2000 <= 0.965


def test_memory_intervals_cover_95_percent_of_new_measurements():
    rng, h, hits = np.random.default_rng(1), np.array([1, 4, 8, 12]), 0
    for _ in range(2000):
        low, high = fit_memory(h, 100 * h + 900 + 5 * rng.standard_normal(4)).interval(15)
        hits += low <= 2400 + 5 * rng.standard_normal() <= high
    assert 0.935 <= hits / 2000 <= 0.965


@given(data=measurements(), h=st.integers(1, DEPTH), pinned=st.booleans())
def test_intervals_stay_within_cosines_and_hold_a_pinned_curve(data, h, pinned):
    curve = quietly(fit_cosine, *data, DEPTH, pinned)
    low, high = curve.interval(h)
    assert -1 <= low <= high <= 1
    if pinned:
        assert low <= curve(h) <= high


def test_without_degrees_of_freedom_the_interval_is_everything_possible():
    assert fit_memory([1, 2], [10, 20]).interval(2) == (0.0, math.inf)
    assert fit_cosine([1, 4, 8, 12], theorem([1, 4, 8, 12]), DEPTH, pinned=False).interval(4) == (-1.0, 1.0)
    assert fit_cosine([1, 4, 8, 12], theorem([1, 4, 8, 12]), DEPTH).interval(4) == (-1.0, 1.0)


def test_a_pinned_curve_is_certain_at_the_depth():
    assert fit_cosine([1, 4, 8], theorem([1, 4, 8]), DEPTH).interval(DEPTH) == (1.0, 1.0)


# --- poor fits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize(
    ("h", "cos"),
    [
        ([1, 3, 6, 9, 11, 12], [0.3, 0.32, 0.35, 0.4, 0.45, 1.0]),  # a jump at T: the last block is no residual one
        ([1, 2, 10, 11, 12], [-0.99, 0.2, 0.99, 0.985, 1.0]),  # overshoots 1 between the measurements
    ],
)
def test_a_cosine_that_is_no_cubic_warns(h, cos, pinned):
    with pytest.warns(PoorFitWarning, match="fits the cosine poorly.*measure more horizons"):
        curve = fit_cosine(h, cos, DEPTH, pinned)
    assert curve.poor


def test_memory_that_is_no_line_warns():
    with pytest.warns(PoorFitWarning, match="fits the memory poorly"):
        assert fit_memory([1, 2, 3, 4, 5, 6], [100, 180, 240, 260, 265, 266]).poor


def test_noise_that_averages_out_is_no_poor_fit():
    h = np.repeat([1, 4, 8, 11], 2)
    assert not fit_cosine(h, theorem(h, c=0.9) + np.tile([0.08, -0.08], 4) * (h < 8), DEPTH).poor


def test_too_few_horizons_lower_the_order_with_a_warning():
    with pytest.warns(PoorFitWarning, match=r"h=\[1, 9\] are too few horizons for order 3; fitted order 1"):
        assert fit_cosine([1, 9], [0.5, 0.82], DEPTH, pinned=False).coefficients == pytest.approx((0.04, 0.46))
    with pytest.warns(PoorFitWarning, match="fitted order 2"):
        pinned = fit_cosine([1, 6], [0.5, 0.8], DEPTH)
    assert pinned([1, 6, 12]).tolist() == pytest.approx([0.5, 0.8, 1.0])
    with pytest.warns(PoorFitWarning, match="fitted order 1"):
        assert fit_cosine([6, 12], [0.8, 1.0], DEPTH)(9) == pytest.approx(0.9)


def test_a_shallow_network_measured_everywhere_needs_no_warning():
    assert fit_cosine([1, 2, 3], [0.2, 0.7, 1.0], depth=3)([1, 2, 3]).tolist() == pytest.approx([0.2, 0.7, 1.0])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("h", "cos", "message"),
    [
        ([3, 3], [0.5, 0.6], r"h=\[3.0\]: measure at least 2 distinct"),
        ([], [], r"h=\[\]: measure at least 2 distinct"),
        ([1, 2, 3], [0.5, 0.6], "h has 3 entries, cos has 2; give one value"),
        ([0, 2], [0.5, 0.6], r"h=\[0.0\]: give whole horizons from 1 to 12"),
        ([1, 13], [0.5, 0.6], r"h=\[13.0\]: give whole horizons from 1 to 12"),
        ([1, 2.5], [0.5, 0.6], r"h=\[2.5\]: give whole horizons"),
        ([1, math.nan], [0.5, 0.6], r"h=\[nan\]: give whole horizons"),
        ([1, 2], [0.5, math.nan], r"cos=\[nan\]: give finite values in \[-1, 1\]"),
        ([1, 2], [0.5, 1.0 + 1e-6], r"cos=\[1.000001\]: give finite values"),
        ([1, 2], [-1.1, 0.5], r"cos=\[-1.1\]: give finite values"),
    ],
)
@pytest.mark.parametrize("pinned", [True, False])
def test_cosines_that_cannot_be_fitted_are_refused(h, cos, message, pinned):
    with pytest.raises(ValueError, match=message):
        fit_cosine(h, cos, DEPTH, pinned)


@pytest.mark.parametrize(
    ("h", "memory", "message"),
    [
        ([3], [5], r"h=\[3.0\]: measure at least 2 distinct"),
        ([1, 2], [5], "h has 2 entries, bytes has 1; give one value"),
        ([0, 2], [5, 6], r"h=\[0.0\]: give whole horizons from 1 to the depth"),
        ([1, 2], [5, math.inf], r"bytes=\[inf\]: give finite values in \[0, inf\]"),
        ([1, 2], [-5, 6], r"bytes=\[-5.0\]: give finite values"),
    ],
)
def test_memories_that_cannot_be_fitted_are_refused(h, memory, message):
    with pytest.raises(ValueError, match=message):
        fit_memory(h, memory)


def test_a_rounding_error_outside_the_range_is_a_cosine():
    assert fit_cosine([1, 4, 8, 12], [0.3, 0.7, 0.95, 1 + 1e-12], DEPTH)(12) == 1.0
    assert fit_cosine([1, 2, 3], [-1 - 1e-12, 0.2, 1.0], depth=3)(1) == pytest.approx(-1.0)
