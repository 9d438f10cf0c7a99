"""What tests/test_parallel_processes.py runs: ``torchrun parallel_jobs.py JOB FOLDER``; each writes what it saw."""

import copy
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.algorithms import Horizon, ParallelInTime, ParallelWindows
from horizonplan.models import DynamicalNet, ResidualCNN

TIME_LIMIT = 5.0


def convolutional():
    """Running statistics in stem and blocks; a stride between the blocks."""
    torch.manual_seed(4)
    return ResidualCNN(1, (4, 8), 3, classes=3)


def points():
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(6 - n % 2, 3, generator=generator), torch.randint(0, 3, (6 - n % 2,), generator=generator))
        for n in range(8)
    ]


def images():
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(6, 1, 8, 8, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])) for _ in range(6)]


def dense():
    torch.manual_seed(1)
    return DynamicalNet(3, 4, 3, depth=9, scheme="verlet")


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


CASES = {
    "exact": lambda parts: (dense(), points(), ParallelInTime(parts, exact=True, coarse_steps=0), momentum),
    "exact, AdamW": lambda parts: (dense(), points(), ParallelInTime(parts, exact=True, coarse_steps=0), None),
    "defaults": lambda parts: (dense(), points(), ParallelInTime(parts, coarse_steps=3), None),
    "single level": lambda parts: (dense(), points(), ParallelInTime(parts, coarse_steps=0), momentum),
    "convolutional": lambda parts: (convolutional(), images(), ParallelInTime(parts, coarse_steps=2), None),
    "windows": lambda parts: (dense(), points(), ParallelWindows(parts), None),
    "convolutional windows": lambda parts: (convolutional(), images(), ParallelWindows(parts), momentum),
}


def trained(name, parts, **options):
    """Weights, losses, metrics, optimiser state and errors of a run by the trainer."""
    model, batches, method, optimizer = CASES[name](parts)
    held = []

    def make(parameters):
        held.append(optimizer(parameters) if optimizer else torch.optim.AdamW(parameters, lr=1e-2))
        return held[0]

    options = {"epochs": 2, "optimizer": make, "val_data": batches[:3], "progress": False} | options
    result = hp.train(model, batches, algorithm=method, loss=F.cross_entropy, **options)
    return {
        "model": model.state_dict(),
        "losses": [entry["loss"] for entry in result.history],
        "metrics": result.val_metrics,
        "optimizer": held[0].state_dict()["state"],
        "errors": [[e.step, e.cut, e.mse] for e in getattr(method, "errors", [])],
    }


def messages():
    """Point-to-point messages of this process in each step but the first ones."""
    counted, send = [0], dist.isend

    def counting(*args, **kwargs):
        counted[0] += 1
        return send(*args, **kwargs)

    found = {}
    for kind in (lambda: ParallelInTime(coarse_steps=0), ParallelWindows):
        model, batches, method = dense(), points(), kind()
        chain, optimizer = hp.Chain.from_model(model, batches[0]), momentum(model.parameters())
        dist.isend = counting
        per_step = []
        for batch in batches:
            before = counted[0]
            method.step(chain, batch, optimizer)
            per_step.append(counted[0] - before)
        dist.isend = send
        method.gather(chain, optimizer)
        found[type(method).__name__] = per_step[2:]
    return found


def refusals():
    """What is said of a run that cannot be."""

    def said(**options):
        try:
            hp.train(dense(), options.pop("data", points()), loss=F.cross_entropy, progress=False, **options)
        except ValueError as error:
            return str(error)
        return ""

    own = [(x + dist.get_rank(), y) for x, y in points()]
    world = dist.get_world_size()
    return {
        "parts": said(algorithm=ParallelInTime(world + 1)),
        "mixed": said(algorithm={0: ParallelInTime(world), 1: Horizon(2)}, epochs=2),
        "batches": said(algorithm=ParallelInTime(world, coarse_steps=0), data=own),
    }


def resumed(folder, parts):
    """A run that stops in the middle of its second epoch and goes on."""

    class Stop(hp.Callback):
        def on_step_end(self, run, entry):
            if run.step == 11:
                run.stop("enough")

    options = {"run_dir": folder / "run", "save_every": 5}
    first = trained("defaults", parts, callbacks=[Stop()], **options)
    second = trained("defaults", parts, resume=True, epochs=3, **options)
    return {"first": len(first["losses"]), "second": second}


def together(folder):
    """All of the above in one launch, inside a process group of the caller's."""
    dist.init_process_group("gloo")
    parts = dist.get_world_size()
    found = {"cases": {name: trained(name, parts) for name in CASES}, "resumed": resumed(folder, parts)}
    if parts == 2:
        found["messages"] = messages()
    found["refusals"] = refusals()
    torch.save(found, folder / f"together-{dist.get_rank()}.pt")


class Trouble(hp.Callback):
    """In process 1 at step 7."""

    def __init__(self, kind):
        self.kind = kind

    def on_step_end(self, run, entry):
        if run.step == 7 and os.environ.get("RANK") == "1":
            if self.kind == "dies":
                os._exit(9)
            if self.kind == "hangs":
                time.sleep(600)
            if self.kind == "diverges":
                with torch.no_grad():
                    run.model.head.weight.fill_(torch.inf)


def troubled(folder, kind):
    """Save every second step; trouble in step 7, in the first run."""
    method = ParallelInTime(2, coarse_steps=3, time_limit=TIME_LIMIT)
    model = dense()
    options = {"run_dir": folder / kind, "save_every": 2, "resume": True, "progress": False}
    callbacks = [] if os.environ.get("TROUBLE") == "none" else [Trouble(kind)]
    hp.train(model, points(), algorithm=method, loss=F.cross_entropy, epochs=2, callbacks=callbacks, **options)
    if os.environ.get("RANK", "0") == "0":
        torch.save(copy.deepcopy(model.state_dict()), folder / f"{kind}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, folder, *rest = sys.argv[1:]
    globals()[job](Path(folder), *rest)
