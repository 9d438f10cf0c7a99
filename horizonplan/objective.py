"""What the cheapest acceptable plan is, and the brute force that finds it (Algorithm 1, lines 17-18).

Source: "Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive Control", Section 4. An
objective is minimised over rows that carry a loss-decrease rate r (1: as fast as back-propagation) and peak bytes M.
Note: Eq. 17 and 18 print ``max``; the prose and Algorithm 1 mean ``min``, and so does this module.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar

from horizonplan.cost import Cost, as_cost
from horizonplan.rows import Row
from horizonplan.units import format_bytes, parse_bytes

_TOO_LARGE = ", more than the device has: use smaller batches, a larger device, or let recomputing candidates in"
_RATE_TOLERANCE = 1e-12  # so that a rate of exactly 1 - epsilon, computed in another way, counts as reached


class Objective(ABC):
    """What to minimise, and subject to what. Subclass it to plug in your own."""

    remedy: ClassVar[str] = "relax the objective or offer more candidates"

    @abstractmethod
    def value(self, rate: float | None, cost: float, memory_bytes: int, horizon: int) -> float | None:
        """What is minimised; None where it cannot be known (``rate`` may be None), and the row is infeasible."""

    @abstractmethod
    def shortfall(self, rate: float | None, cost: float, memory_bytes: int, horizon: int) -> float:
        """How far the constraint is missed, relative to what it asks; 0.0 where it holds."""

    def value_of(self, row: Row, cost: float) -> float | None:
        """What is minimised, of a whole row; override it where a number is needed that ``value`` does not get."""
        return self.value(row.rate, cost, row.memory_bytes, row.horizon)

    def shortfall_of(self, row: Row, cost: float) -> float:
        """``shortfall`` of a whole row; what the *device* needs counts against a limit, not the tensors alone."""
        needed = row.memory_bytes if row.device_bytes is None else row.device_bytes
        return self.shortfall(row.rate, cost, needed, row.horizon)

    def describe(self) -> str:
        """Say the objective in words."""
        return f"the best by {type(self).__name__}"

    def to_dict(self) -> dict[str, Any]:
        """Write the objective as JSON-ready values; of a user's own only the name."""
        return {"kind": "custom", "name": type(self).__name__}


@dataclass(frozen=True)
class AccuracyConstraint(Objective):
    r"""Minimise :math:`C(M)` subject to :math:`r \ge 1 - \epsilon` (Eq. 17).

    Attributes:
        epsilon: The loss of rate that is acceptable, in [0, 1).

    Example:
        >>> rows = [Row(horizon=h, memory_bytes=100 * h, rate=1 - (1 - h / 4) ** 3) for h in (1, 2, 3, 4)]
        >>> select(rows, AccuracyConstraint(epsilon=0.1)).horizon
        3
    """

    epsilon: float = 0.1
    remedy: ClassVar[str] = "raise epsilon, or measure more horizons and batches"

    def __post_init__(self) -> None:
        _check("epsilon", self.epsilon, end=1)

    def value(self, rate: float | None, cost: float, memory_bytes: int, horizon: int) -> float | None:
        """The cost."""
        return None if rate is None else cost

    def shortfall(self, rate: float | None, cost: float, memory_bytes: int, horizon: int) -> float:
        """The missing rate as a part of the rate asked for."""
        if rate is None:
            return math.inf
        missing = (1 - self.epsilon) - rate
        return missing / (1 - self.epsilon) if missing > _RATE_TOLERANCE else 0.0

    def describe(self) -> str:
        """Say the objective in words."""
        return f"the cheapest with a rate of at least {1 - self.epsilon:g} of back-propagation's"

    def to_dict(self) -> dict[str, Any]:
        """Write the objective as JSON-ready values."""
        return {"kind": "accuracy", "epsilon": self.epsilon}


@dataclass(frozen=True)
class Weighted(Objective):
    r"""Minimise :math:`-r + \lambda C(M)` (Eq. 18).

    Attributes:
        lam: The weight :math:`\lambda` of one unit of cost against one unit of rate; finite, >= 0.

    Example:
        >>> rows = [Row(horizon=h, memory_bytes=100 * h, rate=1 - (1 - h / 4) ** 3) for h in (1, 2, 3, 4)]
        >>> select(rows, Weighted(lam=0.5)).horizon
        2
    """

    lam: float = 0.5
    remedy: ClassVar[str] = "measure a rate for at least one candidate"

    def __post_init__(self) -> None:
        _check("lam", self.lam, end=math.inf)

    def value(self, rate: float | None, cost: float, memory_bytes: int, horizon: int) -> float | None:
        """The weighted sum."""
        return None if rate is None else -rate + self.lam * cost

    def shortfall(self, rate: float | None, cost: float, memory_bytes: int, horizon: int) -> float:
        """Nothing is asked but that the rate be known."""
        return math.inf if rate is None else 0.0

    def describe(self) -> str:
        """Say the objective in words."""
        return f"the least of {self.lam:g} x cost minus rate"

    def to_dict(self) -> dict[str, Any]:
        """Write the objective as JSON-ready values."""
        return {"kind": "weighted", "lam": self.lam}


@dataclass(frozen=True)
class MemoryLimit(Objective):
    """Take the largest horizon that fits into a given memory (Section 4).

    Attributes:
        limit: Bytes, or ``"24GiB"``; kept as bytes.

    Example:
        >>> rows = [Row(horizon=h, memory_bytes=100 * h) for h in (1, 2, 3, 4)]
        >>> select(rows, MemoryLimit(350)).horizon
        3
    """

    limit: int | str
    remedy: ClassVar[str] = "raise limit, use smaller batches, or let recomputing candidates in"

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", self.limit_bytes)

    @property
    def limit_bytes(self) -> int:
        """The limit in bytes."""
        return parse_bytes(self.limit, "limit")

    def value(self, rate: float | None, cost: float, memory_bytes: int, horizon: int) -> float | None:
        """Minus the horizon."""
        return -float(horizon)

    def shortfall(self, rate: float | None, cost: float, memory_bytes: int, horizon: int) -> float:
        """The excess bytes as a part of the limit."""
        return max(0, memory_bytes - self.limit_bytes) / self.limit_bytes

    def describe(self) -> str:
        """Say the objective in words."""
        return f"the largest horizon within {format_bytes(self.limit_bytes)}"

    def to_dict(self) -> dict[str, Any]:
        """Write the objective as JSON-ready values."""
        return {"kind": "memory", "limit_bytes": self.limit_bytes}


class _ToLoss(Objective):
    """What it takes to reach a loss: a step's price of some kind over its rate, for a number of steps.

    Back-propagation reaches the target after ``steps`` steps; a gradient of rate r needs ``steps / r``.
    """

    steps: float
    limit: int | str | None
    remedy: ClassVar[str] = "measure rates and seconds for at least one candidate, or raise limit"

    def __post_init__(self) -> None:
        if not isinstance(self.steps, Real) or isinstance(self.steps, bool) or not 0 < float(self.steps) < math.inf:
            raise ValueError(f"steps={self.steps!r}: give back-propagation's steps to the target, a finite number > 0")
        if self.limit is not None:
            object.__setattr__(self, "limit", parse_bytes(self.limit, "limit"))

    def value(self, rate: float | None, cost: float, memory_bytes: int, horizon: int) -> float | None:
        """Unknown: it takes the seconds of a step, which ``value_of`` has."""
        return None

    def shortfall(self, rate: float | None, cost: float, memory_bytes: int, horizon: int) -> float:
        """The excess bytes as a part of the limit; without a rate above 0 the loss is never reached."""
        if rate is None or rate <= 0:
            return math.inf
        limit = memory_bytes if self.limit is None else parse_bytes(self.limit, "limit")
        return max(0, memory_bytes - limit) / max(1, limit)

    def _steps_of(self, row: Row) -> float | None:
        return None if row.rate is None or row.rate <= 0 else self.steps / row.rate

    def _within(self) -> str:
        return "" if self.limit is None else f" within {format_bytes(parse_bytes(self.limit, 'limit'))}"


@dataclass(frozen=True)
class TimeToLoss(_ToLoss):
    """Minimise the seconds to a target loss, n t / r, with t the seconds of a step and r its rate.

    Back-propagation is taken to be there after n steps, and a gradient of rate r after n / r of them (Eq. 14). Which
    row is best does not depend on n, only the seconds do: where nobody knows n, leave it at 1.

    Attributes:
        steps: The steps n in which back-propagation reaches the target: from an earlier run's ``result.history``, say.
        limit: Bytes that a step may need, or ``"24GiB"``; None: what the device has.

    Example:
        >>> exact = Row(horizon=4, memory_bytes=400, rate=1.0, step_seconds=1.0)
        >>> half = Row(horizon=2, memory_bytes=200, rate=0.8, step_seconds=0.7)
        >>> select([exact, half], TimeToLoss(steps=1000)).objective
        875.0
    """

    steps: float = 1
    limit: int | str | None = None

    def value_of(self, row: Row, cost: float) -> float | None:
        """The seconds; None where rate or step seconds are unknown, or the rate is not above 0."""
        steps = self._steps_of(row)
        return None if steps is None or row.step_seconds is None else steps * row.step_seconds

    def describe(self) -> str:
        """Say the objective in words."""
        return f"the least seconds to the loss of {self.steps:g} steps of back-propagation{self._within()}"

    def to_dict(self) -> dict[str, Any]:
        """Write the objective as JSON-ready values."""
        return {"kind": "time", "steps": self.steps, "limit_bytes": self.limit}


@dataclass(frozen=True)
class MoneyToLoss(_ToLoss):
    """Minimise the money to a target loss, C(M) n t / r: nodes x price an hour x hours.

    The cost's unit is money an hour: of a :class:`horizonplan.LadderCost` of one card, say, or of
    :class:`horizonplan.MixedNodes` of several. Steps on several nodes are taken to last as long as on one.

    Attributes:
        steps: As for :class:`TimeToLoss`.
        limit: Likewise.

    Example:
        >>> rows = [
        ...     Row(horizon=4, memory_bytes=400, rate=1.0, step_seconds=1.0),
        ...     Row(horizon=2, memory_bytes=200, rate=0.8, step_seconds=0.9),
        ... ]
        >>> select(rows, MoneyToLoss(steps=3600), lambda size: 2.0 * math.ceil(size / 200)).objective
        2.25
    """

    steps: float = 1
    limit: int | str | None = None

    def value_of(self, row: Row, cost: float) -> float | None:
        """The money; None where rate or step seconds are unknown, or the rate is not above 0."""
        steps = self._steps_of(row)
        return None if steps is None or row.step_seconds is None else cost * steps * row.step_seconds / 3600

    def describe(self) -> str:
        """Say the objective in words."""
        return f"the least money to the loss of {self.steps:g} steps of back-propagation{self._within()}"

    def to_dict(self) -> dict[str, Any]:
        """Write the objective as JSON-ready values."""
        return {"kind": "money", "steps": self.steps, "limit_bytes": self.limit}


class InfeasibleError(ValueError):
    """No candidate meets the objective.

    Attributes:
        nearest: The candidate that misses it by least.
    """

    def __init__(self, message: str, nearest: Row) -> None:
        super().__init__(message)
        self.nearest = nearest

    def __reduce__(self) -> tuple[type["InfeasibleError"], tuple[str, Row]]:
        return type(self), (str(self), self.nearest)  # so that it survives the way out of a child process


def from_dict(data: Mapping[str, Any]) -> Objective:
    """Read what ``to_dict`` wrote. Raises ValueError for a user's own objective: files store no code."""
    match data.get("kind"):
        case "accuracy":
            return AccuracyConstraint(data["epsilon"])
        case "weighted":
            return Weighted(data["lam"])
        case "memory":
            return MemoryLimit(data["limit_bytes"])
        case "time":
            return TimeToLoss(data["steps"], data["limit_bytes"])
        case "money":
            return MoneyToLoss(data["steps"], data["limit_bytes"])
        case kind:
            known = "'accuracy', 'weighted', 'memory', 'time' or 'money'"
            raise ValueError(f"kind={kind!r} is no stored objective; give {known}")


def evaluate(rows: Iterable[Row], objective: Objective, cost: Cost | None = None) -> tuple[Row, ...]:
    """Fill in cost, objective and feasible of every row, references included.

    Args:
        rows: The table.
        objective: What to minimise.
        cost: Price of a number of bytes; None: linear, and any node memory left open is the table's largest.

    Raises:
        ValueError: If there are no rows, or the cost function returns no finite price.
    """
    if not (rows := tuple(rows)):
        raise ValueError("rows=() leaves nothing to choose from; give at least one Row")
    price = as_cost(cost, max(1, *(row.memory_bytes for row in rows)))
    return tuple(_evaluated(row, objective, float(price(row.memory_bytes))) for row in rows)


def select(rows: Iterable[Row], objective: Objective, cost: Cost | None = None) -> Row:
    """Return the row of least objective, evaluated, among the feasible ones that are no references.

    Rows whose objectives are exactly equal are ranked by fewer FLOPs (unknown ones last), higher rate, smaller
    horizon, smaller stride, fewer seconds, and last fewer bytes.

    Arguments are those of ``evaluate``.

    Raises:
        InfeasibleError: If no candidate meets the objective; its ``nearest`` misses by least.
        ValueError: If there are no candidates.

    Example:
        >>> select([Row(horizon=1, memory_bytes=100, rate=0.4)], AccuracyConstraint(epsilon=0.25))
        Traceback (most recent call last):
        horizonplan.objective.InfeasibleError: no candidate is feasible for the cheapest with a rate of at least 0.75 \
of back-propagation's; the nearest, horizon 1 and stride 1, has rate 0.4 and needs 100 B: raise epsilon, or measure \
more horizons and batches
    """
    candidates = [row for row in evaluate(rows, objective, cost) if not row.reference]
    if not candidates:
        raise ValueError("rows hold references only; give at least one Row with reference=False")
    if feasible := [row for row in candidates if row.feasible]:
        return min(feasible, key=_rank)
    nearest = min(
        candidates, key=lambda row: (row.fits is False, objective.shortfall_of(row, row.cost or 0.0), *_rank(row))
    )
    rate = "unknown" if nearest.rate is None else f"{nearest.rate:.4g}"
    needed = nearest.memory_bytes if nearest.device_bytes is None else nearest.device_bytes
    margin = needed - nearest.memory_bytes
    raise InfeasibleError(
        f"no candidate is feasible for {objective.describe()}; the nearest, {_way(nearest)}, has rate {rate} and needs "
        f"{format_bytes(needed)}"
        f"{f' ({format_bytes(margin)} of them for context and margin)' if margin > 0 else ''}"
        f"{_TOO_LARGE if nearest.fits is False else f': {objective.remedy}'}",
        nearest,
    )


def _way(row: Row) -> str:
    """What a row does, in words."""
    words = f"horizon {row.horizon} and stride {row.stride}"
    words += f", recompute {row.recompute}" if row.recompute else ""
    words += f", in {row.micro_batches} micro-batches" if row.micro_batches > 1 else ""
    return words + (f", {row.precision}" if row.precision != "fp32" else "")


def _evaluated(row: Row, objective: Objective, cost: float) -> Row:
    if not math.isfinite(cost):
        raise ValueError(f"cost returned {cost} for {row.memory_bytes} bytes; let it return a finite price")
    value = objective.value_of(row, cost)
    met = value is not None and row.fits is not False and objective.shortfall_of(row, cost) == 0.0
    return replace(row, cost=cost, objective=value, feasible=met)


def _rank(row: Row) -> tuple[float, ...]:
    slowness = None if row.rate is None else -row.rate
    ranks = (row.objective, row.flops, slowness, row.horizon, row.stride, row.step_seconds, row.memory_bytes)
    return tuple(math.inf if rank is None else rank for rank in ranks)


def _check(name: str, value: object, end: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < end:
        raise ValueError(f"{name}={value!r} is out of range; give a number in [0, {end:g})")
