"""How far the memory fold is from the tracker: predicted against measured peak bytes of real steps.

    python benchmarks/memory_fold.py            # all families, a few minutes on one core
    python benchmarks/memory_fold.py llama gpt2

For every family a small model is profiled once. Then each schedule is predicted by the fold and executed
under the tracker, and the two peaks (activations and gradients of one forward and backward) are compared:
all h, s in {1, 2, h}, recompute 0, 1, 2, and 30 lists of random windows, half of them with recompute.
Errors are in per cent of the measured peak; negative ones are underestimates.
"""

import random
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import families
import torch
import transformers as tf

from horizonplan import Chain, Schedule, Window
from horizonplan.gradient import execute
from horizonplan.predict import activation_bytes
from horizonplan.probes import LiveBytes, Profile, profile

COLUMNS = ("windows", "windows, recompute", "random", "random, recompute")
RANDOM_LISTS = 30
HUGGING_FACE = ("gpt2", "llama", "gemma2", "bert", "distilbert", "vit", "resnet", "convnext")
FAMILIES = (*HUGGING_FACE, "residual_mlp", "residual_cnn", "transformer", "sequential_cnn")


def random_windows(depth: int, recompute: int, draw: random.Random) -> Schedule:
    """A valid list of windows that overlap as they like."""
    ends = sorted(draw.choices(range(1, depth), k=draw.randint(0, 4))) if depth > 1 else []
    windows = []
    for end in ends:
        first = draw.randrange(end)
        windows.append(Window(first, draw.randint(first + 1, end), end))
    missing = set(range(depth)) - {t for w in windows for t in range(w.first, w.stop)}
    first = draw.randint(0, min(missing, default=depth - 1))
    stop = draw.randint(max(missing, default=first) + 1, depth)
    return Schedule(depth, (*windows, Window(first, max(stop, first + 1), depth)), recompute)


def schedules(depth: int) -> Iterator[tuple[str, Schedule]]:
    """Every schedule to be compared, with its column."""
    for h in range(1, depth + 1):
        for s in sorted({1, min(2, h), h}):
            for k in (0, 1, 2):
                yield COLUMNS[k > 0], Schedule.horizon(depth, h, s, k)
    draw = random.Random(0)
    for i in range(RANDOM_LISTS):
        k = (0, 1, 0, 2)[i % 4]
        yield COLUMNS[2 + (k > 0)], random_windows(depth, k, draw)


def error(chain: Chain, batch: Any, costs: Profile, schedule: Schedule) -> float:
    """Predicted over measured peak, less one, in per cent."""
    ops = costs.ops(schedule)
    for p in chain.parameters():
        p.grad = None
    with LiveBytes() as tracker:
        execute(chain, batch, ops)
    return (activation_bytes(ops, costs) / tracker.peak - 1) * 100


def compare(family: Callable[[], families.Built]) -> tuple[int, dict[str, list[float]]]:
    """Depth and errors by column of one family."""
    torch.manual_seed(0)
    model, batch = family()
    chain = Chain.from_model(model.train(), batch)
    costs = profile(chain, batch, repeats=0)
    errors: dict[str, list[float]] = {column: [] for column in COLUMNS}
    for column, schedule in schedules(chain.depth):
        errors[column].append(error(chain, batch, costs, schedule))
    return chain.depth, errors


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    print("median and worst error in per cent of the tracker's peak")
    print(f"{'':15}{'T':>3}" + "".join(f"{column:>22}" for column in COLUMNS))
    for name in names or FAMILIES:
        depth, errors = compare(getattr(families, name))
        cells = [f"{statistics.median(map(abs, e)):.2f} {max(e, key=abs):+.2f}" for e in errors.values()]
        print(f"{name:15}{depth:3}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
