"""From a settled table to the choice: the stride by short real runs, and the memory of what is chosen.

Whatever turns out not to fit the device is marked, and the choice is made again without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from horizonplan.candidates import with_cosine, with_derived_rate, with_memory, with_rates
from horizonplan.choice import NO_FALL, Judge, choose_horizon, choose_stride, find, first_that_fits, pairs_at
from horizonplan.probes.memory import OUT_OF_MEMORY
from horizonplan.probes.sample import Sample
from horizonplan.probing import Probing
from horizonplan.rows import Row
from horizonplan.settle import Settled

OtherThan = Callable[[Sequence[Row], Row, Judge], Row | None]


@dataclass(frozen=True)
class Decision:
    """The table, the chosen row of it, notes, and what the short runs found."""

    rows: tuple[Row, ...]
    row: Row
    notes: tuple[str, ...] = ()
    rolled: tuple[Sample, ...] = ()


def decide_stride(
    probing: Probing, found: Settled, chosen: Row, batches: Sequence[Any], steps: int, seed: int
) -> Decision:
    """The stride at the chosen horizon, by ``steps`` real steps with each; without steps the first that fits."""
    judge, rows, notes = found.judge, found.rows, []
    if chosen.horizon == probing.chain.depth:
        return Decision(rows, chosen)
    pairs = pairs_at(chosen.horizon, judge.strides)
    if not any(stride == "horizon" or stride == s for stride in judge.strides for _, s in pairs):
        notes.append(f"None of strides={judge.strides} fits h={chosen.horizon}; stride 1 was taken.")
    lacking = ("unmeasured", "fitted") if steps else ("unmeasured",)
    compared = pairs if steps else [_pair(first_that_fits(rows, pairs))]
    wanted = [pair for pair in compared if find(rows, *pair).cosine_source in lacking]
    for sample in probing.cosine(wanted, "short runs" if steps else "cosine"):
        row = find(rows, sample.horizon, sample.stride)
        rows, _ = judge.swapped(rows, row, with_cosine(row, sample))
    rolled = probing.rollout(batches, pairs, steps, seed) if steps else []
    if any(s.detail["exact_fell"] for s in rolled):
        rows = judge.judged(with_rates(rows, rolled))
        chosen, more = choose_stride(rows, pairs, judge.objective, judge.price(rows))
        return Decision(rows, chosen, (*notes, *more), tuple(rolled))
    notes += [NO_FALL] if rolled else []
    row = first_that_fits(rows, pairs)
    rows, chosen = judge.swapped(rows, row, with_derived_rate(row))
    return Decision(rows, chosen, tuple(notes), tuple(rolled))


def next_best(rows: Sequence[Row], failed: Row, judge: Judge) -> Row | None:
    """The best of the same horizon that still fits, or else of all horizons; ``None`` if nothing does."""
    same = [row for row in rows if row.horizon == failed.horizon and row.feasible and not row.reference]
    if same:
        return max(same, key=lambda row: row.rate or 0.0)
    feasible = [row for row in rows if row.stride == 1 and row.feasible]
    return choose_horizon(feasible, judge.objective, judge.price(rows)) if feasible else None


def decide_memory(probing: Probing, judge: Judge, decision: Decision, other_than: OtherThan = next_best) -> Decision:
    """The choice with measured memory; one that runs out of it is given up for the next best that does not.

    Args:
        probing: where memory is measured.
        judge: what was asked for.
        decision: the choice.
        other_than: the next best row of a table to one that did not fit, or ``None``.
    """
    rows, chosen, notes = decision.rows, decision.row, list(decision.notes)
    while chosen.memory_source != "measured":
        samples = probing.memory_of(chosen)
        if not samples or samples[0].source == OUT_OF_MEMORY:
            rows, _ = judge.swapped(rows, chosen, replace(chosen, fits=False))
        elif samples[0].source != "measured":
            notes.append(f"Measuring the memory of the choice failed: {samples[0].detail['message']}.")
            break
        else:
            rows, chosen = judge.swapped(rows, chosen, judge.room.holds(with_memory(chosen, samples[0])))
            if chosen.fits is not False:
                break
        other = other_than(rows, chosen, judge)
        if other is None:
            chosen = next(row for row in rows if (_pair(row), row.recompute) == (_pair(chosen), chosen.recompute))
            break
        notes.append(
            f"h={chosen.horizon}, stride {chosen.stride} was chosen first and did not fit the device: "
            f"h={other.horizon}, stride {other.stride} was taken instead."
        )
        chosen = other
    place = rows.index(chosen)
    rows = judge.judged(rows)
    return replace(decision, rows=rows, row=rows[place], notes=tuple(notes))


def _pair(row: Row) -> tuple[int, int]:
    return row.horizon, row.stride
