"""What the paper's warm-up (small horizons first) saves until the loss is that of the final method alone.

    OMP_NUM_THREADS=1 python benchmarks/warm_up.py               # all, some ten minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/warm_up.py transformer

"Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive Control" finds that small horizons do
well early in training. Here the final method trains alone for EPOCHS epochs; the median losses of its last quarter are
the targets. With `warmup` the same model, data and seed train for up to half as long again. Columns:

- `train`, `val`: process seconds until an epoch's training or validation loss is at the target for the first time, over
  those of the final method alone; mean and deviation over the seeds that get there, and how many do. In brackets the
  same in epochs.
- `s/epoch`: seconds of an epoch of the warm-up over those of one of the final method.
- `peak`: bytes of the largest step during the warm-up, over those of the largest step of the run.
- `at E`: training and validation loss after EPOCHS epochs, and the validation accuracy; means over the seeds.

An epoch's seconds are its steps times their median, so that steps whose memory is tracked do not count.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import horizonplan as hp
from horizonplan.datasets import digits
from horizonplan.models import Patches, ResidualCNN, SequenceClassifier

EPOCHS, SEEDS, DEPTH, ROWS = 16, (0, 1, 2), 8, 50
SHARES = (0.0, 0.25, 0.5)  # of EPOCHS
MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": lambda: nn.Sequential(Patches(2), SequenceClassifier(4, 16, 10, width=32, depth=DEPTH)),
    "CNN": lambda: ResidualCNN(1, (16, 32), DEPTH // 2),
}
METHODS = {
    "BP": hp.algorithms.Horizon(DEPTH, DEPTH),
    f"h = {DEPTH // 2}, disjoint": hp.algorithms.Horizon(DEPTH // 2, DEPTH // 2),
}


@dataclass
class Epochs(hp.Callback):
    """What each epoch of a run took and reached."""

    ended: float = 0.0
    steps: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=lambda: {"loss": [], "val_loss": [], "val_accuracy": []})

    def on_train_begin(self, run: Any) -> None:
        self.ended = time.process_time()

    def on_step_end(self, run: Any, step: Any) -> None:
        self.steps.append(time.process_time() - self.ended)
        self.ended = time.process_time()

    def on_epoch_end(self, run: Any, epoch: Any) -> None:
        self.seconds.append(len(self.steps) * statistics.median(self.steps))
        self.peaks.append(run.peak_bytes)
        for name, values in self.losses.items():
            values.append(epoch[name])
        self.steps.clear()
        self.ended = time.process_time()

    def until(self, name: str, target: float) -> tuple[float, int] | None:
        """Seconds and epochs until a loss is at most ``target``."""
        for epoch, loss in enumerate(self.losses[name], start=1):
            if loss <= target:
                return sum(self.seconds[:epoch]), epoch
        return None


def trained(make: Callable[[], nn.Module], method: hp.algorithms.Algorithm, warmup: int, seed: int) -> Epochs:
    """Train a model of a seed; alone for EPOCHS epochs, after a warm-up for half as many more."""
    torch.manual_seed(seed)
    train, val = digits(images=True, seed=seed)
    epochs = Epochs()
    hp.train(
        make(),
        DataLoader(train, ROWS, shuffle=True),
        algorithm=method,
        warmup=warmup,
        epochs=EPOCHS * 3 // 2 if warmup else EPOCHS,
        val_data=val,
        callbacks=[epochs],
        watch_every=len(train) // ROWS,
        seed=seed,
        progress=False,
    )
    return epochs


def groups_of(make: Callable[[], nn.Module], method: hp.algorithms.Algorithm) -> list[list[Epochs]]:
    """The runs of all seeds by the share of warm-up. A seed's runs follow each other: the machine changes little."""
    by_seed = [[trained(make, method, round(share * EPOCHS), seed) for share in SHARES] for seed in SEEDS]
    return [list(runs) for runs in zip(*by_seed, strict=True)]


def reached(name: str, alone: Sequence[Epochs], runs: Sequence[Epochs]) -> str:
    """Time (and epochs) to the loss that the method alone ends with, over its own."""
    seconds, epochs = [], []
    for before, run in zip(alone, runs, strict=True):
        target = statistics.median(before.losses[name][-EPOCHS // 4 :])
        own, found = before.until(name, target), run.until(name, target)
        assert own is not None
        if found is not None:
            seconds.append(found[0] / own[0])
            epochs.append(found[1] / own[1])
    if not seconds:
        return f"never, 0/{len(runs)}"
    return f"{statistics.fmean(seconds):.2f} ±{statistics.pstdev(seconds):.2f} [{statistics.fmean(epochs):.2f}], " + (
        f"{len(seconds)}/{len(runs)}"
    )


def main(names: list[str]) -> None:
    """Print one row a model, method and share of warm-up."""
    columns = f"{'train':>22}{'val':>24}{'s/epoch':>9}{'peak':>6}{'at E: train, val, accuracy':>29}"
    print(f"{'':13}{'':17}{'warm-up':8}{columns}")
    for name in names or MODELS:
        for label, method in METHODS.items():
            alone, *_ = groups = groups_of(MODELS[name], method)
            for share, runs in zip(SHARES, groups, strict=True):
                warmup = round(share * EPOCHS)
                early = [statistics.fmean(run.seconds[: warmup or EPOCHS]) for run in runs]
                final = [statistics.fmean(run.seconds) for run in alone]
                ratio = statistics.fmean(a / b for a, b in zip(early, final, strict=True))
                peak = statistics.fmean(run.peaks[(warmup or EPOCHS) - 1] / run.peaks[-1] for run in runs)
                ends = [statistics.fmean(run.losses[key][EPOCHS - 1] for run in runs) for key in runs[0].losses]
                cells = f"{reached('loss', alone, runs):>22}{reached('val_loss', alone, runs):>24}"
                at_end = f"{ends[0]:.4f}, {ends[1]:.3f}, {ends[2]:.3f}"
                print(f"{name:13}{label:17}{share:>7.0%}{cells:>47}{ratio:9.2f}{peak:6.2f}{at_end:>29}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
