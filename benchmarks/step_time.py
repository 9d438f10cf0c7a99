"""How far predicted seconds of a step are from measured ones, in one run on one machine.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py            # a few minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/step_time.py mlp --rounds 20

Predicted: `predict.step_seconds` over a profile whose operations are timed once a round. Measured: one whole AdamW step
of every schedule a round. Operations and steps take turns in every round, so that a slow moment of the machine strikes
both. Means over the rounds, the first left out. "wall" is what a clock on the wall shows, with all that other programs
take; "cpu" is the time of this process alone, which other programs hardly change.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import families
import torch

from horizonplan import Chain, Schedule
from horizonplan.chain.calls import training_mode
from horizonplan.predict import step_seconds
from horizonplan.probes import seconds
from horizonplan.probes.memory import step
from horizonplan.probes.profile import profile
from horizonplan.probes.seconds import Timer, kinds_of
from horizonplan.probes.steady import optimizer_for, restored, trainable

MODELS: dict[str, Callable[[], families.Built]] = {
    "cnn": lambda: families.residual_cnn(widths=(8, 16, 32), blocks_per_stage=4),
    "transformer": lambda: families.transformer(depth=8, width=64),
    "mlp": lambda: families.residual_mlp(depth=12, width=256, rows=256),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Key = tuple[int, int, int]  # horizon, stride, recompute


def schedules(depth: int) -> list[Key]:
    """Horizons of all sizes at s = 1 and s = h; disjoint windows and back-propagation recomputed as well."""
    pairs = [(h, s) for h in sorted({1, 2, depth // 2, depth - 1, depth}) for s in dict.fromkeys((1, h))]
    pairs = [(h, s) for h, s in pairs if h < depth or s == 1]
    return [(h, s, k) for h, s in pairs for k in ((0, 2) if s == h > 1 or h == depth else (0,))]


def errors(name: str, rounds: int, clock: Callable[[], float]) -> dict[Key, float]:
    """Predicted over measured seconds, less one, of each schedule."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    chain = Chain.from_model(model.train(), batch)
    keys = schedules(chain.depth)
    measured: dict[Key, list[float]] = {key: [] for key in keys}
    updates = []

    def ticking(chain: Chain) -> float:
        return clock()

    with (
        training_mode(model),
        restored(chain, weights=True),
        mock.patch.object(seconds, "now", ticking),
    ):
        costs = profile(chain, batch, repeats=0, summed=False)
        timer = Timer(chain, batch, kinds_of(costs.costs))
        made = optimizer_for(trainable(chain), None)
        for turn in range(rounds + 1):
            timer.run()
            updates.append(_update(chain, made, clock))
            for key in keys:
                start = clock()
                step(chain, batch, Schedule.horizon(chain.depth, *key), made)
                measured[key].append(clock() - start)
            if turn == 0:
                timer.times.clear()
    predicted = replace(costs, seconds=timer.means(), update_seconds=statistics.fmean(updates[1:]))
    return {key: _error(step_seconds(_schedule(chain, key), predicted), values[1:]) for key, values in measured.items()}


def _update(chain: Any, made: torch.optim.Optimizer, clock: Callable[[], float]) -> float:
    for p in trainable(chain):
        p.grad = torch.zeros_like(p)
    start = clock()
    made.step()
    return clock() - start


def _schedule(chain: Any, key: Key) -> Schedule:
    return Schedule.horizon(chain.depth, *key)


def _error(predicted: float | None, measured: list[float]) -> float:
    assert predicted is not None
    return predicted / statistics.fmean(measured) - 1


def main() -> None:
    """Print a table of errors, and their medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=tuple(CLOCKS), help="default: both")
    asked = parser.parse_args()
    for clock in [asked.clock] if asked.clock else CLOCKS:
        every: list[float] = []
        for name in asked.models:
            found = errors(name, asked.rounds, CLOCKS[clock])
            every += map(abs, found.values())
            shown = "  ".join(f"{key}: {100 * error:+.0f}" for key, error in found.items())
            median = 100 * statistics.median(map(abs, found.values()))
            print(f"{clock:<5} {name:<12} median |error| {median:4.1f} %   (h, s, k): per cent   {shown}", flush=True)
        middle, worst = 100 * statistics.median(every), 100 * max(every)
        print(f"{clock:<5} {'all':<12} median |error| {middle:4.1f} %, worst {worst:.1f} %", flush=True)


if __name__ == "__main__":
    main()
