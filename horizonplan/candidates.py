"""The plan's table: every way of computing the gradient that is weighed, one row each.

Stride 1 at every horizon is the paper's family, with back-propagation at h = T. Disjoint windows
(s = h) and checkpointed back-propagation stand beside it, as candidates or as references.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from horizonplan.curves import Curve
from horizonplan.predict import step_bytes, step_flops, step_seconds
from horizonplan.probes.memory import Stride, stride_of
from horizonplan.probes.profile import Profile
from horizonplan.probes.sample import Sample
from horizonplan.rows import Row
from horizonplan.schedule import Schedule


def schedule_of(row: Row, depth: int) -> Schedule:
    """The schedule a row stands for, of each micro-batch if there are several."""
    if row.algorithm.startswith("LoCo "):
        return replace(Schedule.loco(depth, int(row.algorithm.removeprefix("LoCo "))), recompute=row.recompute)
    return Schedule.horizon(depth, row.horizon, row.stride, row.recompute)


def table(
    profile: Profile,
    samples: Iterable[Sample],
    curves: Mapping[str, Curve],
    strides: Sequence[Stride] = (1, "horizon"),
    exact_may_win: bool = False,
) -> tuple[Row, ...]:
    """Build the rows from a profile, measurements and the fitted cosine.

    Memory is predicted by the fold and the cosine fitted at stride 1, each replaced by a measurement
    where there is one. At stride 1 the rate is derived as cos^2 (Eq. 14's model); at other strides it
    stays unmeasured until a rollout measures it. Exact rows have cosine and rate 1 by definition.

    Args:
        profile: the model's costs.
        samples: measured memory (bytes) and cosines.
        curves: ``"cosine"`` for stride 1.
        strides: strides that are candidates beside 1, which always is; s = h becomes a reference where left out.
        exact_may_win: whether checkpointed back-propagation is a candidate or a reference.
    """
    depth = profile.depth
    measured = {(s.quantity, s.horizon, s.stride): s for s in samples}
    pairs: dict[tuple[int, int], bool] = {(h, 1): False for h in range(1, depth + 1)}
    for h in range(2, depth):
        wanted = [stride_of(s, h) for s in strides if s == "horizon" or (isinstance(s, int) and s <= h)]
        pairs |= {(h, s): False for s in wanted}
        pairs.setdefault((h, h), True)
    rows = []
    for (h, s), reference in pairs.items():
        row = folded(Row(horizon=h, stride=s, memory_bytes=0, reference=reference), profile)
        row = _with_cosine(row, depth, measured.get(("cosine", h, s)), curves.get("cosine"))
        rows.append(with_memory(row, measured.get(("memory", h, s))))
    for k in dict.fromkeys([1, max(1, round(math.sqrt(depth)))]):
        row = Row(horizon=depth, recompute=k, memory_bytes=0, reference=not exact_may_win)
        rows.append(_with_cosine(folded(row, profile), depth, None, None))
    return tuple(rows)


def with_memory(row: Row, sample: Sample | None) -> Row:
    """The row with measured instead of predicted memory."""
    if sample is None or math.isnan(sample.value):
        return row
    nvml = sample.detail.get("nvml_bytes")
    return replace(row, memory_bytes=round(sample.value), memory_source="measured", nvml_bytes=nvml)


def with_measured_bytes(row: Row, size: int) -> Row:
    """The row with bytes that a step was seen to need; what the device needs beyond them stays the same."""
    more = size - row.memory_bytes
    device, nvml = (None if known is None else known + more for known in (row.device_bytes, row.nvml_bytes))
    return replace(row, memory_bytes=size, memory_source="measured", device_bytes=device, nvml_bytes=nvml)


@dataclass(frozen=True)
class Room:
    """What a device has for a step.

    Attributes:
        limit_bytes: bytes that one process may have there; ``None``: no limit.
        too_large_bytes: predicted for the smallest step that ran out of memory: what is predicted to need as much
            does not fit either.
        margin_bytes: what the device needs besides the bytes of tensors, from those; ``None``: nothing.
        as_memory: whether the table's memory is what the device needs, and not the bytes of tensors.
    """

    limit_bytes: int | None = None
    too_large_bytes: int | None = None
    margin_bytes: Callable[[int], int] | None = None
    as_memory: bool = False

    def holds(self, row: Row) -> Row:
        """The row with what the device needs for it, and whether that is there."""
        needed = row.nvml_bytes
        if needed is None and self.margin_bytes is not None:
            needed = row.memory_bytes + self.margin_bytes(row.memory_bytes)
        least = row.memory_bytes if needed is None else needed
        fits = None if self.limit_bytes is None else least <= self.limit_bytes
        if self.too_large_bytes is not None and row.memory_source != "measured":
            fits = fits is not False and row.memory_bytes < self.too_large_bytes
        row = replace(row, device_bytes=needed, fits=fits)
        if not self.as_memory or needed is None:
            return row
        seen = row.memory_source == "measured" and row.nvml_bytes is not None
        return replace(row, memory_bytes=needed, memory_source="measured" if seen else "predicted")


def with_rates(rows: Iterable[Row], rolled: Iterable[Sample]) -> tuple[Row, ...]:
    """The rows with their rollouts' rates, recomputed ones too; without one where the rollout found none."""
    found = {(s.horizon, s.stride): s for s in rolled}
    return tuple(with_rate(row, found.get((row.horizon, row.stride)) if _same(row) else None) for row in rows)


def with_rate(row: Row, sample: Sample | None) -> Row:
    """The row with its rollout's rate; unmeasured where the rollout found none, as it was where there is none."""
    if sample is None:
        return row
    if not math.isfinite(sample.value):
        return replace(row, rate=None, rate_stderr=None, rate_source="unmeasured")
    return replace(row, rate=sample.value, rate_stderr=sample.stderr, rate_source="measured")


def with_cosine(row: Row, sample: Sample) -> Row:
    """The row with its measured cosine."""
    return replace(row, cosine=sample.value, cosine_stderr=sample.stderr, cosine_source="measured")


def with_derived_rate(row: Row) -> Row:
    """The row with cos^2 as its rate, if its cosine is known: what is left when there are no rollouts."""
    return row if row.cosine is None else replace(row, rate=row.cosine**2, rate_source="derived")


def _same(row: Row) -> bool:
    """Whether its gradient is that of its horizon and stride: recomputing changes nothing."""
    return replace(row, recompute=0).plain


def folded(row: Row, profile: Profile) -> Row:
    """The row with bytes, FLOPs and seconds as the folds predict them from a profile."""
    schedule = schedule_of(row, profile.depth)
    seconds = step_seconds(schedule, profile)
    return replace(
        row,
        memory_bytes=step_bytes(schedule, profile),
        memory_source="predicted",
        nvml_bytes=None,
        flops=step_flops(schedule, profile),
        step_seconds=seconds,
        step_seconds_source="unmeasured" if seconds is None else "predicted",
    )


def _with_cosine(row: Row, depth: int, sample: Sample | None, curve: Curve | None) -> Row:
    if row.horizon == depth:
        return replace(row, cosine=1.0, cosine_source="derived", rate=1.0, rate_source="derived")
    if sample is not None:
        row = with_cosine(row, sample)
    elif row.stride == 1 and curve is not None:
        row = replace(row, cosine=min(1.0, max(-1.0, curve(row.horizon))), cosine_source="fitted")
    if row.stride > 1 or row.cosine is None:
        return row
    return replace(row, rate=row.cosine**2, rate_source="derived")
