"""Measure until the choice is settled: fit, doubt, predict one more horizon, measure it, compare.

Every horizon after the first ones is predicted before it is measured, so each is a test of the fits
that predicted it. The last one stays out of the fits: they are left as they were tested.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from horizonplan.candidates import Room
from horizonplan.choice import Judge, find
from horizonplan.curves import Curve, PoorFitWarning, fit_cosine, fit_memory
from horizonplan.devices import ASSUMED
from horizonplan.horizons import HeldOut, doubts, next_horizon
from horizonplan.probes.nvml import read
from horizonplan.probes.sample import Sample
from horizonplan.probing import Probing
from horizonplan.rows import Row

PREDICTION_ERROR = {"cpu": 0.03, "cuda": 0.08}  # of a predicted peak (benchmarks/memory_prediction.py)


LINE, ONE = "The paper's line for M(h)", "Cosines are known at one horizon only"


@dataclass(frozen=True)
class Settled:
    """What the choice is made from.

    Attributes:
        judge: with what the device was found to need besides tensors.
        rows: the table, judged.
        curves: the paper's polynomials.
        held_out: tests of the fits, at a horizon that is in none of them.
        notes: what to tell.
    """

    judge: Judge
    rows: tuple[Row, ...]
    curves: Mapping[str, Curve]
    held_out: tuple[HeldOut, ...]
    notes: tuple[str, ...]


def settle(probing: Probing, judge: Judge, horizons: Sequence[int], probe_steps: float) -> Settled:
    """Measure at ``horizons``, then where the choice is least certain, until it is settled or the budget is spent.

    Args:
        probing: where measurements are made and kept.
        judge: what was asked for.
        horizons: where to measure first, ascending.
        probe_steps: what all probing may cost, in steps of back-propagation. One horizon is tested in any case.
    """
    _measure(probing, horizons)
    fitted, visited, notes = set(horizons), set(horizons), list[str]()
    tests: tuple[HeldOut, ...] = ()
    while True:
        curves, told = fit([s for s in probing.samples if s.horizon in fitted], probing.chain.depth, judge)
        here = replace(judge, room=_room(probing, judge))
        rows = here.rows(probing.profile, probing.samples, curves)
        chosen, cosine = here.horizon(rows), curves.get("cosine")
        doubtful = doubts(rows, cosine, here.horizon, visited)
        h = next_horizon(rows, cosine, chosen, doubtful, visited)
        known = cosine is not None or probing.unknown is not None
        if h is None or (tests and known and not doubtful and all(test.ok for test in tests)):
            break
        if len(visited) > len(horizons) and known and probing.probed + probing.price(h) > probe_steps:
            notes += [_unsettled(doubtful, probe_steps)] if doubtful else []
            break
        fitted |= {test.horizon for test in tests}
        if tests:  # what was held out joins the fits that are tested next
            curves, told = fit([s for s in probing.samples if s.horizon in fitted], probing.chain.depth, judge)
            rows = here.rows(probing.profile, probing.samples, curves)
        predicted = find(rows, h, 1)
        _measure(probing, [h])
        visited.add(h)
        tests = _tests(predicted, curves.get("cosine"), probing, here)
    for note in told:
        if not note.startswith(LINE) and not note.startswith(ONE):
            warnings.warn(note, PoorFitWarning, stacklevel=3)
    return Settled(here, rows, curves, tests, (*notes, *told))


def fit(samples: Iterable[Sample], depth: int, judge: Judge) -> tuple[dict[str, Curve], list[str]]:
    """The paper's polynomials (Eq. 15 and 16) at stride 1, and what is poor about them."""
    samples = [s for s in samples if s.stride == 1 and not math.isnan(s.value)]
    memory = {s.horizon: _bytes(s, judge) for s in samples if s.quantity == "memory"}
    cosines = [(s.horizon, c) for s in samples if s.quantity == "cosine" for c in s.detail["per_batch"]]
    curves: dict[str, Curve] = {}
    notes = []
    if depth == 1:
        return {}, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PoorFitWarning)
        if len(memory) > 1:
            curves["memory"] = fit_memory(list(memory), list(memory.values()))
        if len({h for h, _ in cosines}) > 1:
            curves["cosine"] = fit_cosine([h for h, _ in cosines], [c for _, c in cosines], depth)
    if not curves:
        notes.append(f"{ONE}: nothing is fitted, and other rates are unknown.")
    for warning in caught:
        line = "fits the memory" in str(warning.message)
        notes.append(f"{LINE}: {warning.message}. The table does not use it." if line else str(warning.message))
    return curves, notes


def _measure(probing: Probing, horizons: Sequence[int]) -> None:
    pairs = [(h, 1) for h in horizons]
    probing.memory(pairs)
    probing.cosine(pairs)


def _tests(predicted: Row, cosine: Curve | None, probing: Probing, judge: Judge) -> tuple[HeldOut, ...]:
    """What was measured at a horizon, beside what had been predicted there."""
    h, tests = predicted.horizon, []
    at = {s.quantity: s for s in probing.samples if (s.horizon, s.stride) == (h, 1) and not math.isnan(s.value)}
    if "memory" in at and (not judge.room.as_memory or at["memory"].detail.get("nvml_bytes") is not None):
        error = PREDICTION_ERROR["cpu" if probing.chain.device.type == "cpu" else "cuda"] * predicted.memory_bytes
        low, high = predicted.memory_bytes - error, predicted.memory_bytes + error
        tests.append(HeldOut("memory", h, low, high, _bytes(at["memory"], judge)))
    if "cosine" in at and cosine is not None and 0 < _width(cosine, h) < 2:  # else there is nothing to miss
        tests.append(HeldOut("cosine", h, *cosine.interval(h), at["cosine"].value))
    return tuple(tests)


def _width(curve: Curve, h: int) -> float:
    low, high = curve.interval(h)
    return high - low


def _bytes(sample: Sample, judge: Judge) -> float:
    """A sample's bytes as the table counts them: of tensors, or as the driver sees them."""
    nvml = sample.detail.get("nvml_bytes")
    return float(nvml) if judge.room.as_memory and nvml is not None else sample.value


def _room(probing: Probing, judge: Judge) -> Room:
    """What the device has, and what it needs besides tensors: the largest gap that was measured, or an assumption."""
    limit, device = probing.frugal.limit_bytes, probing.chain.device
    room = replace(judge.room, limit_bytes=limit, too_large_bytes=probing.too_large_bytes)
    if device.type != "cuda" or limit is None:
        return room
    seen = read(device).process_bytes
    context = ASSUMED.context_bytes if seen is None else seen - torch.cuda.memory_reserved(device)
    gaps = [nvml - s.value for s in probing.samples if (nvml := s.detail.get("nvml_bytes")) is not None]
    margin = ASSUMED.margin_bytes if not gaps else partial(_largest, round(max(gaps)))
    return replace(room, limit_bytes=limit + max(0, context), margin_bytes=margin)


def _largest(gap: int, memory_bytes: int) -> int:
    return gap


def _unsettled(doubtful: Mapping[int, float], probe_steps: float) -> str:
    places = ", ".join(f"h={h}" for h in sorted(doubtful))
    return (
        f"The choice is not settled: within its interval the cosine at {places} could still change it, and "
        f"probe_steps={probe_steps:g} are spent. Give more of them, or horizons to measure."
    )
