"""Check a plan by a short real run: what it predicted, what is measured now, and whether that is near enough."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from horizonplan import probes
from horizonplan.batch import ComputeLoss, LossFunction, as_loader, take
from horizonplan.chain.calls import rng_devices, seeded, training_mode
from horizonplan.plan import Plan
from horizonplan.precision import autocast
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize
from horizonplan.projection import Projection

MEMORY_TOLERANCE = 0.05
TIME_TOLERANCE = 0.5
RATE_TOLERANCE = 0.1


@dataclass(frozen=True)
class Check:
    """One quantity: predicted, measured, and whether they agree (``None``: there is nothing to compare)."""

    predicted: float | None
    measured: float | None
    ok: bool | None


@dataclass(frozen=True)
class Report:
    """Checks of memory (bytes), time (seconds a step) and rate (relative to back-propagation)."""

    memory: Check
    time: Check
    rate: Check

    @property
    def ok(self) -> bool:
        """Whether all three hold; what could not be compared does not."""
        return all(check.ok is True for check in (self.memory, self.time, self.rate))


def verify(
    plan: Plan,
    model: nn.Module,
    data: Any,
    *,
    steps: int = 30,
    batches: int = 4,
    optimizer: Optimize | None = None,
    loss: LossFunction | None = None,
    compute_loss: ComputeLoss | None = None,
    projection: Projection | None = None,
    seed: int = 0,
) -> Report:
    """Measure a plan's memory, time and rate on a model and data, and compare with what it says.

    Memory may exceed the plan's by 5 %, time by 50 % (clocks are noisy), and the rate may fall below
    it by 0.1 or two standard errors. The model is left bit for bit as it was.

    Args:
        plan: the plan.
        model: the model the plan was made for.
        data: as for :func:`horizonplan.plan_horizon`, and so are loss, compute_loss and projection.
        loss: likewise.
        compute_loss: likewise.
        projection: likewise.
        steps: steps of the short run beside back-propagation.
        batches: batches of which the largest measures memory and time.
        optimizer: as for :func:`horizonplan.plan_horizon`.
        seed: of everything random.
    """
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    loader = as_loader(data, shuffle=True, seed=seed)
    pair = (plan.horizon, plan.stride)
    with seeded(seed, rng_devices(model)), training_mode(model):
        sample = take(loader, batches, place)
        chain = plan.chain(model, sample[0], loss, compute_loss, projection)
        how: dict[str, Any] = {"recompute": plan.recompute, "micro_batches": plan.micro_batches}
        with autocast(plan.precision, place):
            memory = probes.memory(chain, sample, [pair[0]], [pair[1]], optimizer, **how)[0]
            seconds = probes.time(chain, sample, [pair[0]], [pair[1]], optimizer, **how)[0]
        rate = probes.rollout(chain, take(loader, steps), [pair], steps, optimizer, seed)[0]
    return Report(
        memory=_at_most(plan.row.memory_bytes, _as_counted(plan, memory), MEMORY_TOLERANCE),
        time=_at_most(plan.row.step_seconds, seconds.value, TIME_TOLERANCE),
        rate=_at_least(plan.row.rate, rate),
    )


def _as_counted(plan: Plan, sample: Sample) -> float | None:
    """Bytes as the plan counts them: of tensors, or what the driver saw."""
    if plan.provenance.get("memory_counts") == "nvml":
        return sample.detail.get("nvml_bytes")
    return sample.value


def _at_most(predicted: float | None, measured: float | None, tolerance: float) -> Check:
    if predicted is None or measured is None:
        return Check(predicted, measured, None)
    return Check(predicted, measured, measured <= predicted * (1 + tolerance))


def _at_least(predicted: float | None, sample: Sample) -> Check:
    if predicted is None or math.isnan(sample.value):
        return Check(predicted, None if math.isnan(sample.value) else sample.value, None)
    slack = max(RATE_TOLERANCE, 2 * (sample.stderr or 0.0))
    return Check(predicted, sample.value, sample.value >= predicted - slack)
