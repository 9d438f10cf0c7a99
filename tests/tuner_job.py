"""What the tuner's tests tune: small models, data and functions that can be named in another process.

As a script: ``tuner_job.py STORAGE TRIALS WORKERS`` tunes until there are so many trials.
"""

import os
import sys
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

import horizonplan as hp

DEPTH, WIDTH = 4, 8


class MLP(nn.Module):
    """A chain of blocks; ``harm`` happens in its forward when it trains."""

    def __init__(self, width=WIDTH, harm=None):
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(DEPTH))
        self.head = nn.Linear(width, 3)
        self.harm = harm

    def forward(self, x):
        if self.harm is not None and self.training:
            self.harm()
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Asking(nn.Sequential):
    """A block that looks at values."""

    def forward(self, x):
        return super().forward(x) if x.isfinite().all().item() else x


def raises():
    raise RuntimeError("a bug in the model")


def runs_out():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def crashes():
    os.kill(os.getpid(), 9)


def sleeps():
    time.sleep(600)


def model():
    torch.manual_seed(0)
    return MLP()


def dataset(count=64):
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def maker(harm=None, width=WIDTH):
    torch.manual_seed(0)
    return MLP(width, None if harm is None else globals()[harm])


def harms(trial):
    """The second trial crashes, the third raises, the fourth runs out of memory."""
    return {"model": {"harm": {1: "crashes", 2: "raises", 3: "runs_out"}.get(trial.number)}}


def decays(trial):
    return {"optimizer": {"weight_decay": trial.suggest_float("weight_decay", 0, 1)}}


def accumulates(trial):
    return {"train": {"accumulate": trial.suggest_categorical("accumulate", [1, 2])}}


def not_a_number(outputs, targets):
    return float("nan")


def hangs(trial):
    return {"model": {"harm": "sleeps"}}


def tune(storage, trials, workers, **options):
    return hp.tune_horizon(
        model(), dataset(), val_data=dataset(32), storage=storage, trials=trials, workers=workers, epochs=2, **options
    )


if __name__ == "__main__":
    made = tune(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(len(made.trials))
