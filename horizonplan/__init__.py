"""Train networks that do not fit your GPU: plan how far ahead each block's gradient looks, then train with the plan."""

from importlib.metadata import PackageNotFoundError, version

from horizonplan import algorithms, client, probes
from horizonplan.cards import Card
from horizonplan.chain import Chain, ChainError
from horizonplan.cost import LadderCost, LinearCost, MixedNodes
from horizonplan.curves import Curve, PoorFitWarning, fit_cosine, fit_memory
from horizonplan.devices import Calibration
from horizonplan.fits import Fits, Sweep, fits, sweep
from horizonplan.frontier import frontier
from horizonplan.gradient import horizon_backward
from horizonplan.horizons import HeldOut
from horizonplan.micro_batch import MicroBatch, largest_micro_batch
from horizonplan.objective import (
    AccuracyConstraint,
    InfeasibleError,
    MemoryLimit,
    MoneyToLoss,
    Objective,
    TimeToLoss,
    Weighted,
    select,
)
from horizonplan.plan import Plan
from horizonplan.planner import plan_horizon
from horizonplan.probes.simulation import SimulationError
from horizonplan.rows import Row
from horizonplan.schedule import Schedule, Window
from horizonplan.training import (
    Callback,
    CheckpointError,
    DecayOnGrowth,
    EarlyStopping,
    PlanWarning,
    Result,
    TensorBoard,
    Terminated,
    Trainer,
    train,
)
from horizonplan.tuner import Study, Trial, tune_horizon
from horizonplan.verify import Report, verify

try:
    __version__ = version("horizonplan")
except PackageNotFoundError:  # running from a bare checkout
    __version__ = "0"

__all__ = [
    "AccuracyConstraint",
    "Calibration",
    "Callback",
    "Card",
    "Chain",
    "ChainError",
    "CheckpointError",
    "Curve",
    "DecayOnGrowth",
    "EarlyStopping",
    "Fits",
    "HeldOut",
    "InfeasibleError",
    "LadderCost",
    "LinearCost",
    "MemoryLimit",
    "MicroBatch",
    "MixedNodes",
    "MoneyToLoss",
    "Objective",
    "Plan",
    "PlanWarning",
    "PoorFitWarning",
    "Report",
    "Result",
    "Row",
    "Schedule",
    "SimulationError",
    "Study",
    "Sweep",
    "TensorBoard",
    "Terminated",
    "TimeToLoss",
    "Trainer",
    "Trial",
    "Weighted",
    "Window",
    "algorithms",
    "client",
    "fit_cosine",
    "fit_memory",
    "fits",
    "frontier",
    "horizon_backward",
    "largest_micro_batch",
    "plan_horizon",
    "probes",
    "select",
    "sweep",
    "train",
    "tune_horizon",
    "verify",
]
