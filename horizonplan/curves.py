"""The paper's polynomials: memory and cosine at every horizon from measurements at a few.

Source: "Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive Control", Eq. 15 (cosine,
order 3) and Eq. 16 (memory, order 1). Horizons are whole numbers of blocks, memory is in bytes.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from horizonplan.units import format_bytes

Quantity = Literal["memory", "cosine"]
Array = NDArray[np.float64]
Numbers = Sequence[float] | NDArray[np.floating | np.integer]

_BOUNDS = {"memory": (0.0, math.inf), "cosine": (-1.0, 1.0)}


class PoorFitWarning(UserWarning):
    """The polynomial does not describe the measurements, or there are too few of them for its order."""


@dataclass(frozen=True)
class Curve:
    """A polynomial in the horizon with the measurements it was fitted to.

    A pinned curve is exactly 1 at the depth and clipped to [-1, 1]; any other is the bare polynomial.

    Attributes:
        quantity: ``"memory"`` (bytes) or ``"cosine"`` (no unit).
        coefficients: In powers of h, the highest first, as ``numpy.polyfit`` orders them.
        horizons: The measured horizons, repeated where there are several batches.
        values: What was measured there.
        depth: Blocks T of the network, None where the fit did not need it.
        pinned: Whether the curve is held at 1 at h = T.
    """

    quantity: Quantity
    coefficients: tuple[float, ...]
    horizons: tuple[int, ...]
    values: tuple[float, ...]
    depth: int | None = None
    pinned: bool = False

    @overload
    def __call__(self, h: float) -> float: ...
    @overload
    def __call__(self, h: Numbers) -> Array: ...
    def __call__(self, h: float | Numbers) -> float | Array:
        """Evaluate at one horizon (a float) or at an array of them (an array)."""
        at = np.asarray(h, dtype=float)
        value = np.polyval(self.coefficients, at)
        if self.pinned:  # at T exactly 1, where powers of h would leave a rounding error
            value = np.where(at == self.depth, 1.0, np.clip(value, -1.0, 1.0))
        return float(value) if at.ndim == 0 else value

    def interval(self, h: float) -> tuple[float, float]:
        r"""Where 95 % of new measurements at h would lie if the polynomial were the truth.

        With n measurements, p coefficients, residual variance :math:`s^2` and design matrix X, the least-squares
        interval is :math:`\hat y \pm t_{.975, n-p}\, s \sqrt{1 + x^\top (X^\top X)^{-1} x}`, clipped to what the
        quantity can be: [0, inf) bytes, [-1, 1] for a cosine. Where n = p the data say nothing about the error, and
        the interval is all of that range. A pinned curve has no error at h = T, and no information comes from there.
        It speaks of one measurement (one batch), not of a mean, and cannot see that the shape is wrong: see ``poor``.
        """
        bounds, pin = _BOUNDS[self.quantity], self.depth if self.pinned else None
        if h == pin:
            return 1.0, 1.0
        free, values = np.array([point for point in zip(self.horizons, self.values, strict=True) if point[0] != pin]).T
        origin, order = pin or free.mean(), len(self.coefficients) - 1
        design, point = (_powers(at, origin, order, self.pinned) for at in (free, np.array(h)))
        freedom = len(free) - design.shape[1]
        if freedom == 0:
            return bounds
        variance = np.sum((values - np.polyval(self.coefficients, free)) ** 2) / freedom
        half = stdtrit(freedom, 0.975) * np.sqrt(variance * (1 + np.sum((point @ np.linalg.pinv(design)) ** 2)))
        low, high = np.clip(np.polyval(self.coefficients, h) + np.array([-half, half]), *bounds)
        return float(low), float(high)

    @property
    def unit(self) -> str:
        """Unit of the values."""
        return "bytes" if self.quantity == "memory" else "1"

    @property
    def residual(self) -> float:
        """Root mean square of measurement minus curve over all measurements, in the curve's unit."""
        return float(np.sqrt(np.mean((np.array(self.values) - self(self.horizons)) ** 2)))

    @cached_property
    def misfit(self) -> float:
        """What the curve is known to be wrong by, in its unit, at the worst horizon.

        That is how far it misses the mean of the measurements at a horizon, or how far its polynomial leaves what the
        quantity can be at a horizon from 1 to T (to the largest one measured where T is unknown).
        """
        horizons, values = np.array(self.horizons), np.array(self.values)
        distinct = np.unique(horizons)
        means = np.array([values[horizons == h].mean() for h in distinct])
        bare = np.polyval(self.coefficients, np.arange(1, (self.depth or distinct[-1]) + 1))
        low, high = _BOUNDS[self.quantity]
        return float(max(np.abs(means - self(distinct)).max(), low - bare.min(), bare.max() - high))

    @property
    def poor(self) -> bool:
        """If ``misfit`` exceeds 0.05 of cosine (about 0.1 of rate, the usual epsilon), or 5 % of the mean memory."""
        return self.misfit > 0.05 * (float(np.mean(self.values)) if self.quantity == "memory" else 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Write the curve as JSON-ready values."""
        told = {name: getattr(self, name) for name in ("quantity", "unit", "depth", "pinned", "residual", "poor")}
        return told | {name: list(getattr(self, name)) for name in ("coefficients", "horizons", "values")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` wrote."""
        lists = {name: tuple(data[name]) for name in ("coefficients", "horizons", "values")}
        return cls(quantity=data["quantity"], depth=data["depth"], pinned=data["pinned"], **lists)


def fit_memory(h: Numbers, bytes: Numbers) -> Curve:
    """Fit a straight line to peak bytes (Eq. 16): ``numpy.polyfit`` of order 1.

    Args:
        h: Measured horizons, at least two distinct ones.
        bytes: Peak bytes at each, finite and >= 0.

    Raises:
        ValueError: If the measurements cannot be fitted.

    Example:
        >>> curve = fit_memory([1, 4, 8], [300, 600, 1000])
        >>> round(curve(6)), [round(c) for c in curve.coefficients]
        (800, [100, 200])
    """
    horizons, values = _measurements(h, bytes, "bytes", "memory", None)
    return _warned(Curve("memory", _floats(np.polyfit(horizons, values, 1)), horizons, values))


def fit_cosine(h: Numbers, cos: Numbers, depth: int, pinned: bool = True) -> Curve:
    r"""Fit a cubic to the cosine between horizon and back-propagation gradients (Eq. 15).

    Args:
        h: Measured horizons in 1..depth, at least two distinct ones; repeat one to give several batches.
        cos: The cosine at each, in [-1, 1].
        depth: Blocks T of the network.
        pinned: Hold the curve at :math:`\cos\theta_T = 1`, and its values in [-1, 1].

    Returns:
        The curve. Unpinned it is ``numpy.polyfit`` of order 3 exactly. The order is lowered, with a
        ``PoorFitWarning`` unless every horizon was measured, where there are too few distinct horizons.

    Raises:
        ValueError: If the measurements cannot be fitted.

    Note:
        The pin is not in the paper, whose cubic can pass 1 or miss it at T. ``pinned=False`` is the paper.

    Example:
        >>> curve = fit_cosine([1, 4, 8, 12], [0.3, 0.7, 0.95, 1.0], depth=12)
        >>> curve(12), round(curve(8), 6)
        (1.0, 0.95)
    """
    horizons, values = _measurements(h, cos, "cos", "cosine", depth)
    distinct = set(horizons)
    order = min(3, len(distinct - {depth}) if pinned else len(distinct) - 1)
    if order < 3 and len(distinct) < depth:
        message = f"h={sorted(distinct)} are too few horizons for order 3; fitted order {order}, measure more"
        warnings.warn(message, PoorFitWarning, stacklevel=2)
    fitted = _pinned_polyfit(horizons, values, order, depth) if pinned else np.polyfit(horizons, values, order)
    return _warned(Curve("cosine", _floats(fitted), horizons, values, depth, pinned))


def _pinned_polyfit(horizons: Sequence[int], values: Sequence[float], order: int, depth: int) -> Array:
    """Least squares of ``1 + sum_k c_k (h/T - 1)^k``, k = order..1, expanded in powers of h by Horner's rule."""
    inner = np.linalg.lstsq(_powers(np.array(horizons), depth, order, pinned=True), np.array(values) - 1.0, rcond=None)[
        0
    ]
    expanded = np.zeros(1)
    for coefficient in [*inner, 1.0]:
        expanded = np.convolve(expanded, [1.0 / depth, -1.0])
        expanded[-1] += coefficient
    return expanded[1:]


def _powers(h: NDArray[Any], origin: float, order: int, pinned: bool) -> Array:
    """Powers of the distance to the origin, the highest first; those of a pinned curve lack the constant."""
    return np.asarray(h / origin - 1.0)[..., None] ** np.arange(order, 0 if pinned else -1, -1)


def _measurements(
    h: Numbers, values: Numbers, name: str, quantity: Quantity, depth: int | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    at, y = np.asarray(h, dtype=float).ravel(), np.asarray(values, dtype=float).ravel()
    (low, high), last = _BOUNDS[quantity], math.inf if depth is None else depth
    if len(at) != len(y):
        raise ValueError(f"h has {len(at)} entries, {name} has {len(y)}; give one value for every horizon")
    if outside := [t for t in at.tolist() if not (1 <= t <= last and t.is_integer())]:
        raise ValueError(f"h={outside}: give whole horizons from 1 to {'the depth' if depth is None else depth}")
    if outside := [v for v in y.tolist() if not (math.isfinite(v) and low - 1e-9 <= v <= high + 1e-9)]:
        raise ValueError(f"{name}={outside}: give finite values in [{low:g}, {high:g}], leave out failed measurements")
    if len(set(at.tolist())) < 2:
        raise ValueError(f"h={sorted(set(at.tolist()))}: measure at least 2 distinct horizons")
    return tuple(int(t) for t in at), _floats(y)


def _warned(curve: Curve) -> Curve:
    if curve.poor:
        off = format_bytes(round(curve.misfit)) if curve.quantity == "memory" else f"{curve.misfit:.3g}"
        what = f"order {len(curve.coefficients) - 1} fits the {curve.quantity} poorly (off by {off})"
        warnings.warn(f"{what}; measure more horizons, or all that count", PoorFitWarning, stacklevel=3)
    return curve


def _floats(values: Array) -> tuple[float, ...]:
    return tuple(values.tolist())
