"""A trial: a schedule and parameters that were trained with, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from horizonplan.rows import Row
from horizonplan.tuner.schedules import beats

State = Literal["finished", "pruned", "failed", "running"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training run of a study.

    Attributes:
        number: its number in the storage. Numbers that are missing are of trials that died with their process, and
            were made again.
        state: ``"finished"``; ``"pruned"``: ended early or never begun, as ``reason`` says; ``"failed"``: it raised,
            ran out of memory, or died; ``"running"`` elsewhere.
        row: the schedule, as the plan has it.
        params: what was suggested: ``lr``, ``warmup``, the user's own.
        memory_bytes: measured peak of a step; where nothing was trained, predicted; ``None``: unknown.
        metrics: after the last epoch on the validation data: ``loss``, perhaps ``accuracy``, and the user's.
        validations: the metrics after each epoch.
        step_seconds: median of a step where it ran; trials side by side slow each other down.
        seconds: wall time of its steps.
        values: what the study weighs: peak bytes, the metric, seconds of a step; of finished trials.
        feasible: whether it stayed within the study's memory.
        reason: why it did not finish.
    """

    number: int
    state: State
    row: Row
    params: Mapping[str, Any] = field(default_factory=dict)
    memory_bytes: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    validations: tuple[Mapping[str, float], ...] = ()
    step_seconds: float | None = None
    seconds: float | None = None
    values: tuple[float, float, float] | None = None
    feasible: bool = True
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the schedule's own beside the rest."""
        schedule = ("horizon", "stride", "recompute", "micro_batches")
        rest = {name: value for name, value in vars(self).items() if name != "row"}
        return rest | {name: getattr(self.row, name) for name in schedule} | {"planned": self.row.to_dict()}


def pareto(trials: Iterable[Trial], higher_is_better: bool) -> tuple[Trial, ...]:
    """The finished trials within memory that no other one of them beats in memory, metric and time, by memory."""
    found = [
        (trial, costs(trial, higher_is_better)) for trial in trials if trial.state == "finished" and trial.feasible
    ]
    best = [trial for trial, own in found if not any(beats(other, own) for _, other in found)]
    return tuple(sorted(best, key=lambda trial: (costs(trial, higher_is_better), trial.number)))


def costs(trial: Trial, higher_is_better: bool) -> tuple[float, float, float]:
    """A finished trial's values, each the less the better."""
    assert trial.values is not None
    memory, metric, seconds = trial.values
    return memory, -metric if higher_is_better else metric, seconds
