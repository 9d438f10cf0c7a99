"""The methods that are schedules: horizon gradients, LoCo, plain local learning."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from horizonplan.algorithms.base import GradientMethod
from horizonplan.chain import Chain
from horizonplan.gradient import back_propagation, horizon_backward
from horizonplan.schedule import Schedule


class Windows(GradientMethod):
    """A gradient that some schedule of windows computes."""

    @abstractmethod
    def schedule(self, depth: int) -> Schedule:
        """The schedule for a chain of ``depth`` blocks."""

    def backward(self, chain: Chain, batch: Any, scale: float | Tensor = 1.0) -> Tensor:
        """Accumulate the schedule's gradient; see :func:`horizonplan.horizon_backward`.

        Where that is back-propagation's without recomputing, it is computed by back-propagation itself.
        """
        schedule = self.schedule(chain.depth)
        if schedule == Schedule.exact(chain.depth):
            return back_propagation(chain, batch, scale)
        return horizon_backward(chain, batch, schedule, scale=scale)


@dataclass(frozen=True)
class Horizon(Windows):
    """Each block's gradient looks ``horizon`` blocks ahead.

    "Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive Control", Eq. 9.
    ``stride = horizon`` makes disjoint windows; ``recompute`` checkpoints activations every so many blocks.

    Raises:
        ValueError: in use, unless ``1 <= stride <= horizon <= depth``.
    """

    horizon: int
    stride: int = 1
    recompute: int = 0

    def schedule(self, depth: int) -> Schedule:
        """Windows of ``horizon`` blocks, ``stride`` apart."""
        return Schedule.horizon(depth, self.horizon, self.stride, self.recompute)


@dataclass(frozen=True)
class LoCo(Windows):
    """LoCo over ``stages`` groups of blocks, with the split loss, or ``summed`` as its authors have it (Eq. 20)."""

    stages: int
    summed: bool = False

    def schedule(self, depth: int) -> Schedule:
        """Horizon 2 over the stages."""
        return Schedule.loco(depth, self.stages, self.summed)


@dataclass(frozen=True)
class LocalLearning(Windows):
    """``modules`` disjoint groups of blocks, each trained on the loss at its own end."""

    modules: int

    def schedule(self, depth: int) -> Schedule:
        """One window a module."""
        return Schedule.local(depth, self.modules)


@dataclass(frozen=True)
class Fixed(Windows):
    """A schedule given as such (a plan's)."""

    windows: Schedule

    def __str__(self) -> str:
        return str(self.windows)

    def schedule(self, depth: int) -> Schedule:
        """The schedule itself.

        Raises:
            ValueError: it was made for another depth.
        """
        if self.windows.depth != depth:
            raise ValueError(f"schedule: made for {self.windows.depth} blocks, the chain has {depth}.")
        return self.windows


@dataclass(frozen=True)
class BackPropagation(Windows):
    """The exact gradient, with activation checkpointing every ``recompute`` blocks if that is >= 1."""

    recompute: int = 0

    def schedule(self, depth: int) -> Schedule:
        """One window over all blocks."""
        return Schedule.exact(depth, self.recompute)
