"""The experiments of the paper, run again: ``horizonplan reproduce``.

*Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive Control*: one file an experiment, and
the parts that they share.
"""

from horizonplan.reproduce.cases import Sources
from horizonplan.reproduce.findings import Claim, Finding
from horizonplan.reproduce.run import EXPERIMENTS, reproduce

__all__ = ["EXPERIMENTS", "Claim", "Finding", "Sources", "reproduce"]
