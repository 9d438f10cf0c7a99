"""One line of the plan's table: a way of computing the gradient, what it costs, and where each number comes from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Source = Literal["measured", "fitted", "predicted", "derived", "unmeasured"]
_SOURCES = get_args(Source)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A candidate or a reference of a plan. None stands for a number nobody has.

    Attributes:
        algorithm: The method's name; ``"horizon"`` for windows of one horizon and stride.
        horizon: Blocks h that a gradient looks ahead, 1 <= stride <= horizon.
        stride: Blocks s between the starts of two windows.
        recompute: Activation checkpointing every so many blocks, 0 for none.
        micro_batches: Parts that one batch is split into.
        precision: Number format of the forward pass.
        memory_bytes: Peak bytes M of one step at steady state.
        memory_source: Where ``memory_bytes`` comes from.
        nvml_bytes: Peak bytes of the whole process as the driver counts them.
        device_bytes: What the device must have for it: ``nvml_bytes`` where measured, else ``memory_bytes`` and a
            margin; None on a device without a context of its own, where it is ``memory_bytes``.
        fits: Whether the device planned for has that much; None where it has no limit.
        cosine: Cosine between this gradient and that of back-propagation, in [-1, 1].
        cosine_stderr: Standard error of ``cosine``.
        cosine_source: Where ``cosine`` comes from.
        rate: Loss-decrease rate relative to back-propagation (1 is as fast; may be negative).
        rate_stderr: Standard error of ``rate``.
        rate_source: Where ``rate`` comes from.
        cost: Price of ``memory_bytes``, in the cost function's unit.
        objective: What the selection minimises.
        feasible: Whether the objective's constraint holds.
        reference: Shown for comparison only; never selected.
        flops: Floating-point operations of one step.
        step_seconds: Seconds of one step.
        step_seconds_source: Where ``step_seconds`` comes from.

    Raises:
        ValueError: If a number lies outside its range, or a source is not one of the five.

    Example:
        >>> row = Row(horizon=3, memory_bytes=2**30, memory_source="measured", cosine=0.9, cosine_source="fitted")
        >>> row.stride, row.cosine, row.rate, row.rate_source
        (1, 0.9, None, 'unmeasured')
        >>> Row.from_dict(row.to_dict()) == row
        True
    """

    algorithm: str = "horizon"
    horizon: int
    stride: int = 1
    recompute: int = 0
    micro_batches: int = 1
    precision: str = "fp32"
    memory_bytes: int
    memory_source: Source = "unmeasured"
    nvml_bytes: int | None = None
    device_bytes: int | None = None
    fits: bool | None = None
    cosine: float | None = None
    cosine_stderr: float | None = None
    cosine_source: Source = "unmeasured"
    rate: float | None = None
    rate_stderr: float | None = None
    rate_source: Source = "unmeasured"
    cost: float | None = None
    objective: float | None = None
    feasible: bool = False
    reference: bool = False
    flops: int | None = None
    step_seconds: float | None = None
    step_seconds_source: Source = "unmeasured"

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.horizon:
            raise ValueError(f"stride={self.stride!r}, horizon={self.horizon!r}: give 1 <= stride <= horizon")
        if self.memory_bytes < 0:
            raise ValueError(f"memory_bytes={self.memory_bytes!r} is negative; give peak bytes >= 0")
        if self.cosine is not None and not -1 <= self.cosine <= 1:
            raise ValueError(f"cosine={self.cosine!r} is not in [-1, 1]; clip rounding errors, give None if unmeasured")
        if self.rate is not None and not math.isfinite(self.rate):
            raise ValueError(f"rate={self.rate!r} is not finite; give None where no rate could be measured")
        for name in ("memory_source", "cosine_source", "rate_source", "step_seconds_source"):
            if (source := getattr(self, name)) not in _SOURCES:
                raise ValueError(f"{name}={source!r} is no source; give one of {', '.join(_SOURCES)}")

    @property
    def plain(self) -> bool:
        """Whether it is a horizon and stride as such: nothing recomputed, the batch whole, in fp32."""
        return (self.algorithm, self.recompute, self.micro_batches, self.precision) == ("horizon", 0, 1, "fp32")

    @property
    def exact(self) -> bool:
        """Whether its gradient is known to be back-propagation's."""
        return self.cosine_source == "derived"

    def to_dict(self) -> dict[str, Any]:
        """Write the row as JSON-ready values."""
        return dict(vars(self))  # as asdict, which copies every number, and takes ten times as long

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` wrote."""
        return cls(**data)
