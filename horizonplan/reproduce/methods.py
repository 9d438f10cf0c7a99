"""The methods that the experiments compare, each with the name it has in plots and tables."""

from __future__ import annotations

from dataclasses import dataclass

from horizonplan.algorithms import BackPropagation, Horizon, LoCo, Windows
from horizonplan.schedule import Schedule


@dataclass(frozen=True)
class Method:
    """A gradient with a name.

    Attributes:
        name: in plots, tables and the names of cells.
        algorithm: what computes the gradient.
    """

    name: str
    algorithm: Windows

    def schedule(self, depth: int) -> Schedule:
        """Its windows in a network of ``depth`` blocks."""
        return self.algorithm.schedule(depth)


BP = Method("BP", BackPropagation())
FF = Method("h=1", Horizon(1))
LOCO = tuple(Method(f"LoCo {stages}", LoCo(stages)) for stages in (3, 5))
LOCO_SUMMED = tuple(Method(f"LoCo {stages}, summed", LoCo(stages, summed=True)) for stages in (3, 5))


def sliding(horizon: int, depth: int) -> Method:
    """The paper's family: stride 1. At ``horizon == depth`` it is back-propagation."""
    return BP if horizon == depth else Method(f"h={horizon}", Horizon(horizon))


def disjoint(horizon: int) -> Method:
    """Windows that share no block: stride h."""
    return Method(f"h=s={horizon}", Horizon(horizon, horizon))


def checkpoints(depth: int) -> list[int]:
    """How often to checkpoint: every block, and every root of T."""
    return sorted({1, round(depth**0.5)})


def checkpointed(every: int) -> Method:
    """Back-propagation's gradient, activations recomputed every so many blocks."""
    return Method(f"BP, checkpoint every {every}", BackPropagation(every))
