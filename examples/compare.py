"""What the examples share: train the same model with a plan and with its exact rivals, and print one table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from kjv import MissingDataError
from torch import nn
from torch.utils.data import DataLoader

import horizonplan as hp
from horizonplan.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Run:
    """A way of training, the model that it trained, and what the trainer measured."""

    name: str
    model: nn.Module
    result: hp.Result


def name_of(plan: hp.Plan) -> str:
    """The row's name of a plan, such as `the plan: h=2, stride 2`."""
    recompute = f", checkpoint every {plan.recompute}" if plan.recompute else ""
    return f"the plan: h={plan.horizon}, stride {plan.stride}{recompute}"


def train_all(
    make_model: Callable[[], nn.Module],
    make_data: Callable[[], DataLoader[Any]],
    plan: hp.Plan,
    out: Path | None,
    **how: Any,
) -> dict[str, Run]:
    """Train with the plan, with back-propagation ("exact"), and with every block recomputed ("checkpointed").

    `make_model` and `make_data` are called for each run, so that all start from the same weights and see the same
    batches in the same order. `how` goes to `hp.train`. With `out` each run leaves its log and weights in a folder.
    """
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "plan": (name_of(plan), {"plan": plan}),
        "exact": ("back-propagation", {"algorithm": hp.algorithms.BackPropagation()}),
        "checkpointed": (
            "back-propagation, checkpoint every 1",
            {"algorithm": hp.algorithms.BackPropagation(recompute=1)},
        ),
    }
    runs = {}
    for short, (name, way) in ways.items():
        print(f"training with {name}", flush=True)
        model, run_dir = make_model(), None if out is None else out / short
        runs[short] = Run(name, model, hp.train(model, make_data(), run_dir=run_dir, **way, **how))
    return runs


def table(runs: dict[str, Run], metric: str, reference: tuple[str, float]) -> str:
    """One line a run: `metric` on the validation data, peak memory of a step, time per step and of all steps.

    The last line is a reference, a name and its value: what can be had without a network.
    """
    lines = [f"{'':<37}{'validation ' + metric:>20}{'peak memory':>14}{'time/step':>12}{'time':>10}"]
    for run in runs.values():
        value, peak = run.result.val_metrics[metric], format_bytes(run.result.peak_bytes)
        step = format_seconds(run.result.step_seconds)
        lines.append(f"{run.name:<37}{value:>20.3f}{peak:>14}{step:>12}{run.result.seconds:>8.0f} s")
    lines.append(f"{reference[0]:<37}{reference[1]:>20.3f}")
    return "\n".join(lines)


def verdict(runs: dict[str, Run]) -> str:
    """What the plan costs beside each of its rivals, and whether the exact rivals agree."""
    lines, plan = [], runs["plan"].result
    for rival in (runs["exact"], runs["checkpointed"]):
        memory, seconds = plan.peak_bytes / rival.result.peak_bytes, plan.step_seconds / rival.result.step_seconds
        lines.append(f"The plan takes {memory:.2f} x the memory and {seconds:.2f} x the time per step of {rival.name}.")
    losses = [[step["loss"] for step in runs[short].result.history] for short in ("exact", "checkpointed")]
    same = sum(a == b for a, b in zip(*losses, strict=True))
    lines.append(f"At {same} of {len(losses[0])} steps recomputing left the loss as it was, bit for bit.")
    return "\n".join(lines)


def start(main: Callable[..., None]) -> None:
    """Run a script's `main` with the options of the command line; missing data are one line, not a traceback."""
    try:
        typer.run(main)
    except MissingDataError as error:
        sys.exit(f"error: {error}")
