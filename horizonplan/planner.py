"""``plan_horizon``: measure a model, build the table, choose, check the choice by short real runs."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from horizonplan import probes
from horizonplan.batch import ComputeLoss, LossFunction, as_loader, nbytes, signature, take
from horizonplan.candidates import table, with_memory, with_rate
from horizonplan.chain import Chain
from horizonplan.cost import Cost, as_cost
from horizonplan.curves import Curve, PoorFitWarning, fit_cosine, fit_memory
from horizonplan.explain import name_of
from horizonplan.objective import AccuracyConstraint, InfeasibleError, Objective, evaluate, select
from horizonplan.plan import Plan
from horizonplan.probes.memory import Stride, stride_of
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize
from horizonplan.progress import Progress, reporter
from horizonplan.projection import Projection
from horizonplan.rows import Row
from horizonplan.units import format_bytes

FEWEST_HORIZONS = 4


def plan_horizon(
    model: nn.Module,
    data: Any,
    *,
    loss: LossFunction | None = None,
    compute_loss: ComputeLoss | None = None,
    blocks: str | Sequence[str] | None = None,
    objective: Objective | None = None,
    cost: Cost | None = None,
    candidates: str = "horizons",
    strides: Sequence[Stride] = (1, "horizon"),
    rollout_steps: int = 50,
    horizons: Sequence[int] | None = None,
    batches: int = 4,
    optimizer: Optimize | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    projection: Projection | None = None,
    progress: Progress = None,
) -> Plan:
    """Choose how far ahead each block's gradient should look, from measurements on this model and data.

    Algorithm 1 of "Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive
    Control": memory and cosine are measured at a few horizons and fitted, and brute force picks h.
    Beyond the paper, memory at the other horizons is predicted by folding the schedule over a profile,
    and at the chosen h short real runs choose the stride. Model, optimiser, random state and mode are
    left bit for bit as they were.

    Args:
        model: any module whose blocks run one after another; see :meth:`horizonplan.Chain.from_model`.
        data: a DataLoader, a list of batches, or a Dataset (32 samples a batch).
        loss: ``(output, target) -> scalar``; ``None``: the model's own ``.loss``, else by the target's type.
        compute_loss: ``(model, batch) -> scalar``, for anything else.
        blocks: ``None``: found; or a name pattern, a container's name, or a list of submodule names.
        objective: ``None``: ``AccuracyConstraint(epsilon=0.1)``.
        cost: ``None``: ``LinearCost()``. A node memory left open is the card's, on CPU M(T).
        candidates: ``"horizons"``, the paper's family, or ``"all"``: checkpointed back-propagation may win too.
        strides: strides to weigh at the chosen horizon: whole numbers, or ``"horizon"`` for disjoint windows.
        rollout_steps: steps of each short run; 0: the first of ``strides``, rates derived as cos^2.
        horizons: where to measure; ``None``: at least four, spread over 1..T.
        batches: batches for the cosine; memory and time are measured on the largest of them.
        optimizer: ``callable(params) -> Optimizer``, an Optimizer, or ``None`` for AdamW.
        device: where to measure; ``None``: where the model is.
        seed: of everything random; the same seed gives the same choice, bytes and cosines.
        projection: ``(state, shape) -> tensor`` for states of other shapes than x(T).
        progress: ``None``: a bar on a terminal; ``True``/``False``; or ``callable(message, done, total)``.

    Raises:
        InfeasibleError: no candidate meets the objective; ``.nearest`` is the row that misses it by least.
        ChainError: the model is no chain.
        ValueError: bad arguments, an empty or rejected batch, a loss that is not finite.
    """
    objective = AccuracyConstraint(epsilon=0.1) if objective is None else objective
    _check(candidates, strides, rollout_steps, batches, objective)
    with _seeded(seed), _moved(model, device) as place:
        loader = as_loader(data, seed=seed)
        sample = take(loader, batches, place)
        chain = Chain.from_model(model, sample[0], blocks, loss, compute_loss, projection)
        places = _horizons(horizons, chain.depth)
        report = reporter(progress, total=5)
        notes: list[str] = []
        started = time.perf_counter()

        report(f"profile {chain.depth} blocks")
        largest = max(sample, key=nbytes)
        profile = probes.profile(chain, largest, optimizer)
        report(f"memory at {len(places)} horizons")
        samples = probes.memory(chain, [largest], places, optimizer=optimizer)
        report(f"cosine at {len(places)} horizons, {len(sample)} batches")
        samples += probes.cosine(chain, sample, places, strides=list(dict.fromkeys([1, *_legal(strides)])))
        curves = _fit(samples, chain.depth, notes)
        rows = table(profile, samples, curves, strides, exact_may_win=candidates == "all")
        price = as_cost(cost, _node_memory(rows, chain))
        rows = evaluate(rows, objective, price)
        first = select([row for row in rows if row.stride == 1], objective, price)

        report(f"roll out h={first.horizon}")
        pairs = [
            (first.horizon, s)
            for s in dict.fromkeys(stride_of(s, first.horizon) for s in _legal(strides, first.horizon))
        ]
        if rollout_steps and first.horizon < chain.depth:
            rolled = probes.rollout(chain, take(loader, rollout_steps, place), pairs, rollout_steps, optimizer, seed)
            rows = evaluate(_with_rates(rows, rolled), objective, price)
            chosen = _better(rows, pairs, objective, price, notes)
        else:
            rolled = []
            chosen = first if first.horizon == chain.depth else _find(rows, *pairs[0])
        report("measure the choice")
        if chosen.memory_source != "measured":
            measured = probes.memory(chain, [largest], [chosen.horizon], [chosen.stride], optimizer, chosen.recompute)[
                0
            ]
            rows, chosen = _replace_row(rows, chosen, with_memory(chosen, measured), objective, price)
        _note_shortfall(rows, chosen, objective, price, notes)
        report(None)
        return Plan(
            row=chosen,
            rows=rows,
            depth=chain.depth,
            objective=objective,
            cost=price,
            curves=curves,
            block_names=chain.names,
            blocks=blocks if blocks is None or isinstance(blocks, str) else tuple(blocks),
            notes=tuple(notes),
            provenance=_provenance(
                model, chain, largest, optimizer, seed, samples, rolled, time.perf_counter() - started
            ),
        )


def _check(candidates: str, strides: Sequence[Stride], rollout_steps: int, batches: int, objective: Objective) -> None:
    if candidates not in ("horizons", "all"):
        raise ValueError(f"candidates={candidates!r}: give 'horizons' or 'all'.")
    if not isinstance(objective, Objective):
        raise ValueError(f"objective={objective!r}: give AccuracyConstraint, Weighted, MemoryLimit or an Objective.")
    if isinstance(strides, str) or not strides:
        raise ValueError(f"strides={strides!r}: give a non-empty sequence such as (1, 'horizon').")
    for stride in strides:
        stride_of(stride, 1 if stride == "horizon" else max(1, stride) if isinstance(stride, int) else 1)
    for name, value, least in (("rollout_steps", rollout_steps, 0), ("batches", batches, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: give a whole number >= {least}.")


def _legal(strides: Sequence[Stride], horizon: int | None = None) -> list[Stride]:
    """Strides that fit a horizon (the measuring of cosines takes those that fit any)."""
    if horizon is None:
        return [s for s in strides if s == "horizon"]
    fitting = [s for s in strides if s == "horizon" or (isinstance(s, int) and s <= horizon)]
    return fitting or [1]


def _horizons(horizons: Sequence[int] | None, depth: int) -> list[int]:
    if horizons is None:
        count = min(depth, FEWEST_HORIZONS + 1)
        return sorted({round(1 + i * (depth - 1) / max(1, count - 1)) for i in range(count)})
    places = sorted(set(horizons))
    if not places or any(isinstance(h, bool) or not isinstance(h, int) or not 1 <= h <= depth for h in places):
        raise ValueError(
            f"horizons={list(horizons)!r}: give whole numbers between 1 and {depth}, the number of blocks."
        )
    return places


def _fit(samples: Iterable[Sample], depth: int, notes: list[str]) -> dict[str, Curve]:
    """The paper's polynomials (Eq. 15 and 16); a poor fit is warned of and noted."""
    memory = [(s.horizon, s.value) for s in samples if s.quantity == "memory" and s.stride == 1]
    cosines = [
        (s.horizon, c) for s in samples if s.quantity == "cosine" and s.stride == 1 for c in s.detail["per_batch"]
    ]
    if len({h for h, _ in memory}) < 2:
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PoorFitWarning)
        curves = {
            "memory": fit_memory([h for h, _ in memory], [m for _, m in memory]),
            "cosine": fit_cosine([h for h, _ in cosines], [c for _, c in cosines], depth),
        }
    for warning in caught:
        if "memory" in str(warning.message):
            notes.append(f"The paper's line for M(h): {warning.message}. The table does not use it.")
        else:
            notes.append(str(warning.message))
            warnings.warn(warning.message, PoorFitWarning, stacklevel=3)
    return curves


def _node_memory(rows: Iterable[Row], chain: Chain) -> int:
    if chain.device.type == "cuda":
        return int(torch.cuda.get_device_properties(chain.device).total_memory)
    return _find(rows, chain.depth, 1).memory_bytes


def _find(rows: Iterable[Row], horizon: int, stride: int) -> Row:
    return next(r for r in rows if (r.horizon, r.stride, r.recompute) == (horizon, stride, 0))


def _with_rates(rows: Iterable[Row], rolled: Iterable[Sample]) -> tuple[Row, ...]:
    rates = {(s.horizon, s.stride): s for s in rolled}
    return tuple(
        with_rate(row, rates[row.horizon, row.stride])
        if not row.recompute and (row.horizon, row.stride) in rates
        else row
        for row in rows
    )


def _better(
    rows: Sequence[Row], pairs: Sequence[tuple[int, int]], objective: Objective, cost: Cost, notes: list[str]
) -> Row:
    """The better of the strides tried at the chosen horizon, by what was measured."""
    tried = [replace(_find(rows, *pair), reference=False) for pair in pairs]
    lost = [row for row in tried if row.rate is None]
    if len(lost) == len(tried):
        notes.append(
            "The short runs found no rate (back-propagation did not lower the loss, or all diverged): "
            "give more rollout_steps or another optimizer. The first of strides was taken."
        )
        return _find(rows, *pairs[0])
    try:
        chosen = select(tried, objective, cost)
    except InfeasibleError:
        chosen = max(tried, key=lambda row: -float("inf") if row.rate is None else row.rate)
    return _find(rows, chosen.horizon, chosen.stride)


def _note_shortfall(rows: Sequence[Row], chosen: Row, objective: Objective, cost: Cost, notes: list[str]) -> None:
    """Say plainly when the measurements at the choice miss what was asked for, and what comes next."""
    if chosen.feasible:
        return
    others = [row for row in rows if row.horizon > chosen.horizon and row.stride == 1 and not row.reference]
    try:
        following = select(others, objective, cost)
        advice = f"The next best candidate is {name_of(following, rows_depth(rows))}."
    except ValueError:
        advice = "No other candidate meets it."
    rate = "unknown" if chosen.rate is None else f"{chosen.rate:.3f}"
    notes.append(
        f"The choice misses the objective ({objective.describe()}): its rate is {rate} ({chosen.rate_source}) and it "
        f"needs {format_bytes(chosen.memory_bytes)} ({chosen.memory_source}). {advice}"
    )


def rows_depth(rows: Iterable[Row]) -> int:
    """Blocks of the model that a table is about."""
    return max(row.horizon for row in rows)


def _replace_row(
    rows: Sequence[Row], old: Row, new: Row, objective: Objective, cost: Cost
) -> tuple[tuple[Row, ...], Row]:
    place = rows.index(old)
    rows = evaluate([*rows[:place], new, *rows[place + 1 :]], objective, cost)
    return rows, rows[place]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _moved(model: nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """The model on the device to measure on, and back afterwards."""
    here = next((p.device for p in model.parameters()), torch.device("cpu"))
    there = here if device is None else torch.device(device)
    try:
        if there != here:
            model.to(there)
        yield there
    finally:
        if there != here:
            model.to(here)


def _provenance(
    model: nn.Module,
    chain: Chain,
    batch: Any,
    optimizer: Optimize | None,
    seed: int,
    samples: Sequence[Sample],
    rolled: Sequence[Sample],
    seconds: float,
) -> dict[str, Any]:
    name = (
        "AdamW"
        if optimizer is None
        else type(optimizer).__name__
        if isinstance(optimizer, torch.optim.Optimizer)
        else getattr(optimizer, "__name__", repr(optimizer))
    )
    return {
        "model": type(model).__name__,
        "device": str(chain.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "batch": [[list(shape), str(dtype)] for shape, dtype in signature(batch)],
        "optimizer": name,
        "seed": seed,
        "measured_horizons": sorted({s.horizon for s in samples}),
        "memory": [[s.horizon, s.stride, s.value] for s in samples if s.quantity == "memory"],
        "scale": [[s.horizon, s.stride, s.detail["scale"]] for s in samples if s.quantity == "cosine"],
        "rollouts": [[s.horizon, s.stride, dict(s.detail)] for s in rolled],
        "probing_seconds": seconds,
    }
