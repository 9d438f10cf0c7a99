"""What a training run leaves behind, besides the model."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from horizonplan.training.loop import Loop, mean
from horizonplan.training.watch import FIRST_STEPS


@dataclass(frozen=True)
class Result:
    """What a training run left behind, besides the model.

    Attributes:
        history: one dict a step: ``epoch``, ``step`` (from 0), ``loss``; those before a resume included.
        final_loss: mean training loss over the last epoch.
        val_metrics: ``loss``, perhaps ``accuracy``, and the metrics asked for, after the last epoch.
        validations: one dict an epoch: ``epoch`` and its metrics.
        peak_bytes: the largest peak of a step that was measured. On CPU steps are tracked, the first one not counted
            (0 if blocks are compiled); on CUDA it is the allocator's.
        step_seconds: median seconds of a step, the first two left out.
        seconds: wall time of this call's steps, validation left out.
        stopped: why a callback ended the training; ``None`` if none did.
    """

    history: tuple[dict[str, Any], ...]
    final_loss: float
    val_metrics: dict[str, float] = field(default_factory=dict)
    validations: tuple[dict[str, Any], ...] = ()
    peak_bytes: int = 0
    step_seconds: float = 0.0
    seconds: float = 0.0
    stopped: str | None = None


def result_of(loop: Loop) -> Result:
    """The result of a loop that has come to its end."""
    run = loop.run
    last = run.history[-1]["epoch"] if run.history else 0
    warm = run.seconds[FIRST_STEPS:] or run.seconds
    return Result(
        history=tuple(run.history),
        final_loss=mean([entry["loss"] for entry in run.history if entry["epoch"] == last]),
        val_metrics={k: v for k, v in run.validations[-1].items() if k != "epoch"} if run.validations else {},
        validations=tuple(run.validations),
        peak_bytes=run.peak_bytes,
        step_seconds=statistics.median(warm) if warm else 0.0,
        seconds=loop.spent,
        stopped=run.stop_reason,
    )
