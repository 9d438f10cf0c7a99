"""What a fused optimiser step saves: peak bytes of whole AdamW steps, plain and fused, and what the fusing costs.

    OMP_NUM_THREADS=1 python benchmarks/fused_step.py            # all, a minute on one core
    OMP_NUM_THREADS=1 python benchmarks/fused_step.py bert

Peaks are the tracker's over the second step, and what stands when it begins (weights, optimiser state, batch).
`gradients` are those of all parameters: what could be saved at most. `time` is the process time of a fused step over a
plain one, both in turn within each round so that a slow moment of the machine strikes both alike; medians.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import families
import torch
import transformers as tf

import horizonplan as hp
from horizonplan.probes.steady import standing_bytes
from horizonplan.probes.tracker import own_bytes
from horizonplan.training.fused import fused

ROUNDS = 12
CASES: dict[str, Callable[[], families.Built]] = {
    "residual MLP": partial(families.residual_mlp, depth=12, width=256, rows=32),
    "residual MLP, 1024 rows": partial(families.residual_mlp, depth=12, width=256, rows=1024),
    "transformer": partial(families.transformer, depth=6, width=128),
    "gpt2": partial(families.gpt2, depth=6, width=128, vocabulary=1000),
    "bert": partial(families.bert, depth=6, width=128),
    "residual CNN": partial(families.residual_cnn, widths=(16, 32, 64)),
}


def plain_step(chain: hp.Chain, batch: Any, optimizer: torch.optim.Optimizer, horizon: int) -> None:
    """Backward, then update."""
    hp.horizon_backward(chain, batch, horizon, horizon)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def fused_step(chain: hp.Chain, batch: Any, optimizer: torch.optim.Optimizer, horizon: int) -> None:
    """Update within the backward pass."""
    with fused(optimizer):
        hp.horizon_backward(chain, batch, horizon, horizon)


def measure(chain: hp.Chain, batch: Any, horizon: int) -> tuple[list[int], float]:
    """Peak bytes of a plain and of a fused step, and the ratio of their times."""
    steps = plain_step, fused_step
    optimizer = torch.optim.AdamW(chain.parameters(), lr=1e-4)
    peaks, seconds = [], ([], [])
    plain_step(chain, batch, optimizer, horizon)
    for step in steps:
        base = standing_bytes(chain, optimizer, batch)
        with hp.probes.LiveBytes() as tracker:
            step(chain, batch, optimizer, horizon)
        peaks.append(base + tracker.peak)
    for _ in range(ROUNDS):
        for step, spent in zip(steps, seconds, strict=True):
            start = time.process_time()
            step(chain, batch, optimizer, horizon)
            spent.append(time.process_time() - start)
    plain, other = (statistics.median(spent[2:]) for spent in seconds)
    return peaks, other / plain


def main(names: list[str]) -> None:
    """Print one row a model and horizon; windows are disjoint."""
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    print(f"{'KiB':25}{'h':>4}{'gradients':>11}{'plain':>11}{'fused':>11}{'saved':>11}{'in %':>7}{'time':>7}")
    for name in names or CASES:
        torch.manual_seed(0)
        model, batch = CASES[name]()
        chain = hp.Chain.from_model(model.train(), batch)
        gradients = own_bytes([p for p in chain.parameters() if p.requires_grad])
        for horizon in (1, 2, chain.depth // 2, chain.depth):
            (plain, less), ratio = measure(chain, batch, horizon)
            cells = "".join(
                f"{n / 1024:>{w}.0f}" for n, w in ((gradients, 11), (plain, 9), (less, 9), (plain - less, 9))
            )
            print(f"{name:25}{horizon:>4}{cells}{100 * (1 - less / plain):>7.1f}{ratio:>7.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
