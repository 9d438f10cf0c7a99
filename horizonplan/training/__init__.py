"""The bundled trainer."""

from horizonplan.training.attempts import TrainingWarning
from horizonplan.training.callbacks import Callback, EarlyStopping, TensorBoard
from horizonplan.training.checkpoint import CheckpointError, CheckpointWarning
from horizonplan.training.evaluate import evaluate
from horizonplan.training.result import Result
from horizonplan.training.run import Run
from horizonplan.training.schedules import DecayOnGrowth
from horizonplan.training.signals import EXIT_TERMINATED, Terminated
from horizonplan.training.trainer import Trainer, train
from horizonplan.training.watch import PlanWarning

__all__ = [
    "EXIT_TERMINATED",
    "Callback",
    "CheckpointError",
    "CheckpointWarning",
    "DecayOnGrowth",
    "EarlyStopping",
    "PlanWarning",
    "Result",
    "Run",
    "TensorBoard",
    "Terminated",
    "Trainer",
    "TrainingWarning",
    "evaluate",
    "train",
]
