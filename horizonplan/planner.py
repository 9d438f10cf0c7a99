"""``plan_horizon``: measure a model, build the table, choose, check the choice by short real runs."""

from __future__ import annotations

import math
import platform
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from horizonplan import probes
from horizonplan.batch import ComputeLoss, LossFunction, as_device, as_loader, signature, take
from horizonplan.candidates import table, with_derived_rate, with_memory, with_rates
from horizonplan.chain import Chain
from horizonplan.chain.calls import rng_devices, training_mode
from horizonplan.chain.chain import refuse_wrappers
from horizonplan.choice import NO_FALL, choose_horizon, choose_stride, find, pairs_at, shortfall_notes, swapped
from horizonplan.cost import Cost, as_cost
from horizonplan.curves import Curve, PoorFitWarning, fit_cosine, fit_memory
from horizonplan.objective import AccuracyConstraint, Objective, evaluate
from horizonplan.plan import Plan
from horizonplan.probes.memory import Stride, largest, stride_of
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize
from horizonplan.progress import Progress, reporter
from horizonplan.projection import Projection
from horizonplan.rows import Row

FEWEST_HORIZONS = 4
DEFAULT_OBJECTIVE = AccuracyConstraint(epsilon=0.1)


def plan_horizon(
    model: nn.Module,
    data: Any,
    loss: LossFunction | None = None,
    compute_loss: ComputeLoss | None = None,
    blocks: str | Sequence[str] | None = None,
    objective: Objective = DEFAULT_OBJECTIVE,
    cost: Cost | None = None,
    candidates: str = "horizons",
    strides: Sequence[Stride] = (1, "horizon"),
    rollout_steps: int = 50,
    horizons: Sequence[int] | None = None,
    batches: int = 4,
    optimizer: Optimize | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress = None,
    projection: Projection | None = None,
) -> Plan:
    """Choose how far ahead each block's gradient should look, from measurements on this model and data.

    Algorithm 1 of "Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive
    Control": memory and cosine are measured at a few horizons and fitted, and brute force picks h.
    Beyond the paper, memory at the other horizons is predicted by folding the schedule over a profile,
    and at the chosen h short real runs choose the stride. Measurements are made in train mode; model,
    optimiser, random state and mode are left bit for bit as they were.

    Args:
        model: any module whose blocks run one after another; see :meth:`horizonplan.Chain.from_model`.
        data: a DataLoader, a list of batches, or a Dataset (32 samples a batch, shuffled).
        loss: ``(output, target) -> scalar``; ``None``: the model's own ``.loss``, else by the target's type.
        compute_loss: ``(model, batch) -> scalar``, for anything else.
        blocks: ``None``: found; or a name pattern, a container's name, or a list of submodule names.
        objective: what to minimise, and subject to what.
        cost: ``None``: ``LinearCost()``. A node memory left open is the card's, on CPU M(T).
        candidates: ``"horizons"``, the paper's family, or ``"all"``: checkpointed back-propagation may win too.
        strides: strides to weigh at the chosen horizon: whole numbers, or ``"horizon"`` for disjoint windows.
        rollout_steps: steps of each short run; 0: the first of ``strides``, rates derived as cos^2.
        horizons: where to measure; ``None``: at least four, spread over 1..T.
        batches: batches for the cosine; memory and time are measured on the largest of them.
        optimizer: ``callable(params) -> Optimizer``, an Optimizer, or ``None`` for AdamW.
        device: where to measure; ``None``: where the model is.
        seed: of everything random; the same seed gives the same choice, bytes and cosines.
        progress: ``None``: a line a stage on a terminal; ``True``/``False``; or ``callable(message, done, total)``.
        projection: ``(state, shape) -> tensor`` for states of other shapes than x(T).

    Raises:
        InfeasibleError: no candidate meets the objective; ``.nearest`` is the row that misses it by least.
        ChainError: the model is no chain.
        ValueError: bad arguments, an empty or rejected batch, a loss that is not finite.
    """
    _check(candidates, strides, rollout_steps, batches, objective)
    refuse_wrappers(model)
    loader = as_loader(data, shuffle=True, seed=seed)
    report, started = reporter(progress, total=5), time.perf_counter()
    with _moved(model, device) as place, _seeded(seed, model, loader), training_mode(model):
        sample = take(loader, batches, place)
        chain = Chain.from_model(model, sample[0], blocks, loss, compute_loss, projection)
        places = _horizons(horizons, chain.depth)
        for stride in strides:
            stride_of(stride, chain.depth)
        for number, batch in enumerate(sample):
            chain.check(batch, f"batch {number}")

        report(f"profile {chain.depth} blocks")
        biggest = largest(sample)
        profile = probes.profile(chain, biggest, optimizer)
        report(f"memory at {len(places)} horizons")
        samples = probes.memory(chain, [biggest], places, optimizer=optimizer)
        report(f"cosine at {len(places)} horizons, {len(sample)} batches")
        samples += probes.cosine(chain, sample, places, (1, "horizon") if "horizon" in strides else (1,))
        curves, notes = _fit(samples, chain.depth)

        rows = table(profile, samples, curves, strides, exact_may_win=candidates == "all")
        price = as_cost(cost, _node_memory(rows, chain))
        rows = evaluate(rows, objective, price)
        chosen = choose_horizon(rows, objective, price)

        report(f"short runs at h={chosen.horizon}" if chosen.horizon < chain.depth else "no short runs: exact")
        rolled: list[Sample] = []
        if chosen.horizon < chain.depth:
            pairs = pairs_at(chosen.horizon, strides)
            if not any(stride == "horizon" or stride == s for stride in strides for _, s in pairs):
                notes.append(f"None of strides={tuple(strides)} fits h={chosen.horizon}; stride 1 was taken.")
            if rollout_steps:
                order = take(loader, rollout_steps)
                rolled = probes.rollout(chain, order, pairs, rollout_steps, optimizer, seed)
            if any(s.detail["exact_fell"] for s in rolled):
                rows = evaluate(with_rates(rows, rolled), objective, price)
                chosen, more = choose_stride(rows, pairs, objective, price)
                notes += more
            else:
                notes += [NO_FALL] if rolled else []
                chosen = find(rows, *pairs[0])
                derived = with_derived_rate(chosen, probes.cosine(chain, sample, *([n] for n in pairs[0])))
                rows, chosen = swapped(rows, chosen, derived, objective, price)

        report("memory of the choice")
        if chosen.memory_source != "measured":
            where = [chosen.horizon], [chosen.stride]
            measured = probes.memory(chain, [biggest], *where, optimizer=optimizer, recompute=chosen.recompute)[0]
            rows, chosen = swapped(rows, chosen, with_memory(chosen, measured), objective, price)
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
            notes=(*notes, *shortfall_notes(rows, chosen, objective, price)),
            provenance={
                **_circumstances(chain, biggest, optimizer, seed),
                **_measurements(samples, rolled),
                "probing_seconds": time.perf_counter() - started,
            },
        )


def _check(candidates: str, strides: Sequence[Stride], rollout_steps: int, batches: int, objective: Objective) -> None:
    if candidates not in ("horizons", "all"):
        raise ValueError(f"candidates={candidates!r}: give 'horizons' or 'all'.")
    if not isinstance(objective, Objective):
        raise ValueError(f"objective={objective!r}: give AccuracyConstraint, Weighted, MemoryLimit or an Objective.")
    if isinstance(strides, str) or not isinstance(strides, Sequence) or not strides:
        raise ValueError(f"strides={strides!r}: give a non-empty sequence such as (1, 'horizon').")
    for name, value, least in (("rollout_steps", rollout_steps, 0), ("batches", batches, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: give a whole number >= {least}.")


def _horizons(horizons: Sequence[int] | None, depth: int) -> list[int]:
    if horizons is None:
        count = min(depth, FEWEST_HORIZONS + 1)
        return sorted({round(1 + i * (depth - 1) / max(1, count - 1)) for i in range(count)})
    places = list(horizons) if isinstance(horizons, Sequence) else []
    if not places or any(isinstance(h, bool) or not isinstance(h, int) or not 1 <= h <= depth for h in places):
        raise ValueError(f"horizons={horizons!r}: give whole numbers between 1 and {depth}, the number of blocks.")
    return sorted(set(places))


def _fit(samples: Iterable[Sample], depth: int) -> tuple[dict[str, Curve], list[str]]:
    """The paper's polynomials (Eq. 15 and 16); a poor cosine is warned of, and both are noted."""
    memory = [(s.horizon, s.value) for s in samples if s.quantity == "memory" and s.stride == 1]
    cosines = [
        (s.horizon, c) for s in samples if s.quantity == "cosine" and s.stride == 1 for c in s.detail["per_batch"]
    ]
    if depth == 1:
        return {}, []
    if len({h for h, _ in memory}) < 2:
        return {}, ["Only one horizon was measured: nothing is fitted, and rates at other horizons are unknown."]
    notes = []
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
    return curves, notes


def _node_memory(rows: Iterable[Row], chain: Chain) -> int:
    if chain.device.type == "cuda":
        return int(torch.cuda.get_device_properties(chain.device).total_memory)
    return find(rows, chain.depth, 1).memory_bytes


@contextmanager
def _seeded(seed: int, model: nn.Module, loader: Iterable[Any]) -> Iterator[None]:
    """Torch's generator seeded, and it and the loader's own brought back."""
    own = getattr(loader, "generator", None)
    state = None if own is None else own.get_state()
    with torch.random.fork_rng(devices=rng_devices(model)):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if own is not None:
                own.set_state(state)


@contextmanager
def _moved(model: nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """The model on the device to measure on, and back afterwards."""
    here = next((p.device for p in model.parameters()), torch.device("cpu"))
    there = here if device is None else as_device(device)
    try:
        if there != here:
            model.to(there)
        yield there
    finally:
        if there != here:
            model.to(here)


def _circumstances(chain: Chain, batch: Any, optimizer: Optimize | None, seed: int) -> dict[str, Any]:
    made = type(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else optimizer or torch.optim.AdamW
    return {
        "model": type(chain.model).__name__,
        "device": str(chain.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "batch": [[list(shape), str(dtype)] for shape, dtype in signature(batch)],
        "optimizer": getattr(made, "__name__", type(made).__name__),
        "seed": seed,
    }


def _measurements(samples: Sequence[Sample], rolled: Sequence[Sample]) -> dict[str, Any]:
    cosines = [s for s in samples if s.quantity == "cosine"]
    return {
        "measured_horizons": sorted({s.horizon for s in samples}),
        "memory": [[s.horizon, s.stride, s.value] for s in samples if s.quantity == "memory"],
        "scale": [[s.horizon, s.stride, s.detail["scale"]] for s in cosines],
        "cosine_per_block": [[s.horizon, s.stride, list(s.detail["per_block"])] for s in cosines],
        "rollouts": [[s.horizon, s.stride, {k: _finite(v) for k, v in s.detail.items()}] for s in rolled],
    }


def _finite(value: Any) -> Any:
    """A diverged run's loss is NaN, which JSON does not know."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
