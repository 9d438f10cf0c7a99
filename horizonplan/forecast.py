"""A plan for a CUDA card that is not there: bytes predicted without allocating the model, cosines from elsewhere.

The model runs on fake tensors (:mod:`horizonplan.probes.simulation`), so peaks are those of the fold
over a profile of shapes. There are no values, hence no cosine: it comes from a plan that was measured,
or from a small model of the same kind that is measured now, by the part h/T of its depth. A limit of
memory needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from horizonplan.alternatives import Alternatives, alternatives
from horizonplan.batch import as_loader, take, tensors
from horizonplan.candidates import schedule_of
from horizonplan.chain import Chain
from horizonplan.chain.calls import training_mode
from horizonplan.choice import Judge, choose_horizon, first_that_fits, pairs_at, shortfall_notes
from horizonplan.curves import Curve, fit_cosine
from horizonplan.devices import Calibration, Card
from horizonplan.horizons import first_horizons
from horizonplan.plan import Plan
from horizonplan.predict import step_bytes
from horizonplan.probes import cosine, profile
from horizonplan.probes.memory import largest, stride_of
from horizonplan.probes.simulation import simulated
from horizonplan.probes.steady import Optimize
from horizonplan.provenance import circumstances, varying
from horizonplan.rows import Row
from horizonplan.units import format_bytes
from horizonplan.weigh import best

CosineFrom = Plan | nn.Module | tuple[nn.Module, Any]


def forecast(
    model: nn.Module,
    loader: Iterable[Any],
    card: Card,
    judge: Judge,
    how: Mapping[str, Any],
    batches: int,
    optimizer: Optimize | None,
    cosine_from: CosineFrom | None,
    calibration: Calibration,
    seed: int,
) -> Plan:
    """Plan for a simulated card; arguments are those of :func:`horizonplan.plan_horizon`, its objective in ``judge``.

    Raises:
        ValueError: the objective needs a rate, and there is nowhere to take cosines from.
        SimulationError: the model's flow depends on values.
    """
    sample = take(loader, batches)
    curves, notes = _cosines(cosine_from, sample, how, batches)
    with training_mode(model), simulated(model) as simulation:
        biggest = simulation.batch(largest(sample))
        chain = Chain.from_model(model, biggest, **how)
        for stride in judge.strides:
            stride_of(stride, chain.depth)
        costs = profile(chain, biggest, simulation.optimizer(optimizer), repeats=0)
        beside = _beside(chain, biggest, simulation.optimizer(optimizer)) if judge.exact_may_win else None
        told = circumstances(chain, biggest, optimizer, seed, f"simulated:{card.memory_bytes}")
    if curves:
        curves = {"cosine": _stretched(curves["cosine"], chain.depth)}
    room = replace(judge.room, limit_bytes=card.memory_bytes, margin_bytes=calibration.margin_bytes)
    here = replace(judge, room=room, node_bytes=card.memory_bytes, beside=beside)
    rows = here.rows(costs, [], curves)
    if curves:
        least = min(curves["cosine"].horizons)
        rows = here.judged([_unknown(row) if row.horizon < least else row for row in rows])
        if least > 1:
            notes.append(
                f"Cosines below h={least} are unknown: the other model has no horizon that short a part of it."
            )
    if not curves and all(row.objective is None for row in rows if row.horizon < chain.depth):
        raise ValueError(
            f"cosine_from=None: {judge.objective.describe()} needs a rate, and nothing is measured on a simulated "
            "device; give a measured plan or a reduced model, or ask for MemoryLimit."
        )
    price, counts = here.price(rows), "nvml" if here.room.as_memory else "allocated"
    chosen = choose_horizon(rows, judge.objective, price) if beside is None else best(rows, here)
    rows, chosen = _with_stride(rows, chosen, here)
    margin = calibration.margin_bytes(step_bytes(schedule_of(chosen, chain.depth), costs))
    notes += [*varying(sample), *(beside.notes if beside else ())]
    notes += [
        f"Predicted for a card of {format_bytes(card.memory_bytes)} that was not there, with {format_bytes(margin)} "
        f"({calibration.card}) for context, workspaces and fragmentation. Nothing was measured; strides were not tried."
    ]
    return Plan(
        row=chosen,
        rows=rows,
        depth=chain.depth,
        objective=judge.objective,
        cost=price,
        curves=curves,
        block_names=chain.names,
        blocks=how["blocks"] if how["blocks"] is None or isinstance(how["blocks"], str) else tuple(how["blocks"]),
        notes=(*notes, *shortfall_notes(rows, chosen, judge.objective, price)),
        provenance={
            **told,
            "candidates": "horizons" if beside is None else "all",
            "memory_counts": counts,
            "margin": calibration.to_dict(),
        },
    )


def _beside(chain: Chain, batch: Any, optimizer: Optimize | None) -> Alternatives:
    """What may be planned beside the paper's family, as far as shapes tell."""
    return alternatives(chain, batch, lambda one: profile(chain, one, optimizer, repeats=0, summed=False), None)


def _unknown(row: Row) -> Row:
    return replace(row, cosine=None, cosine_source="unmeasured", rate=None, rate_source="unmeasured")


def _with_stride(rows: tuple[Row, ...], chosen: Row, judge: Judge) -> tuple[tuple[Row, ...], Row]:
    """The first of the strides that fits: without runs there is nothing to choose by."""
    if not chosen.plain or chosen.horizon == max(row.horizon for row in rows):
        return rows, chosen
    row = first_that_fits(rows, pairs_at(chosen.horizon, judge.strides))
    if row.rate is None and chosen.rate is not None:  # that of stride 1, for want of another
        return judge.swapped(rows, row, replace(row, rate=chosen.rate, rate_source="derived"))
    return rows, row


def _cosines(
    source: CosineFrom | None, sample: list[Any], how: Mapping[str, Any], batches: int
) -> tuple[dict[str, Curve], list[str]]:
    """The fitted cosine of another model, if there is one."""
    if source is None:
        return {}, []
    if isinstance(source, Plan):
        if "cosine" not in source.curves:
            raise ValueError("cosine_from: this plan has no fitted cosine; give one that was measured.")
        curve = source.curves["cosine"]
        return {"cosine": curve}, [f"Cosines are those of a plan for {source.depth} blocks, by the part of the depth."]
    model, data = source if isinstance(source, tuple) else (source, sample)
    if not isinstance(model, nn.Module):
        raise ValueError(f"cosine_from={source!r}: give a Plan, a reduced model, or a pair of model and data.")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("cosine_from: the reduced model is on 'meta' and has no values; make it on a real device.")
    with training_mode(model):
        place = next((p.device for p in model.parameters()), torch.device("cpu"))
        few = take(as_loader(data), batches, place)
        if any(t.is_meta for t in tensors(few[0])):
            raise ValueError("cosine_from: the batches are on 'meta' and have no values; give a pair (model, data).")
        chain = Chain.from_model(model, few[0], loss=how["loss"], compute_loss=how["compute_loss"])
        found = cosine(chain, few, first_horizons(None, chain.depth))
    points = [(s.horizon, c) for s in found for c in s.detail["per_batch"]]
    curve = fit_cosine([h for h, _ in points], [c for _, c in points], chain.depth)
    note = f"Cosines were measured on a {type(model).__name__} of {chain.depth} blocks, by the part of the depth."
    return {"cosine": curve}, [note]


def _stretched(curve: Curve, depth: int) -> Curve:
    """A cosine of another depth, by the part h/T: coefficients in powers of h scale with (T'/T)^power."""
    assert curve.depth is not None
    ratio, order = curve.depth / depth, len(curve.coefficients) - 1
    return replace(
        curve,
        coefficients=tuple(c * ratio ** (order - i) for i, c in enumerate(curve.coefficients)),
        horizons=tuple(max(1, min(depth, -(-h * depth // curve.depth))) for h in curve.horizons),
        depth=depth,
    )
