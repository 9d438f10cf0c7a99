"""Check a plan by a short real run, and choose again with what was measured where it misses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from horizonplan import probes
from horizonplan.batch import ComputeLoss, LossFunction, as_loader, take
from horizonplan.chain import Chain
from horizonplan.chain.calls import rng_devices, seeded, training_mode
from horizonplan.choice import choose_rated, find
from horizonplan.explain import depth_of, name_of
from horizonplan.frontier import undominated
from horizonplan.objective import evaluate
from horizonplan.plan import Plan
from horizonplan.precision import autocast
from horizonplan.probes.memory import largest, step
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize, optimizer_for, restored, trainable
from horizonplan.probes.time import in_turn
from horizonplan.projection import Projection
from horizonplan.rows import Row
from horizonplan.schedule import Schedule
from horizonplan.weigh import way_of

MEMORY_TOLERANCE = 0.05
TIME_TOLERANCE = 0.25  # of the ratio to back-propagation's step, whose clock ran at the same time
RATE_TOLERANCE = 0.1
ROUNDS = 9  # of the clock


@dataclass(frozen=True)
class Check:
    """One quantity: predicted, measured, and whether they agree (``None``: there is nothing to compare)."""

    predicted: float | None
    measured: float | None
    ok: bool | None


@dataclass(frozen=True)
class Report:
    """Checks of memory (bytes), time (seconds a step) and rate (relative to back-propagation).

    Attributes:
        memory: peak bytes of a step.
        time: seconds of a step. ``ok`` compares its ratio to back-propagation's step, taken in turn with it; where the
            plan has no time for that, the seconds themselves.
        rate: loss-decrease rate.
        plan: the plan as verified. Where it missed, measured numbers are in place of its own, and the choice is what
            is best then; that is not verified again. Else the plan that was given.
    """

    memory: Check
    time: Check
    rate: Check
    plan: Plan | None = None

    @property
    def ok(self) -> bool:
        """Whether all three hold; what could not be compared does not."""
        return all(check.ok is True for check in (self.memory, self.time, self.rate))

    @property
    def missed(self) -> tuple[str, ...]:
        """Which of memory, time and rate did not come out as predicted."""
        return tuple(name for name in ("memory", "time", "rate") if getattr(self, name).ok is False)


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
    """Run a plan and back-propagation side by side, and compare memory, time and rate with what the plan says.

    Memory may exceed the plan's by 5 %, the time of a step relative to back-propagation's by 25 %, and the
    rate may fall below it by 0.1 or two standard errors. A plan that misses is marked, and chosen once more with what
    was measured (``report.plan``). The model is left bit for bit as it was.

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
        seconds, exact_seconds = _seconds(chain, plan, largest(sample), optimizer)
        rate = probes.rollout(chain, take(loader, steps), [pair], steps, optimizer, seed)[0]
    found = Report(
        memory=_at_most(plan.row.memory_bytes, _as_counted(plan, memory), MEMORY_TOLERANCE),
        time=_in_time(plan, seconds, exact_seconds),
        rate=_at_least(plan.row.rate, rate),
    )
    return replace(found, plan=replanned(plan, found, rate, exact_seconds) if found.missed else plan)


def replanned(plan: Plan, report: Report, rate: Sample, exact_seconds: float) -> Plan:
    """The plan with what was measured of its choice, judged again; the choice is another one if that is better now.

    Seconds of all other rows are scaled by back-propagation's, measured over predicted.
    """
    exact = _exact(plan.rows)
    scale = exact_seconds / exact.step_seconds if exact.step_seconds else None
    place = next(i for i, row in enumerate(plan.rows) if way_of(row) == way_of(plan.row))
    rows = [_timed(row, scale) for row in plan.rows]
    rows[place] = _measured(plan.row, report, rate)
    judged = evaluate(rows, plan.objective, plan.cost)
    try:
        chosen = choose_rated([row for row in judged if row.fits is not False], plan.objective, plan.cost)
    except ValueError:  # nothing meets the objective: the choice stays, marked as missing it
        chosen = judged[place]
    if any(row.recompute and not row.reference for row in judged):  # all candidates were weighed: none may dominate
        chosen = undominated(chosen, judged)
    told = f"{name_of(plan.row, plan.depth)} missed its {' and '.join(report.missed)} when it was verified; "
    if way_of(chosen) == way_of(plan.row):
        told += "with what was measured it is still the choice."
    else:
        told += f"with what was measured {name_of(chosen, plan.depth)} is the choice, and was not verified."
    return replace(plan, row=chosen, rows=judged, notes=(*plan.notes, told))


def _measured(row: Row, report: Report, rate: Sample) -> Row:
    if report.memory.measured is not None:
        row = replace(row, memory_bytes=round(report.memory.measured), memory_source="measured")
    if report.time.measured is not None:
        row = replace(row, step_seconds=report.time.measured, step_seconds_source="measured")
    if report.rate.ok is False:
        row = replace(row, rate=report.rate.measured, rate_stderr=rate.stderr, rate_source="measured")
    return row


def _timed(row: Row, scale: float | None) -> Row:
    if scale is None or row.step_seconds is None:
        return row
    return replace(row, step_seconds=row.step_seconds * scale)


def _exact(rows: Sequence[Row]) -> Row:
    """Plain back-propagation's row."""
    return find(rows, depth_of(rows), 1)


def _seconds(chain: Chain, plan: Plan, batch: Any, optimizer: Optimize | None) -> tuple[float, float]:
    """Seconds of the plan's step and of back-propagation's, taken in turn: a slow moment strikes both."""
    with restored(chain, weights=True):
        made = optimizer_for(trainable(chain), optimizer)

        def planned() -> None:
            with autocast(plan.precision, chain.device):
                step(chain, batch, plan.schedule, made, plan.micro_batches)

        exactly = partial(step, chain, batch, Schedule.exact(chain.depth), made)
        ours, exact = in_turn([planned, exactly], chain.device, ROUNDS)
    return statistics.median(ours), statistics.median(exact)


def _in_time(plan: Plan, seconds: float, exact_seconds: float) -> Check:
    predicted, exact = plan.row.step_seconds, _exact(plan.rows).step_seconds
    if predicted is None:
        return Check(None, seconds, None)
    wanted = predicted / exact * exact_seconds if exact else predicted
    return Check(predicted, seconds, seconds <= wanted * (1 + TIME_TOLERANCE))


def _as_counted(plan: Plan, sample: Sample) -> float | None:
    """Bytes as the plan counts them: of tensors, or what the driver saw."""
    if plan.provenance.get("memory_counts") == "nvml":
        return sample.detail.get("nvml_bytes")
    return sample.value


def _at_most(predicted: float | None, measured: float | None, tolerance: float) -> Check:
    if predicted is None or measured is None or math.isnan(measured):
        return Check(predicted, None, None)
    return Check(predicted, measured, measured <= predicted * (1 + tolerance))


def _at_least(predicted: float | None, sample: Sample) -> Check:
    if predicted is None or math.isnan(sample.value):
        return Check(predicted, None if math.isnan(sample.value) else sample.value, None)
    slack = max(RATE_TOLERANCE, 2 * (sample.stderr or 0.0))
    return Check(predicted, sample.value, sample.value >= predicted - slack)
