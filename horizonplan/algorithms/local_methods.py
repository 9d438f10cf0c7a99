"""Kinds of local learning by their names: settings of one class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from horizonplan.algorithms.heads import Factory
from horizonplan.algorithms.sgr import SGR


@dataclass(repr=False, eq=False)
class DGL(SGR):
    """Decoupled greedy learning ("Decoupled Greedy Learning of CNNs"): local losses alone, on every batch.

    Its own heads are for images; give ``heads="light"`` elsewhere. A module's step comes after that of the one before,
    on what that one had put out before its step, so all may as well step together.
    """

    weight: float = 0.0
    heads: str | Factory = "dgl"


@dataclass(repr=False, eq=False)
class InfoPro(SGR):
    """Information propagation: local losses with a decoder's beside them; images only.

    Other weights, and the contrastive loss: ``heads=InformationPropagation(...)``.
    """

    weight: float = 0.0
    heads: str | Factory = "infopro"


def greedy(modules: int, epochs: int, **settings: Any) -> dict[int, SGR]:
    """Greedy layer-wise training ("Greedy Layerwise Learning Can Scale to ImageNet"): module after module.

    Args:
        modules: K.
        epochs: epochs of each module; train for ``modules * epochs``.
        **settings: of :class:`SGR`.

    Returns:
        First epoch -> method, for ``horizonplan.train(..., algorithm=...)``. The modules before the present one are
        not trained any more, but the running statistics of their norms still move; those after it only run.

    >>> list(greedy(3, 5))
    [0, 5, 10]
    """
    return {k * epochs: SGR(modules, weight=0.0, only=k, **settings) for k in range(modules)}
