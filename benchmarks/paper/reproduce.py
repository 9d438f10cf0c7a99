"""The paper's experiments run again, at the small scale: what is stored in benchmarks/paper/small.

    OMP_NUM_THREADS=1 python benchmarks/paper/reproduce.py                  # all; goes on where a run stopped
    OMP_NUM_THREADS=1 python benchmarks/paper/reproduce.py --only theorem   # options of `horizonplan reproduce`

docs/paper.md says what is run, and what came out.
"""

import sys
from pathlib import Path

from horizonplan.cli import app

if __name__ == "__main__":
    app(["reproduce", "--out", str(Path(__file__).parent / "small"), *sys.argv[1:]])
