"""``plan_horizon``: measure a model, build the table, choose, check the choice by short real runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from horizonplan.algorithms import Algorithm
from horizonplan.batch import ComputeLoss, LossFunction, as_device, as_loader, move, nbytes
from horizonplan.candidates import Room
from horizonplan.chain import Chain
from horizonplan.chain.calls import rng_devices, seeded, training_mode
from horizonplan.chain.chain import refuse_wrappers
from horizonplan.choice import Judge, choose_horizon, shortfall_notes
from horizonplan.contest import best_rated, decide_by_rollouts
from horizonplan.cost import Cost
from horizonplan.decide import Decision, decide_memory, decide_stride, next_best
from horizonplan.devices import ASSUMED, Calibration, Card, check_calibration, parse_device
from horizonplan.forecast import CosineFrom, forecast
from horizonplan.horizons import first_horizons
from horizonplan.methods import check_methods, with_methods
from horizonplan.objective import AccuracyConstraint, Objective
from horizonplan.plan import Plan
from horizonplan.probes.budget import Budget, available_bytes, taken
from horizonplan.probes.memory import Stride, largest, stride_of
from horizonplan.probes.nvml import FALLBACKS, read
from horizonplan.probes.runs import Stream
from horizonplan.probes.steady import Optimize
from horizonplan.probes.tracker import own_bytes
from horizonplan.probing import Probing, counted_chain, fitting
from horizonplan.progress import Progress, Report, reporter
from horizonplan.projection import Projection
from horizonplan.provenance import circumstances, measurements, varying
from horizonplan.settle import Settled, settle
from horizonplan.weigh import best, decide_with_runs, weigh_memory

logger = logging.getLogger("horizonplan")

ROLLOUT_STEPS, RACE_STEPS = 50, 128  # docs/log.md, "Rates: short runs promise too much"
DEFAULT_OBJECTIVE = AccuracyConstraint(epsilon=0.1)
DEFAULT_STRIDES: tuple[Stride, ...] = (1, "horizon")


def plan_horizon(
    model: nn.Module,
    data: Any,
    loss: LossFunction | None = None,
    compute_loss: ComputeLoss | None = None,
    blocks: str | Sequence[str] | None = None,
    objective: Objective = DEFAULT_OBJECTIVE,
    cost: Cost | None = None,
    candidates: str = "horizons",
    strides: Sequence[Stride] = DEFAULT_STRIDES,
    rollout_steps: int | None = None,
    horizons: Sequence[int] | None = None,
    batches: int = 4,
    optimizer: Optimize | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress = None,
    projection: Projection | None = None,
    memory: str = "allocated",
    probe_steps: float = 60,
    cosine_from: CosineFrom | None = None,
    calibration: Calibration = ASSUMED,
    accuracy: str = "cosine",
    rollout_budget: float = 800,
    methods: Sequence[Algorithm] = (),
) -> Plan:
    """Choose how far ahead each block's gradient should look, from measurements on this model and data.

    Algorithm 1 of "Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive
    Control": memory and cosine are measured at a few horizons and fitted, and brute force picks h.
    Beyond the paper, memory at the other horizons is predicted by folding the schedule over a profile,
    further horizons are measured where they may change the choice, one of them is predicted first to
    test the fits, and at the chosen h short real runs choose the stride. Measurements are made in train
    mode; model, optimiser, random state and mode are left bit for bit as they were.

    Back-propagation need not fit the device: its gradient, which the cosine needs, is then computed with
    activation checkpointing, or in micro-batches, and the plan says so.

    Args:
        model: any module whose blocks run one after another; see :meth:`horizonplan.Chain.from_model`.
        data: a DataLoader, a list of batches, or a Dataset (32 samples a batch, shuffled).
        loss: ``(output, target) -> scalar``; ``None``: the model's own ``.loss``, else by the target's type.
        compute_loss: ``(model, batch) -> scalar``, for anything else.
        blocks: ``None``: found; or a name pattern, a container's name, or a list of submodule names.
        objective: what to minimise, and subject to what.
        cost: ``None``: ``LinearCost()``. A node memory left open is the card's, on CPU M(T).
        candidates: ``"horizons"``, the paper's family; or ``"all"``: back-propagation with activation checkpointing and
            in micro-batches, recomputed windows and bf16 may win too, and no candidate dominates the choice
            (:func:`horizonplan.frontier`). Seconds count in that, and a clock never shows the same twice.
        strides: strides to weigh at the chosen horizon: whole numbers, or ``"horizon"`` for disjoint windows. Left
            as it is, ``candidates="all"`` weighs 2 as well.
        rollout_steps: steps of each short run; 0: the first of ``strides``, rates derived as cos^2. With
            ``accuracy="rollout"`` the steps after which rates are compared, or more. ``None``: 50, or 128.
        horizons: where to measure first; ``None``: four, spread over 1..T.
        batches: batches for the cosine; memory and time are measured on the largest of them.
        optimizer: ``callable(params) -> Optimizer``, an Optimizer, or ``None`` for AdamW.
        device: where to measure; ``None``: where the model is. ``"emulated:40MiB"``: on the CPU, which runs
            out of memory as a card of that size would. ``"simulated:24GiB"``: a CUDA card that is not there;
            bytes are predicted, the model may be on ``meta``, and nothing is measured.
        seed: of everything random; the same seed gives the same choice, bytes and cosines.
        progress: ``None``: a line a stage on a terminal; ``True``/``False``; or ``callable(message, done, total)``.
        projection: ``(state, shape) -> tensor`` for states of other shapes than x(T).
        memory: ``"allocated"``: bytes of tensors; ``"nvml"``: what the device needs, as the driver counts.
        probe_steps: how much probing may cost, in steps of back-propagation, short runs apart.
        cosine_from: for a simulated device: where cosines come from. A :class:`Plan` that was measured, or a
            reduced model (or a pair of model and data) to measure; by the part h/T of the depth.
        calibration: for a simulated device: what its context, libraries and allocator take.
        accuracy: where rates come from. ``"cosine"``: the paper's model cos^2 chooses h, and short runs the stride.
            ``"rollout"``: every candidate that may win is run for a few steps, and those that still may for more
            (:func:`horizonplan.racing.race`).
        rollout_budget: what those runs may take, in steps of back-propagation; never exceeded.
        methods: other ways of training (``horizonplan.algorithms.SGR(modules=3)``, say) to measure beside the table:
            memory, time, and with ``rollout_steps`` real steps their rate. They are references: never chosen.

    Raises:
        InfeasibleError: no candidate meets the objective; ``.nearest`` is the row that misses it by least.
        ChainError: the model is no chain.
        torch.OutOfMemoryError: not even one block at a time fits the device.
        ValueError: bad arguments, an empty or rejected batch, a loss that is not finite.
    """
    if rollout_steps is None:
        rollout_steps = RACE_STEPS if accuracy == "rollout" else ROLLOUT_STEPS
    _check(candidates, strides, rollout_steps, batches, objective, memory, probe_steps)
    _check_rollouts(accuracy, rollout_steps, rollout_budget)
    check_calibration(calibration)
    check_methods(methods)
    refuse_wrappers(model)
    card, loader = parse_device(device), as_loader(data, shuffle=True, seed=seed)
    how: dict[str, Any] = {"blocks": blocks, "loss": loss, "compute_loss": compute_loss, "projection": projection}
    room = Room(as_memory=memory == "nvml")
    everything = candidates == "all"
    weighed = (1, 2, "horizon") if everything and tuple(strides) == DEFAULT_STRIDES else tuple(strides)
    judge = Judge(objective, cost, weighed, everything, room)
    if card is not None and card.kind == "simulated":
        if accuracy != "cosine" or methods:
            name = "methods" if methods else "accuracy='rollout'"
            raise ValueError(f"{name}: nothing can be run on a simulated device; leave it out.")
        with _own_generator(loader), seeded(seed, rng_devices(model)):
            return forecast(model, loader, card, judge, how, batches, optimizer, cosine_from, calibration, seed)
    if cosine_from is not None:
        raise ValueError("cosine_from is for simulated devices: on this one cosines are measured; leave it out.")
    report, started = reporter(progress, total=5 if methods else 4), time.perf_counter()
    with (
        _moved(model, card, device) as place,
        _own_generator(loader),
        seeded(seed, [place.index or 0] if place.type == "cuda" else []),
        training_mode(model),
        nullcontext() if card is None else Budget(card.memory_bytes) as budget,
    ):
        sample, driver = taken(loader, batches), read(place)
        if memory == "nvml" and driver.used_bytes is None and driver.process_bytes is None:
            raise ValueError(f"memory='nvml': {FALLBACKS[driver.fallback or 'other']}; give memory='allocated'.")
        if budget is not None:
            budget.hold(list(model.parameters()), list(model.buffers()), batch=largest(sample))
        chain, limit, flops = _chain(model, sample, how, place, budget)
        places = first_horizons(horizons, chain.depth)
        for stride in strides:
            stride_of(stride, chain.depth)
        report(f"profile {chain.depth} blocks")
        probing = Probing(chain, sample, optimizer, limit, flops)
        beside = probing.alternatives() if everything else None
        report(f"memory and cosine at {len(places)} horizons")
        judge = replace(judge, node_bytes=_node_bytes(place, card), beside=beside)
        stream = Stream(loader)
        found = settle(probing, judge, places, 0 if accuracy == "rollout" else probe_steps)
        if accuracy == "rollout":
            report(f"rollouts of up to {rollout_steps} steps or more")
            decision = decide_by_rollouts(probing, found, stream, rollout_steps, rollout_budget, seed)
        else:
            decision = _by_cosine(probing, found, stream, rollout_steps, seed, everything, report)
        report("memory of the choice")
        decision = _with_memory(probing, found.judge, decision, everything, accuracy)
        if methods:
            report(f"{len(methods)} other method{'s' if len(methods) > 1 else ''}")
            decision = with_methods(decision, methods, probing, found.judge, stream, rollout_steps, seed)
        report(None)
    rows, chosen = decision.rows, decision.row
    price = found.judge.price(rows)
    told = (*found.notes, *decision.notes, *probing.notes(), *(beside.notes if beside else ()))
    notes = (*varying(sample), *told, *shortfall_notes(rows, chosen, objective, price))
    spent, seconds = {stage: round(steps, 2) for stage, steps in probing.spent.items()}, time.perf_counter() - started
    logger.info("probing took %.1f s, in steps of back-propagation: %s", seconds, spent)
    return Plan(
        row=chosen,
        rows=rows,
        depth=chain.depth,
        objective=objective,
        cost=price,
        curves=found.curves,
        block_names=chain.names,
        blocks=blocks if blocks is None or isinstance(blocks, str) else tuple(blocks),
        notes=notes,
        provenance={
            **circumstances(chain, probing.biggest, optimizer, seed, str(device if card else place)),
            **measurements(probing.samples, decision.rolled),
            "candidates": candidates,
            "accuracy": accuracy,
            "memory_counts": memory,
            "nvml_fallback": driver.fallback,
            "probing_steps": spent,
            "probing_seconds": seconds,
        },
        held_out=found.held_out,
    )


def _check(
    candidates: str,
    strides: Sequence[Stride],
    rollout_steps: int,
    batches: int,
    objective: Objective,
    memory: str,
    probe_steps: float,
) -> None:
    for name, value, known in (
        ("candidates", candidates, ("horizons", "all")),
        ("memory", memory, ("allocated", "nvml")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: give {known[0]!r} or {known[1]!r}.")
    if not isinstance(objective, Objective):
        raise ValueError(f"objective={objective!r}: give AccuracyConstraint, Weighted, MemoryLimit or an Objective.")
    if isinstance(strides, str) or not isinstance(strides, Sequence) or not strides:
        raise ValueError(f"strides={strides!r}: give a non-empty sequence such as (1, 'horizon').")
    for name, count, least in (("rollout_steps", rollout_steps, 0), ("batches", batches, 1)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{name}={count!r}: give a whole number >= {least}.")
    if isinstance(probe_steps, bool) or not isinstance(probe_steps, int | float) or not probe_steps >= 0:
        raise ValueError(f"probe_steps={probe_steps!r}: give a number of back-propagation steps >= 0.")


def _check_rollouts(accuracy: str, rollout_steps: int, rollout_budget: float) -> None:
    if accuracy not in ("cosine", "rollout"):
        raise ValueError(f"accuracy={accuracy!r}: give 'cosine' or 'rollout'.")
    if isinstance(rollout_budget, bool) or not isinstance(rollout_budget, int | float) or not rollout_budget >= 0:
        raise ValueError(f"rollout_budget={rollout_budget!r}: give a number of back-propagation steps >= 0.")
    if accuracy == "rollout" and rollout_steps < 1:
        raise ValueError(f"rollout_steps={rollout_steps!r}: give at least 1 with accuracy='rollout'.")


def _chain(
    model: nn.Module, sample: Sequence[Any], how: dict[str, Any], place: torch.device, budget: Budget | None
) -> tuple[Chain, int | None, int]:
    """The chain, what its steps may occupy on the device, and the FLOPs that seeing it took."""
    first = move(sample[0], place)
    held = own_bytes(list(model.parameters()), list(model.buffers())) + nbytes(first)
    limit = available_bytes(place, held) if budget is None else budget.limit_bytes

    def make() -> Chain:
        chain = Chain.from_model(model, first, **how)
        for number, batch in enumerate(sample):
            chain.check(move(batch, place), f"batch {number}")
        return chain

    with fitting(place):
        chain, flops = counted_chain(make)
    return chain, limit, flops


def _by_cosine(
    probing: Probing,
    found: Settled,
    stream: Stream,
    rollout_steps: int,
    seed: int,
    everything: bool,
    report: Report,
) -> Decision:
    """The choice by cosine^2, and what short runs make of it."""
    if everything:
        chosen = best(found.rows, found.judge)
    else:
        chosen = choose_horizon(found.rows, found.judge.objective, found.judge.price(found.rows))
    if chosen.horizon == probing.chain.depth:
        report("no short runs: exact")
    elif rollout_steps:
        report(f"short runs at h={chosen.horizon}")
    else:
        report(f"no short runs: the first stride at h={chosen.horizon}")
    order = [stream.batch(stream.place(i)) for i in range(rollout_steps)]
    decide = decide_with_runs if everything else decide_stride
    return decide(probing, found, chosen, order, rollout_steps, seed)


def _with_memory(probing: Probing, judge: Judge, decision: Decision, everything: bool, accuracy: str) -> Decision:
    """The choice with measured memory, or the next one where it does not fit."""
    if everything:
        return weigh_memory(probing, judge, decision)
    return decide_memory(probing, judge, decision, best_rated if accuracy == "rollout" else next_best)


def _node_bytes(place: torch.device, card: Card | None) -> int | None:
    if card is not None:
        return card.memory_bytes
    return int(torch.cuda.get_device_properties(place).total_memory) if place.type == "cuda" else None


@contextmanager
def _own_generator(loader: Iterable[Any]) -> Iterator[None]:
    """A loader's own generator brought back."""
    own = getattr(loader, "generator", None)
    state = None if own is None else own.get_state()
    try:
        yield
    finally:
        if own is not None:
            own.set_state(state)


@contextmanager
def _moved(model: nn.Module, card: Card | None, device: str | torch.device | None) -> Iterator[torch.device]:
    """The model on the device to measure on (an emulated card is the CPU), and back afterwards."""
    here = next((p.device for p in model.parameters()), torch.device("cpu"))
    there = as_device("cpu") if card is not None else here if device is None else as_device(device)
    try:
        if there != here:
            model.to(there)
        yield there
    finally:
        if there != here:
            model.to(here)
