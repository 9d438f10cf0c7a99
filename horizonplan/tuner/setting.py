"""What all trials of a study have in common, and how one of them is made of that and a proposal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from horizonplan.plan import Plan
from horizonplan.tuner.proposals import Proposal
from horizonplan.tuner.work import Found, Model, Work


@dataclass(frozen=True)
class Setting:
    """What all trials have in common.

    Attributes:
        model: what each trains: copies of a module, or what a function makes.
        data: to train on.
        val_data: to validate on.
        plan: whose schedules are tried.
        epochs: of a trial.
        metric: in the validation's metrics.
        higher_is_better: of that metric.
        clock: ``"planned"`` or ``"measured"``, see :class:`horizonplan.Study`.
        limit_bytes: what a step may need.
        seed: of weights and training.
        workers: processes side by side.
        options: of :func:`horizonplan.train`.
    """

    model: Model
    data: Any
    val_data: Any
    plan: Plan
    epochs: int
    metric: str
    higher_is_better: bool
    clock: str
    limit_bytes: int | None
    seed: int
    workers: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def work(self, proposal: Proposal, bars: Sequence[float | None]) -> Work:
        """A trial."""
        own = {"epochs": self.epochs, "warmup": proposal.warmup}
        return Work(
            model=self.model,
            data=self.data,
            val_data=self.val_data,
            plan=replace(self.plan, row=proposal.row),
            optimizer=proposal.optimizer,
            metric=self.metric,
            higher_is_better=self.higher_is_better,
            model_arguments=proposal.model_arguments,
            options={**self.options, **proposal.train_arguments, **own},
            bars=bars,
            limit_bytes=self.limit_bytes,
            seed=self.seed,
            threads=max(1, torch.get_num_threads() // self.workers) if self.workers else None,
        )

    def values(self, proposal: Proposal, found: Found) -> tuple[float, float, float]:
        """What a finished trial is weighed by: peak bytes, metric, seconds of a step."""
        seconds = proposal.row.step_seconds if self.clock == "planned" else found.step_seconds
        return float(found.memory_bytes or 0), found.metrics[self.metric], float(seconds or 0.0)
