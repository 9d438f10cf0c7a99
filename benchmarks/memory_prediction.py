"""How far predictions of M(h) are from measurement, on models of every kind, beside other tools.

    python benchmarks/memory_prediction.py                   # all models, some minutes on one core
    python benchmarks/memory_prediction.py gpt2 "plain CNN"
    pip install --no-deps torch-kitsune==0.7.0 ckptplan==0.1.0rc1    # without them their columns say "not installed"

M(h) is the peak of one full AdamW step: parameters, buffers, optimiser state, batch, activations, gradients and the
optimiser's temporaries. `probes.memory` measures it with the tracker of live storages. Small models, train mode, CPU.

Table 1: the fold (one profile a model, then `predict.step_bytes`) at all h with s = 1 and s = h, without and with
recomputing (every block, every 2), and the paper's line (`fit_memory` on the four horizons that `plan_horizon`
measures) at all h with s = 1. Errors in per cent of the measurement; "median worst", negative: too little.

Table 2: the same beside other tools (see other_tools.py). "engine" is the measured step of horizonplan, with which the
fold and the line are compared; "torch" the measured step of plain torch, loss.backward() and torch.utils.checkpoint
around every block, with which the others are compared, as they know no other. "kitsune" is its prediction, "less
margin" the same without the 15 % that it adds for the CUDA allocator.

Table 3: what a prediction takes, in steps of back-propagation of that model (plain torch, median of five). Finding the
blocks is part of "profile" and of "line"; "fold" comes on top for every schedule. Where a tool refuses, what it took
to refuse.
"""

import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import families
import other_tools
import torch
import transformers as tf

from horizonplan import Chain, Schedule, fit_memory, probes
from horizonplan.horizons import first_horizons
from horizonplan.predict import step_bytes
from horizonplan.probes.steady import optimizer_for, restored, trainable

MODELS: dict[str, Callable[[], families.Built]] = {
    "equal blocks": lambda: families.residual_mlp(depth=12, width=64, rows=256),
    "shrinking stages": lambda: families.residual_cnn(widths=(8, 16, 32), blocks_per_stage=4),
    "growing width": lambda: families.growing_mlp(widths=(16, 24, 32, 48, 64, 96, 128, 192), rows=256),
    "plain CNN": lambda: families.sequential_cnn(widths=(8, 8, 16, 16, 32, 32)),
    "mixer": lambda: families.mixer(depth=8, width=32),
    "transformer": lambda: families.transformer(depth=8, width=64),
    "gpt2": lambda: families.gpt2(depth=8, width=64, vocabulary=1000, length=64),
    "llama": lambda: families.llama(depth=8, width=64, vocabulary=1000, length=64),
    "gemma2": lambda: families.gemma2(depth=6, width=64, vocabulary=1000, length=32),
    "bert": lambda: families.bert(depth=8, width=64, length=64),
    "lora on bert": lambda: families.lora(depth=8, width=64, length=64),
    "vit": lambda: families.vit(depth=8, width=64, patch=8),
    "resnet": lambda: families.resnet(widths=(16, 32, 64), depths=(3, 3, 3)),
    "convnext": families.convnext,
    "gpt2, 32k words": lambda: families.gpt2(depth=6, width=64, vocabulary=32_000),
    "llama, 50k words": lambda: families.llama(depth=6, width=64, vocabulary=50_000),
}
TARGETS = (1.0, 3.0, 5.0)  # per cent: the fold's median, its worst, its worst with recomputing
NOT_INSTALLED = "not installed"
PACKAGES = ("torch", "transformers", "peft", "torch-kitsune", "ckptplan")
WIDTHS = {"fold": 14, "line": 14, "kitsune": 16, "less margin": 16, "ckptplan": 15, "MemTracker": 15}
Key = tuple[int, int, int]  # horizon, stride, recompute


@dataclass(frozen=True)
class Subject:
    """One model and what was measured and predicted on it."""

    name: str
    chain: Chain
    batch: Any
    base_bytes: int
    measured: dict[Key, int]
    folded: dict[Key, int]
    line: Callable[[int], float]
    seconds: dict[str, float]

    def fold_errors(self, wanted: Callable[[Key], bool]) -> list[float]:
        return [percent(self.folded[key], value) for key, value in self.measured.items() if wanted(key)]

    def line_errors(self) -> list[float]:
        return [percent(self.line(h), value) for (h, s, k), value in self.measured.items() if s == 1 and k == 0]


def percent(predicted: float, measured: float) -> float:
    return (predicted / measured - 1) * 100


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def step_seconds(chain: Chain, batch: Any) -> float:
    """One step of back-propagation in plain torch, the median of five."""
    with restored(chain, weights=True), chain.running():
        optimizer = optimizer_for(trainable(chain), None)
        times = [timed(lambda: other_tools.plain_step(chain, batch, optimizer))[1] for _ in range(6)]
    return statistics.median(times[1:])


def measure(name: str) -> Subject:
    """Profile, measure and fit one model."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    Chain.from_model(model.train(), batch)  # the first call of anything is slow
    chain, finding = timed(lambda: Chain.from_model(model, batch))
    costs, profiling = timed(lambda: probes.profile(chain, batch, repeats=0))
    few = first_horizons(None, chain.depth)
    samples, measuring = timed(lambda: probes.memory(chain, [batch], few))
    measured = {
        (s.horizon, s.stride, k): round(s.value)
        for k in (0, 1, 2)
        for s in probes.memory(chain, [batch], range(1, chain.depth + 1), (1, "horizon"), recompute=k)
    }
    folded, folding = timed(
        lambda: {(h, s, k): step_bytes(Schedule.horizon(chain.depth, h, s, k), costs) for h, s, k in measured}
    )
    seconds = {"step": step_seconds(chain, batch), "profile": finding + profiling, "line": finding + measuring}
    seconds["fold"] = folding / len(folded)
    line = fit_memory(few, [s.value for s in samples])
    return Subject(name, chain, batch, costs.base_bytes, measured, folded, line, seconds)


def spread(errors: Iterable[float]) -> str:
    errors = list(errors)
    return f"{statistics.median(map(abs, errors)):.2f} {max(errors, key=abs):+.2f}"


def predictions(subjects: Iterable[Subject]) -> list[Subject]:
    """Print table 1, a line as soon as a model is done, and whether the targets are met."""
    print("\n1. Prediction of M(h), median and worst error in per cent of the measurement")
    print(f"{'':17}{'T':>3}{'M(T) MiB':>10}{'of it base':>11}", end="")
    print("".join(f"{c:>15}" for c in ("fold, s = 1", "fold, s = h", "recompute 1, 2", "line, s = 1")))
    done, missed = [], []
    for subject in subjects:
        done.append(subject)
        errors = subject.fold_errors(lambda key: key[2] == 0)
        again = subject.fold_errors(lambda key: key[2] > 0)
        worst = statistics.median(map(abs, errors)), max(map(abs, errors)), max(map(abs, again))
        missed += [subject.name] * any(w > t for w, t in zip(worst, TARGETS, strict=True))
        full = subject.measured[subject.chain.depth, 1, 0]
        cells = [
            spread(subject.fold_errors(lambda key: key[1:] == (1, 0))),
            spread(subject.fold_errors(lambda key: key[0] == key[1] and key[2] == 0)),
            spread(again),
            spread(subject.line_errors()),
        ]
        print(f"{subject.name:17}{subject.chain.depth:3}{full / 2**20:10.2f}", end="")
        print(f"{subject.base_bytes / full:11.0%}" + "".join(f"{c:>15}" for c in cells), flush=True)
    met = f"{len(done) - len(missed)} of {len(done)} models" + (f"; missed: {', '.join(missed)}" if missed else "")
    print("targets: fold median <= {} %, worst <= {} %, with recomputing <= {} %: met by".format(*TARGETS), met)
    return done


def cases(depth: int) -> dict[str, Key]:
    half = max(1, depth // 2)
    return {
        "BP": (depth, 1, 0),
        "BP, checkpoints": (depth, 1, 1),
        "h = T/2, s = 1": (half, 1, 0),
        "h = s = T/2": (half, half, 0),
        "h = 1": (1, 1, 0),
    }


class Legend:
    """Why a cell has no number, numbered in order of appearance."""

    def __init__(self) -> None:
        self.reasons: dict[str, int] = {}

    def mark(self, tool: str, error: Exception) -> str:
        if isinstance(error, ModuleNotFoundError) and error.name in ("kitsune", "ckptplan"):
            return NOT_INSTALLED
        kind = "" if isinstance(error, other_tools.NoNumber) else f"raises {type(error).__name__}: "
        tool = "kitsune" if tool == "less margin" else tool
        reason = f"{tool}: {kind}{str(error).split('. ')[0].splitlines()[0][:140]}"
        return f"- [{self.reasons.setdefault(reason, len(self.reasons) + 1)}]"


def beside(subjects: Iterable[Subject]) -> None:
    """Print table 2, its summary and its legend; the tools' seconds are added to the subjects."""
    print("\n2. Beside other tools: measured MiB, and errors in per cent")
    legend, summary = Legend(), defaultdict[str, dict[str, list[float]]](lambda: defaultdict(list))
    columns = ("fold", "line", *other_tools.TOOLS)
    print(f"{'':35}{'engine':>9}{'torch':>9}" + "".join(f"{c:>{WIDTHS[c]}}" for c in columns))
    for subject in subjects:
        for label, key in cases(subject.chain.depth).items():
            plain, cells = compare(subject, label, key, legend)
            engine = subject.measured[key] / 2**20
            print(f"{subject.name:17}{label:18}{engine:9.2f}{f'{plain / 2**20:.2f}' if plain else '-':>9}", end="")
            print(
                "".join(f"{c if isinstance(c, str) else f'{c:+.2f}':>{WIDTHS[n]}}" for n, c in cells.items()),
                flush=True,
            )
            for name, cell in cells.items():
                if isinstance(cell, float):
                    summary[label][name].append(cell)
    for label, errors in summary.items():
        cells = {name: spread(errors[name]) if name in errors else "-" for name in columns}
        print(f"{'median, worst':17}{label:36}" + "".join(f"{c:>{WIDTHS[n]}}" for n, c in cells.items()))
    print("the line is for s = 1 without recomputing; torch has no truncated horizons")
    for reason, number in legend.reasons.items():
        print(f"[{number}] {reason}")


def compare(subject: Subject, label: str, key: Key, legend: Legend) -> tuple[int, dict[str, float | str]]:
    """One case of one model: plain torch's bytes (0: it has no such step) and a cell a column."""
    chain, batch, engine = subject.chain, subject.batch, subject.measured[key]
    schedule = Schedule.horizon(chain.depth, *key)
    plain = other_tools.plain_bytes(chain, batch, schedule) if other_tools.is_exact(schedule) else 0
    cells: dict[str, float | str] = {"fold": percent(subject.folded[key], engine)}
    cells["line"] = percent(subject.line(key[0]), engine) if key[1:] == (1, 0) else "-"
    for tool, predict in other_tools.TOOLS.items():
        start = time.perf_counter()
        try:
            cells[tool] = percent(predict(chain, batch, schedule), plain or engine)
        except Exception as error:  # whatever a tool raises is its answer
            cells[tool] = legend.mark(tool, error)
        if label == "BP" and cells[tool] != NOT_INSTALLED:
            subject.seconds[tool] = time.perf_counter() - start
    return plain, cells


def prices(subjects: Iterable[Subject]) -> None:
    """Print table 3."""
    print("\n3. Seconds of a prediction, in steps of back-propagation; the fold: a profile once, then every schedule")
    columns = ("profile", "fold", "line", "kitsune", "ckptplan", "MemTracker")
    print(f"{'':17}{'step ms':>9}" + "".join(f"{c:>12}" for c in columns))
    for subject in subjects:
        step = subject.seconds["step"]
        ratios = {c: seconds / step for c, seconds in subject.seconds.items()}
        cells = [f"{ratios[c]:.{2 if c == 'fold' else 1}f}" if c in ratios else "-" for c in columns]
        print(f"{subject.name:17}{step * 1e3:9.1f}" + "".join(f"{c:>12}" for c in cells))


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} not installed"


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    print(", ".join(map(installed, PACKAGES)))
    subjects = predictions(map(measure, names or MODELS))
    beside(subjects)
    prices(subjects)


if __name__ == "__main__":
    main(sys.argv[1:])
