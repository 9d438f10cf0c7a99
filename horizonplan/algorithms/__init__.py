"""Training methods, one idea a file; any of them goes into ``horizonplan.train(..., algorithm=...)``."""

from horizonplan.algorithms.altmin import AlternatingMinimization
from horizonplan.algorithms.base import Algorithm, GradientMethod, LayerParallel
from horizonplan.algorithms.diagnose import input_effects
from horizonplan.algorithms.etf import SimplexETF
from horizonplan.algorithms.heads import Place
from horizonplan.algorithms.infopro import InformationPropagation
from horizonplan.algorithms.links import LostProcessError
from horizonplan.algorithms.local_methods import DGL, InfoPro, greedy
from horizonplan.algorithms.locoprop import LocoProp
from horizonplan.algorithms.naming import short_name
from horizonplan.algorithms.parallel_in_time import ParallelInTime
from horizonplan.algorithms.parallel_windows import ParallelWindows
from horizonplan.algorithms.penalty import Penalty
from horizonplan.algorithms.rmsprop import RMSProp
from horizonplan.algorithms.section import PredictionError
from horizonplan.algorithms.sgr import SGR
from horizonplan.algorithms.transfer import Transfer
from horizonplan.algorithms.windows import BackPropagation, Fixed, Horizon, LocalLearning, LoCo, Windows

__all__ = [
    "DGL",
    "SGR",
    "Algorithm",
    "AlternatingMinimization",
    "BackPropagation",
    "Fixed",
    "GradientMethod",
    "Horizon",
    "InfoPro",
    "InformationPropagation",
    "LayerParallel",
    "LoCo",
    "LocalLearning",
    "LocoProp",
    "LostProcessError",
    "ParallelInTime",
    "ParallelWindows",
    "Penalty",
    "Place",
    "PredictionError",
    "RMSProp",
    "SimplexETF",
    "Transfer",
    "Windows",
    "greedy",
    "input_effects",
    "short_name",
]
