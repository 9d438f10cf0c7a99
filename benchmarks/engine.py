"""What the engine adds to a step: process time of ``horizon_backward`` at h = T against ``loss.backward()``.

    OMP_NUM_THREADS=1 python benchmarks/engine.py

All ways in turn within each round, so that a slow moment of the machine strikes all alike; medians and their ratios.
"""

import statistics
import time

import torch

import horizonplan as hp
from horizonplan.models import ResidualCNN

ROUNDS = 25


def main() -> None:
    """Print milliseconds and ratios to plain back-propagation."""
    torch.manual_seed(0)
    model = ResidualCNN(1, (16, 32, 64), 3)
    batch = torch.randn(64, 1, 14, 14), torch.randint(0, 10, (64,))
    chain = hp.Chain.from_model(model, batch)
    ways = {
        "loss.backward()": lambda: chain.loss(batch).backward(),
        "h = T": lambda: hp.horizon_backward(chain, batch, chain.depth),
        "h = T, recompute": lambda: hp.horizon_backward(chain, batch, chain.depth, recompute=1),
        "h = 4, s = 4": lambda: hp.horizon_backward(chain, batch, 4, 4),
        "h = 4, s = 1": lambda: hp.horizon_backward(chain, batch, 4, 1),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            model.zero_grad(set_to_none=True)
            start = time.process_time()
            way()
            spent[name].append(time.process_time() - start)
    medians = {name: statistics.median(values[2:]) for name, values in spent.items()}
    plain = medians["loss.backward()"]
    for name, seconds in medians.items():
        print(f"{name:<20}{1e3 * seconds:>8.1f} ms{seconds / plain:>8.2f}")


if __name__ == "__main__":
    main()
