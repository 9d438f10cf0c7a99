"""The bundled trainer."""

from horizonplan.training.evaluate import evaluate
from horizonplan.training.trainer import Result, train

__all__ = ["Result", "evaluate", "train"]
