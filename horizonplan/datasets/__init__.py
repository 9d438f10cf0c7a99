"""Real data that ships inside Python packages: nothing is downloaded, nothing is read before it is asked for."""

from horizonplan.datasets.digits import digits, mnist5k

__all__ = ["digits", "mnist5k"]
