"""Fine-tuning with reconciled gradients, which the method's authors left open: MiniLM with LoRA on King James verses.

    python benchmarks/sgr_minilm.py             # runs what is missing; can be stopped and started again at any time
    python benchmarks/sgr_minilm.py --report    # the table from what there is

The model is that of examples/lora_minilm.py: a frozen encoder of 6 layers, LoRA matrices on query and value, a linear
head over the mean of the tokens' states; from a verse it tells the testament. 1,024 verses, one epoch in batches of 32,
300 verses for the accuracy. Modules are balanced in memory (the default). Each run is one entry of
benchmarks/results/sgr/minilm.json.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from cells import complete, load
from torch.utils.data import DataLoader

import horizonplan as hp
from horizonplan.algorithms import SGR, Algorithm, BackPropagation

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import kjv
import lora_minilm

RUNS = Path(__file__).parent / "results" / "sgr" / "minilm.json"
SEEDS, VERSES, BATCH = (0, 1, 2), (1024, 300), 32
METHODS: dict[str, Callable[[], Algorithm]] = {
    "BP": BackPropagation,
    "BP, checkpointed": lambda: BackPropagation(1),
    "weight 0": lambda: SGR(3, weight=0.0),
    "SGR": lambda: SGR(3),
}


def measured(make: Callable[[], Algorithm], seed: int) -> dict[str, Any]:
    """One training: accuracy and loss on other verses, peak bytes, seconds of this process's CPU."""
    parts = zip(kjv.split(kjv.load(), seed), VERSES, strict=True)
    train, held = (lora_minilm.encode(random.Random(seed).sample(part, count), "testament") for part, count in parts)
    torch.manual_seed(seed)
    model, method = lora_minilm.Classifier(2), make()
    order = DataLoader(train, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    result = hp.train(
        model, order, algorithm=method, optimizer=lora_minilm.optimizer, val_data=held, seed=seed, progress=False
    )
    bounds = method.bounds if isinstance(method, SGR) else ()
    return {
        "accuracy": result.val_metrics["accuracy"],
        "loss": result.val_metrics["loss"],
        "majority": lora_minilm.majority(train, held),
        "bytes": result.peak_bytes,
        "modules": [b - a for a, b in pairwise(bounds)],
    }


def run() -> None:
    """Run what is missing."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = load(RUNS)
    for seed in SEEDS:
        for name, make in METHODS.items():
            complete(RUNS, found, [(f"{name} {seed}", partial(measured, make, seed))], hidden="")


def report() -> None:
    """One line a method: means over seeds, the accuracy with its range."""
    found = load(RUNS)
    print(f"{'':<18}{'accuracy':>22}{'seeds':>7}{'loss':>7}{'peak MiB':>10}{'CPU s':>7}  modules")
    for name in METHODS:
        rows = [found[key] for seed in SEEDS if (key := f"{name} {seed}") in found]
        if rows:
            values = [row["accuracy"] for row in rows]
            mean = f"{statistics.fmean(values):.3f} ({min(values):.3f}..{max(values):.3f})"
            loss, size, cpu = (statistics.fmean(row[key] for row in rows) for key in ("loss", "bytes", "cpu_seconds"))
            modules = ", ".join(map(str, rows[0]["modules"]))
            print(f"{name:<18}{mean:>22}{len(rows):>7}{loss:>7.3f}{size / 2**20:>10.1f}{cpu:>7.1f}  {modules}".rstrip())
    if found:
        shares = [found[key]["majority"] for seed in SEEDS if (key := f"BP {seed}") in found]
        print(f"always the most frequent class: {statistics.fmean(shares):.3f}")


if __name__ == "__main__":
    report() if "--report" in sys.argv else run()
