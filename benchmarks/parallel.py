"""Parallel in time against serial and data-parallel SGD: time of two processes, accuracy, error of the predictions.

    python benchmarks/parallel.py               # runs what is missing; can be stopped and started again at any time
    python benchmarks/parallel.py --report      # tables and the picture, from what there is

Ellipses, Swiss roll (1,200 points each) and scikit-learn's digits; Verlet networks of 16 to 512 blocks, after "Predict
Globally, Correct Locally: Parallel-in-Time Optimal Control of Neural Networks", Section 5. A cell "time" starts two
processes of one thread each, in which all methods make their steps in turn, a few at a time; serial methods run in one
of them while the other waits. It keeps each round's wall time and the CPU time of both processes: on a machine that
others use too, the wall time of two processes measures the others. What two idle cores would need is at least the
larger of the two CPU times. A cell "train" is a whole training; its method runs in one process, which gives the same
weights bit for bit as two (tests/test_parallel_processes.py). Each cell is one entry of
benchmarks/results/parallel/cells.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cells import complete, load
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import horizonplan as hp
from horizonplan.algorithms import Algorithm, BackPropagation, Horizon, ParallelInTime, ParallelWindows
from horizonplan.datasets import digits, ellipses, swiss_roll
from horizonplan.models import DynamicalNet

FOLDER = Path(__file__).parent / "results" / "parallel"
CELLS = FOLDER / "cells.json"
BATCH, ROUNDS = 64, 5
DATA = {"ellipse": (ellipses, 2, 2), "swiss roll": (swiss_roll, 2, 2), "digits": (digits, 64, 10)}
EPOCHS = {"ellipse": 8, "swiss roll": 25, "digits": 10}
SPANS = {"ellipse": 6.0, "swiss roll": 20.0, "digits": 6.0}  # of the dynamics' time
WIDTHS = {"ellipse": 16, "swiss roll": 16, "digits": 64}
DEPTHS = (16, 64, 256, 512)
COARSE = 20
METHODS: dict[str, Callable[[], Algorithm]] = {
    "SGD": BackPropagation,
    "parallel": lambda: ParallelInTime(coarse_steps=COARSE),
    "single level": lambda: ParallelInTime(coarse_steps=0),
    "Eq. 6": lambda: ParallelInTime(coarse_steps=COARSE, targets=False, decay=1.0),
    "Eq. 6, single level": lambda: ParallelInTime(coarse_steps=0, targets=False, decay=1.0),
    "windows": ParallelWindows,
}
LONG = "longer coarse phase"


def network(name: str, depth: int) -> nn.Module:
    _, features, classes = DATA[name]
    return DynamicalNet(features, WIDTHS[name], classes, depth, "verlet", SPANS[name])


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def optimizer_for(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    """SGD does not learn the Swiss roll in so few epochs."""
    return partial(torch.optim.Adam, lr=3e-3) if name == "swiss roll" else sgd


def train(name: str, depth: int, method: str, seed: int) -> dict[str, Any]:
    """Accuracy after each epoch, and the predictions' errors, means over eighths of the run."""
    data, validation = DATA[name][0](seed=0)
    torch.manual_seed(seed)
    model = network(name, depth)
    made = METHODS[method]() if method != LONG else ParallelInTime(coarse_steps=12 * EPOCHS[name])  # about half
    loader = DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    result = hp.train(
        model,
        loader,
        algorithm=made,
        epochs=EPOCHS[name],
        optimizer=optimizer_for(name),
        val_data=validation,
        watch_every=0,
        progress=False,
        seed=seed,
    )
    accuracy = [round(entry["accuracy"], 4) for entry in result.validations]
    found: dict[str, Any] = {"accuracy": accuracy, "loss": result.final_loss}
    errors = getattr(made, "errors", [])
    eighths = [errors[len(errors) * i // 8 : len(errors) * (i + 1) // 8] for i in range(8)] if errors else []
    for what in ("mse", "relative", "epsilon_p"):
        found[what] = [statistics.median(getattr(e, what) for e in part) for part in eighths]
    return found


def steps_of(name: str, depth: int) -> dict[str, Callable[[int], object]]:
    """What makes step n of each method in this process."""
    generator = torch.Generator().manual_seed(0)
    _, features, classes = DATA[name]
    batches = [
        (torch.randn(BATCH, features, generator=generator), torch.randint(0, classes, (BATCH,), generator=generator))
        for _ in range(4)
    ]
    rank, found = dist.get_rank(), {}

    def method(made: Algorithm, serial: bool) -> Callable[[int], object]:
        torch.manual_seed(0)
        chain = hp.Chain.from_model(network(name, depth), batches[0])
        optimizer = sgd(chain.parameters())
        if serial:
            return lambda n: made.step(chain, batches[n % 4], optimizer) if rank == 0 else None
        return lambda n: made.step(chain, batches[n % 4], optimizer)

    def halves() -> Callable[[int], object]:
        torch.manual_seed(0)
        model = network(name, depth)
        optimizer, own = sgd(model.parameters()), slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)

        def step(n: int) -> None:
            x, y = batches[n % 4]
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x[own]), y[own]).backward()
            gradients = [p.grad for p in model.parameters()]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            pieces = torch.split(flat / 2, [g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
            optimizer.step()

        return step

    found["SGD"] = method(BackPropagation(), serial=True)
    found["data-parallel SGD"] = halves()
    found["parallel"] = method(ParallelInTime(coarse_steps=0), serial=False)
    found["coarse"] = method(ParallelInTime(coarse_steps=10**6), serial=False)
    found["windows"] = method(ParallelWindows(), serial=False)
    found["windows, serial"] = method(Horizon(depth // 2, depth // 2), serial=True)
    return found


def measure(name: str, depth: int, file: Path) -> None:
    """In one of two processes: rounds of a few steps, the methods in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steps, count = steps_of(name, depth), min(20, max(3, 640 // depth))
    rounds: dict[str, list[list[float]]] = {method: [] for method in steps}
    for turn in range(ROUNDS + 1):
        for method, step in steps.items():
            dist.barrier()
            wall, busy = time.perf_counter(), time.process_time()
            for n in range(count):
                step(n)
            busy = (time.process_time() - busy) / count
            dist.barrier()
            wall = (time.perf_counter() - wall) / count
            both: list[Any] = [None, None]
            dist.all_gather_object(both, busy)
            if turn:
                rounds[method].append([wall, *both])
    if dist.get_rank() == 0:
        file.write_text(json.dumps(rounds))


def times(name: str, depth: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "times.json")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*launch, __file__, "--measure", name, str(depth), str(file)], check=True, timeout=290)
        return {"rounds": json.loads(file.read_text()), "load": os.getloadavg()[0]}


def cells() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Everything to be measured, most wanted first."""
    for depth in (64, 256, 16):
        yield f"time digits {depth}", partial(times, "digits", depth)
    for depth in (64, 16):
        for name in DATA:
            for method in (*METHODS, LONG):
                yield f"train {name} {depth} {method} 0", partial(train, name, depth, method, 0)
    yield "time digits 512", partial(times, "digits", 512)
    for depth in (64, 256):
        yield f"time swiss roll {depth}", partial(times, "swiss roll", depth)
    for method in ("SGD", "parallel", "single level"):
        yield f"train digits 256 {method} 0", partial(train, "digits", 256, method, 0)
        for name in ("digits", "swiss roll"):
            yield f"train {name} 64 {method} 1", partial(train, name, 64, method, 1)


def run() -> None:
    torch.set_num_threads(1)
    found = load(CELLS)
    complete(CELLS, found, cells(), hidden="rounds")


def best(cell: dict[str, Any], method: str) -> tuple[float, float]:
    """Of a step: the least wall time, and the least CPU time of the busier process; in seconds."""
    rounds = cell["rounds"][method]
    return min(row[0] for row in rounds), max(min(row[1] for row in rounds), min(row[2] for row in rounds))


def report() -> None:
    found = load(CELLS)
    print(
        "milliseconds a step: wall, least of the rounds (CPU of the busier process); speed-up over serial SGD by both"
    )
    for cell in (c for c in found if c.startswith("time ")):
        exact = best(found[cell], "SGD")
        print(f"{cell.removeprefix('time ')} (load {found[cell]['load']:.0f})")
        for method in found[cell]["rounds"]:
            wall, busy = best(found[cell], method)
            ratios = f"{exact[0] / wall:5.2f}x {exact[1] / busy:5.2f}x"
            print(f"    {method:<20}{1e3 * wall:8.1f} ({1e3 * busy:6.1f}) {ratios}")
    print("\nfinal accuracy; epochs, and seconds of two idle cores at best, to SGD's accuracy - 0.01, coarse included")
    for name in DATA:
        for depth in DEPTHS:
            rows(found, name, depth)
    print(f"\nCPU minutes: {sum(c['cpu_seconds'] for c in found.values()) / 60:.1f}, cells: {len(found)}")
    picture(found)


def rows(found: dict[str, Any], name: str, depth: int) -> None:
    cell = found.get(f"time {name} {depth}") or found.get(f"time digits {depth}")
    for seed in (0, 1):
        exact = found.get(f"train {name} {depth} SGD {seed}")
        for method in (*METHODS, LONG) if exact else ():
            run = found.get(f"train {name} {depth} {method} {seed}")
            if run is None:
                continue
            goal = exact["accuracy"][-1] - 0.01
            epochs = next((i + 1 for i, a in enumerate(run["accuracy"]) if a >= goal), None)
            timed = "windows" if method == "windows" else "SGD" if method == "SGD" else "parallel"
            taken = ""
            if epochs and cell:
                coarse = {"parallel": COARSE, "Eq. 6": COARSE, LONG: 12 * EPOCHS[name]}.get(method, 0)
                steps = max(0, epochs * -(-len(DATA[name][0](seed=0)[0]) // BATCH) - coarse)
                taken = f"{steps * best(cell, timed)[1] + coarse * best(cell, 'coarse')[1]:6.2f} s"
            errors = " ".join(f"{e:.2f}" for e in run["relative"][::2] + run["relative"][-1:])
            told = f"{name:<11}{depth:>4} seed {seed} {method:<20}{run['accuracy'][-1]:.3f} {epochs or '-':>4} epochs"
            print(f"{told} {taken:>9}   relative error {errors}" if errors else f"{told} {taken:>9}")


def picture(found: dict[str, Any]) -> None:
    """Figure 3: the regression's error with and without global prediction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(DATA), figsize=(11, 3), constrained_layout=True)
    for axis, name in zip(axes, DATA, strict=True):
        for method in METHODS:
            run = found.get(f"train {name} 64 {method} 0", {})
            if run.get("mse"):
                axis.semilogy([(i + 0.5) / 8 for i in range(8)], run["mse"], label=method, linewidth=1)
        axis.set(title=f"{name}, 64 blocks", xlabel="share of the run")
    axes[0].set_ylabel("mean square error\nof the predicted co-state")
    axes[-1].legend(fontsize=7)
    figure.savefig(FOLDER / "errors.png", dpi=120)


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        report() if "--report" in sys.argv else run()
