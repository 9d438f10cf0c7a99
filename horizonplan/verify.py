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
from horizonplan.batch import ComputeLoss, LossFunction, as_loader, signature, take
from horizonplan.candidates import schedule_of, with_measured_bytes
from horizonplan.chain import Chain
from horizonplan.chain.calls import rng_devices, seeded, training_mode
from horizonplan.choice import choose_rated, recommend
from horizonplan.explain import name_of
from horizonplan.objective import evaluate
from horizonplan.plan import Plan
from horizonplan.precision import autocast
from horizonplan.probes.memory import OUT_OF_MEMORY, attempt, largest, step
from horizonplan.probes.rate import rate_sample
from horizonplan.probes.runs import Runs, Stream
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize, optimizer_for, restored, trainable
from horizonplan.probes.time import in_turn
from horizonplan.projection import Projection
from horizonplan.rates import tail_of
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
        time: seconds of a step. ``ok`` compares its ratio to the exact step's, taken in turn with it; where the
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
    rate may fall below it by 0.1 or two standard errors. The plan's own steps are run, in its micro-batches and its
    precision; where plain back-propagation does not fit, checkpointed back-propagation runs beside it. A plan that
    misses is marked, and chosen once more with what was measured (``report.plan``). The model is left bit for bit as it
    was.

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

    Raises:
        ValueError: the data's batches are larger than those that the plan was made for.
    """
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    loader = as_loader(data, shuffle=True, seed=seed)
    with seeded(seed, rng_devices(model)), training_mode(model):
        sample = take(loader, batches, place)
        _check_batch(plan, largest(sample))
        chain = plan.chain(model, sample[0], loss, compute_loss, projection)
        how: dict[str, Any] = {"recompute": plan.recompute, "micro_batches": plan.micro_batches}
        with autocast(plan.precision, place):
            memory = probes.memory(chain, sample, [plan.horizon], [plan.stride], optimizer, **how)[0]
        beside = None if memory.source == OUT_OF_MEMORY else _timed_beside(chain, plan, largest(sample), optimizer)
        rate = None if beside is None else _rate(chain, plan, beside.exact, take(loader, steps), steps, optimizer, seed)
    found = Report(
        memory=_at_most(plan.row.memory_bytes, _as_counted(plan, memory), MEMORY_TOLERANCE),
        time=Check(plan.row.step_seconds, None, None) if beside is None else _in_time(plan, beside),
        rate=Check(plan.row.rate, None, None) if rate is None else _at_least(plan.row.rate, rate),
    )
    if memory.source == OUT_OF_MEMORY:
        found = replace(found, memory=Check(plan.row.memory_bytes, None, False))
    return replace(found, plan=replanned(plan, found, rate, beside) if found.missed else plan)


@dataclass(frozen=True)
class Beside:
    """Seconds of the plan's step and of an exact one that fits, taken in turn: a slow moment strikes both.

    Attributes:
        exact: the row of the exact one: plain back-propagation, or checkpointed where that does not fit.
        seconds: of the plan's step.
        exact_seconds: of the exact one's.
    """

    exact: Row
    seconds: float
    exact_seconds: float


def replanned(plan: Plan, report: Report, rate: Sample | None, beside: Beside | None) -> Plan:
    """The plan with what was measured of its choice, judged again; the choice is another one if that is better now.

    Seconds of all other rows are scaled by the exact row's, measured over predicted.
    """
    scale = None
    if beside is not None and beside.exact.step_seconds:
        scale = beside.exact_seconds / beside.exact.step_seconds
    place = next(i for i, row in enumerate(plan.rows) if way_of(row) == way_of(plan.row))
    rows = [_timed(row, scale) for row in plan.rows]
    rows[place] = _measured(plan.row, report, rate)
    judged = evaluate(rows, plan.objective, plan.cost)
    try:
        fitting = [row for row in judged if row.fits is not False]
        choose = recommend if plan.provenance.get("candidates") == "all" else choose_rated
        chosen = choose(fitting, plan.objective, plan.cost)
    except ValueError:  # nothing meets the objective: the choice stays, marked as missing it
        chosen = judged[place]
    told = f"{name_of(plan.row, plan.depth)} missed its {' and '.join(report.missed)} when it was verified; "
    if way_of(chosen) == way_of(plan.row):
        told += "with what was measured it is still the choice."
    else:
        told += f"with what was measured {name_of(chosen, plan.depth)} is the choice, and was not verified."
    missed = {**plan.provenance, "missed": list(report.missed)}
    return replace(plan, row=chosen, rows=judged, notes=(*plan.notes, told), provenance=missed)


def _check_batch(plan: Plan, batch: Any) -> None:
    """Refuse what is larger than the batches that the plan is for: its bytes and seconds are not those of this one."""
    planned, now = plan.provenance.get("batch") or [], [list(shape) for shape, _ in signature(batch)]
    before = [shape for shape, _ in planned]
    if before and now and now[0] and before[0] and now[0][0] > before[0][0]:
        raise ValueError(
            f"data: batches have {now[0][0]} samples, and the plan was made for {before[0][0]}; give batches of that "
            "size, or plan again."
        )


def _measured(row: Row, report: Report, rate: Sample | None) -> Row:
    if report.memory.measured is not None:
        row = with_measured_bytes(row, round(report.memory.measured))
    elif report.memory.ok is False:
        row = replace(row, fits=False)
    if report.time.measured is not None:
        row = replace(row, step_seconds=report.time.measured, step_seconds_source="measured")
    if report.rate.measured is not None and rate is not None and not row.exact:
        row = replace(row, rate=report.rate.measured, rate_stderr=rate.stderr, rate_source="measured")
    return row


def _timed(row: Row, scale: float | None) -> Row:
    if scale is None or row.step_seconds is None:
        return row
    return replace(row, step_seconds=row.step_seconds * scale)


def _exact_rows(plan: Plan) -> list[Row]:
    """Ways to the exact gradient, plain back-propagation first and then by what they save."""
    rows = [row for row in plan.rows if row.exact and row.precision == "fp32"]
    rows.sort(key=lambda row: (not row.plain, -row.memory_bytes))
    return [row for row in rows if row.fits is not False] or rows[:1]


def _timed_beside(chain: Chain, plan: Plan, batch: Any, optimizer: Optimize | None) -> Beside | None:
    """Both steps' seconds; ``None`` where no exact step fits."""
    for exact in _exact_rows(plan):
        found, _ = attempt(partial(_seconds, chain, plan, exact, batch, optimizer), chain.device)
        if found is not None:
            return Beside(exact, *found)
    return None


def _seconds(chain: Chain, plan: Plan, exact: Row, batch: Any, optimizer: Optimize | None) -> tuple[float, float]:
    with restored(chain, weights=True):
        made = optimizer_for(trainable(chain), optimizer)

        def planned() -> None:
            with autocast(plan.precision, chain.device):
                step(chain, batch, plan.schedule, made, plan.micro_batches)

        schedule = schedule_of(exact, chain.depth)
        exactly = partial(step, chain, batch, schedule, made, exact.micro_batches)
        ours, theirs = in_turn([planned, exactly], chain.device, ROUNDS)
    return statistics.median(ours), statistics.median(theirs)


def _rate(
    chain: Chain, plan: Plan, exact: Row, batches: Sequence[Any], steps: int, optimizer: Optimize | None, seed: int
) -> Sample:
    """The rate of the plan's own steps, in its parts and its precision, beside the exact ones."""
    stream = Stream(batches)
    ours, theirs = (
        Runs(chain, stream, optimizer, seed, partial(_as_in, row), row.micro_batches, room_bytes=0)
        for row in (plan.row, exact)
    )
    start = theirs.start(range(steps - tail_of(steps), steps))
    losses = theirs.advance((chain.depth, 1), steps)
    with autocast(plan.precision, chain.device):
        own = ours.advance((plan.horizon, plan.stride), steps)
    return rate_sample((plan.horizon, plan.stride), own, losses, start)


def _as_in(row: Row, schedule: Schedule) -> int:
    return row.recompute


def _in_time(plan: Plan, beside: Beside) -> Check:
    predicted, exact = plan.row.step_seconds, beside.exact.step_seconds
    if predicted is None:
        return Check(None, beside.seconds, None)
    wanted = predicted / exact * beside.exact_seconds if exact else predicted
    return Check(predicted, beside.seconds, beside.seconds <= wanted * (1 + TIME_TOLERANCE))


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
