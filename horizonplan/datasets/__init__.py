"""Real data that ships inside Python packages, and two made-up sets: nothing is downloaded, nothing read unasked."""

from horizonplan.datasets.digits import digits, mnist5k
from horizonplan.datasets.shapes import ellipses, swiss_roll

__all__ = ["digits", "ellipses", "mnist5k", "swiss_roll"]
