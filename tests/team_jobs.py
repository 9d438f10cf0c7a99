"""What tests/test_team.py runs in several processes: ``torchrun team_jobs.py JOB FOLDER``; each writes what it saw."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import horizonplan as hp
from horizonplan import algorithms
from horizonplan.batch import resolve_loss
from horizonplan.training import Terminated, evaluate
from horizonplan.training.team import team

SIZES = 6, 3, 5, 4, 2  # rows of the batches: three rounds for two processes, the last one with one batch only
CASES = {
    "back-propagation": {},
    "horizon": {"algorithm": algorithms.Horizon(2), "max_grad_norm": 0.05},
    "recompute": {"algorithm": algorithms.Horizon(2, 2, 1), "scheduler": hp.DecayOnGrowth, "cosine_every": 1},
    "fused": {"algorithm": algorithms.Horizon(2), "fused": True},
    "accumulate": {"algorithm": algorithms.LocalLearning(2), "accumulate": 2},
}


class Tied(nn.Module):
    """Blocks, two of which share a weight."""

    def __init__(self, norm=False, dropout=0.0, wide=0):
        super().__init__()
        torch.manual_seed(2)
        layers = [[nn.Linear(4, 4), nn.Tanh()] for _ in range(4)]
        layers[2][0].weight = layers[0][0].weight
        for layer in layers:
            layer += [nn.BatchNorm1d(4)] * norm + [nn.Dropout(dropout)]
        self.blocks = nn.ModuleList(nn.Sequential(*layer) for layer in layers)
        self.head = nn.Linear(4, 3 + wide)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batches(sizes=SIZES, wrong=()):
    """Batches of doubles; those numbered in ``wrong`` have a NaN."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for number, size in enumerate(sizes):
        x = torch.randn(size, 4, dtype=torch.float64, generator=generator)
        if number in wrong:
            x[0, 0] = torch.nan
        found.append((x, torch.randint(0, 3, (size,), generator=generator)))
    return found


def untold():
    """The samples of the first batch cannot be told from its tensors."""
    (x, _), (y, _) = batches((8, 3))
    return [(x, torch.zeros(5)), (y, torch.zeros(3))]


def squares(model, batch):
    return model(batch[0]).square().mean()


def steep(model, batch):
    """A loss whose gradient on the second batch, one of process 1, is too large for fp16 at the first scale."""
    x, y = batch
    return nn.functional.cross_entropy(model(x), y) * (1000 if len(x) == SIZES[1] else 1)


def joint(found, world, accumulate=1):
    """The batches of all processes and micro-batches of a step in one."""
    each = world * accumulate
    groups = [found[i : i + each] for i in range(0, len(found), each)]
    return [tuple(torch.cat(parts) for parts in zip(*group, strict=True)) for group in groups]


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def trained(data, model=None, **options):
    model = Tied().double() if model is None else model
    result = hp.train(model, data, **{"epochs": 2, "optimizer": adam, "progress": False, **options})
    losses = [entry["loss"] for entry in result.history]
    found = {"model": model.state_dict(), "losses": losses, "stopped": result.stopped}
    return found | {"validations": list(result.validations)}


def refused(data, model=None, **options):
    try:
        trained(data, model, **options)
    except (ValueError, FloatingPointError) as error:
        return str(error)
    return None


# Jobs: what each process writes


def equalities(folder):
    found = {name: trained(batches(), **options) for name, options in CASES.items()}
    found["again"] = trained(batches(), **CASES["horizon"])
    found["not fused"] = trained(batches(), **{**CASES["fused"], "fused": False})
    found["skip"] = trained(batches((4, 4, 4), wrong=[1]), nonfinite="skip")
    found["raise"] = refused(batches((4, 4, 4), wrong=[1]))
    options = {"nonfinite": "rollback", "save_every": 1, "run_dir": folder / "rollback"}
    found["rollback"] = trained(batches((4, 4, 4, 4), wrong=[3]), **options)
    found["untold"] = trained(untold(), compute_loss=squares)
    single = [(x.float(), y) for x, y in batches()]
    found["fp16"] = trained(single, Tied(), compute_loss=steep, precision="fp16", run_dir=folder / "fp16")
    found["norm"] = trained(batches(), Tied(norm=True).double())
    return found


def counts(folder):
    """Parameters reduced in each step, in order."""
    found, plain = [], dist.all_reduce
    model = Tied().double()
    named = list(model.named_parameters())  # now: in a step the module has a stand-in for a tied weight

    class Steps:
        def on_train_begin(self, run):
            found.append([])

        def on_step_end(self, run, step):
            found.append([])

    def counting(tensor, *args, **options):
        found[-1].append(next(name for name, p in named if p.grad is tensor))
        return plain(tensor, *args, **options)

    dist.all_reduce = counting
    try:
        trained(batches(), model, callbacks=[Steps()], algorithm=algorithms.Horizon(2), accumulate=2, epochs=1)
    finally:
        dist.all_reduce = plain
    return found


def evaluations(folder):
    found = {}
    model, compute, place = Tied().double(), resolve_loss(), torch.device("cpu")
    metrics = {"largest": lambda output, target: output.amax()}
    x, y = batches((24,))[0]
    data = TensorDataset(x, y)
    loaders = {
        "list": batches(),
        "one batch": batches((6,)),
        "shuffled": DataLoader(data, batch_size=4, shuffle=True),
        "own generator": DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)),
    }
    if dist.is_initialized():
        loaders["shares by itself"] = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, shuffle=True))
        torch.manual_seed(dist.get_rank())
    with team(place) as together:
        for name, loader in loaders.items():
            found[name] = evaluate(model, loader, compute, place, metrics, together)
    found["trained"] = trained(batches(), epochs=1, val_data=batches((3, 2, 4)))
    return found


class StopAt:
    """Asks to stop on one process."""

    def __init__(self, event, rank, step):
        setattr(self, event, self.stop)
        self.rank, self.step = rank, step

    def stop(self, run, step):
        if run.rank == self.rank and run.step == self.step:
            run.stop(f"process {self.rank} at {self.step}")


def stops(folder):
    """A stop on one process, whenever it comes, also on the last batch of an epoch."""
    cases = [("on_step_end", 1), ("on_step_end", 3), ("on_epoch_end", 3)]
    return {
        case: trained(batches(), callbacks=[StopAt(case[0], 1, case[1])], run_dir=folder / f"stop-{case[0]}-{case[1]}")
        for case in cases
    } | {"on_save": trained(batches(), callbacks=[StopAt("on_save", 0, 3)], run_dir=folder / "stop-on-save")}


class Terminate:
    """Sends SIGTERM to one process in a step."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    def on_step_end(self, run, step):
        if run.rank == self.rank and step["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def resumes(folder):
    """SIGTERM to one process, at different places in an epoch of three steps, and the run after it."""
    x, y = batches((18,))[0]

    def made():
        return DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)

    def run(name, **options):
        torch.manual_seed(0)
        model = Tied(norm=True, dropout=0.2).double()
        return trained(made(), model, run_dir=folder / name, algorithm=algorithms.Horizon(2), epochs=3, **options)

    found = {"whole": run("whole")}
    for step in (0, 3, 5):
        try:
            run(f"ended-{step}", callbacks=[Terminate(step % 2, step)])
        except Terminated as end:
            found[step, "ended"] = end.code, str(end)
        found[step, "resumed"] = run(f"ended-{step}", resume=True)
    found["refused"] = refused(made(), run_dir=folder / "whole")
    return found


class Sums:
    """A metric that sees one process's batches only."""

    def update(self, output, target):
        pass

    def compute(self):
        return 0.0

    def reset(self):
        pass


class Branches(nn.Module):
    """Batches that are positive do not use one of the weights."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head, self.rare = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        negative = bool((x < 0).all())
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.rare(x) if negative else self.head(x)


def refusals(folder):
    """The last ones leave the default group out of step."""
    rank = dist.get_rank()
    found = {
        "data": refused(batches()[: 5 - 2 * rank]),
        "model": refused(batches(), Tied(wide=rank).double()),
        "metrics": refused(batches(), val_data=batches(), metrics={"mine": Sums()}),
        "no checkpoint": refused(batches(), run_dir=folder / "new", resume=folder / "nowhere"),
    }
    words = nn.Embedding(5, 4, sparse=True)
    optimizer = torch.optim.SGD(words.parameters(), lr=0.1)
    with team(torch.device("cpu")) as both, both.hooked(optimizer, [("words", words.weight)]):
        try:
            words(torch.tensor([1])).sum().backward()
        except ValueError as error:
            found["sparse"] = str(error)
    signs = [(x.abs() * sign, y) for (x, y), sign in zip(batches((4,) * 2), (1, -1), strict=True)]
    for fused in (True, False):
        found["fused branches" if fused else "branches"] = refused(signs, Branches().double(), fused=fused)
    return found


def together(folder):
    """All of the above in one launch, inside a process group of the caller's."""
    dist.init_process_group("gloo")
    jobs = equalities, counts, evaluations, stops, resumes, refusals
    found = {job.__name__: job(folder) for job in jobs}
    found["initialised"] = dist.is_initialized()
    return found


class Fails:
    """Process 1 breaks down in its third step, in the way asked for, if any."""

    def __init__(self, way):
        self.way, self.gradients = way, 0

    def on_train_begin(self, run):
        if run.rank == 1 and self.way == "in backward":
            run.model.blocks[0][0].bias.register_hook(self._third)

    def on_step_end(self, run, step):
        print("step", step["step"], flush=True)
        if run.rank == 1 and step["step"] == 2 and self.way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if run.rank == 1 and step["step"] == 2 and self.way == "in a callback":
            raise KeyError("broken")
        time.sleep(0.02 if step["step"] < 10 else 0.15)  # then a signal from outside comes before the end

    def _third(self, gradient):
        """When other gradients are under way."""
        self.gradients += 1
        if self.gradients == 3:
            raise KeyError("broken")


def breaks(folder, way):
    model = Tied(norm=True, dropout=0.2).double()
    return trained(batches(), model, callbacks=[Fails(way)], epochs=20, run_dir=folder / "run", resume=True)


# For the command line


def model():
    return Tied()


def data():
    found = [(x.float(), y) for x, y in batches()]
    return found, found


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, where, *rest = sys.argv[1:]
    seen = {"together": together, "breaks": breaks}[job](Path(where), *rest)
    torch.save(seen, Path(where, f"{job}-{os.environ['RANK']}.pt"))
