"""The gradient engine: a schedule's operations, executed inside the model's own forward."""

from horizonplan.gradient.backward import horizon_backward
from horizonplan.gradient.engine import Observer, Step, execute
from horizonplan.gradient.plain import back_propagation
from horizonplan.gradient.sums import HEAD, STEM, trained_by

__all__ = ["HEAD", "STEM", "Observer", "Step", "back_propagation", "execute", "horizon_backward", "trained_by"]
