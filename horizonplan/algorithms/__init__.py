"""Training methods, one idea a file; any of them goes into ``horizonplan.train(..., algorithm=...)``."""

from horizonplan.algorithms.base import Algorithm, GradientMethod
from horizonplan.algorithms.windows import BackPropagation, Fixed, Horizon, LocalLearning, LoCo, Windows

__all__ = [
    "Algorithm",
    "BackPropagation",
    "Fixed",
    "GradientMethod",
    "Horizon",
    "LoCo",
    "LocalLearning",
    "Windows",
]
