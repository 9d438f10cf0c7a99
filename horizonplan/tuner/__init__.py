"""The auto-tuner: Optuna over the few schedules that a plan leaves to training, and the parameters they train with."""

from horizonplan.tuner.study import Study
from horizonplan.tuner.trial import Trial
from horizonplan.tuner.tune import tune_horizon

__all__ = ["Study", "Trial", "tune_horizon"]
