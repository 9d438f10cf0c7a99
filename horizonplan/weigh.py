"""The choice among all candidates: exact ones, truncated ones, recomputed, in parts; any may win.

Short real runs measure the rate of the truncated one that would be chosen, with each of its strides, and the choice
is made again, until what is chosen is exact or its rate was measured. Its memory is measured, too. What is
recommended in the end is dominated by no candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from horizonplan.candidates import with_cosine, with_memory, with_rates
from horizonplan.choice import NO_FALL, Judge, find, pairs_at, recommend
from horizonplan.decide import Decision
from horizonplan.explain import depth_of, name_of
from horizonplan.objective import InfeasibleError
from horizonplan.probes.memory import OUT_OF_MEMORY
from horizonplan.probes.sample import Sample
from horizonplan.probing import Probing
from horizonplan.rows import Row
from horizonplan.settle import Settled

ROUNDS = 3  # of short runs, each at another horizon
MEASUREMENTS = 6  # of the memory of what would be chosen

WITHOUT = "No candidate whose rate is known is feasible: the choice was made among those of which it is not."


def best(rows: Sequence[Row], judge: Judge) -> Row:
    """What is recommended of a table; see :func:`horizonplan.choice.recommend`.

    Raises:
        InfeasibleError: no candidate is feasible.
    """
    return recommend(rows, judge.objective, judge.price(rows))


def decide_with_runs(
    probing: Probing, found: Settled, chosen: Row, batches: Sequence[Any], steps: int, seed: int
) -> Decision:
    """The choice among all candidates: rates are measured at the chosen horizon as long as that changes the choice.

    Raises:
        InfeasibleError: no candidate is feasible.
    """
    judge, rows, notes = found.judge, found.rows, list[str]()
    rolled: list[Sample] = []
    for _ in range(ROUNDS if steps else 0):
        if chosen.exact or chosen.rate_source == "measured" or chosen.horizon in {s.horizon for s in rolled}:
            break
        pairs = [pair for pair in pairs_at(chosen.horizon, judge.strides) if find(rows, *pair).fits is not False]
        if chosen.horizon == probing.chain.depth or not pairs:
            break
        rows = _with_cosines(probing, judge, rows, pairs)
        samples = probing.rollout(batches, pairs, steps, seed)
        rolled += samples
        if not any(s.detail["exact_fell"] for s in samples):
            notes += [NO_FALL] if samples else []
            break
        rows = judge.judged(with_rates(rows, rolled))
        chosen = best(rows, judge)
    rows = judge.judged(rows)
    chosen = best(rows, judge)
    notes += [WITHOUT] if chosen.rate is None else []
    if steps and rolled and not (chosen.exact or chosen.rate_source == "measured"):
        notes.append(f"After {ROUNDS} rounds of short runs the rate of the choice is still derived from its cosine.")
    return Decision(rows, chosen, tuple(notes), tuple(rolled))


def _with_cosines(
    probing: Probing, judge: Judge, rows: tuple[Row, ...], pairs: Sequence[tuple[int, int]]
) -> tuple[Row, ...]:
    """Cosines of the strides that are run; what is recomputed has the same."""
    lacking = [pair for pair in pairs if find(rows, *pair).cosine_source in ("unmeasured", "fitted")]
    seen = {(s.horizon, s.stride): s for s in probing.cosine(lacking, "short runs")}

    def known(row: Row) -> Row:
        sample = seen.get((row.horizon, row.stride))
        return with_cosine(row, sample) if sample is not None and replace(row, recompute=0).plain else row

    return judge.judged([known(row) for row in rows])


def weigh_memory(probing: Probing, judge: Judge, decision: Decision) -> Decision:
    """The choice with measured memory, made again where that changes it."""
    rows, chosen, notes = decision.rows, decision.row, list(decision.notes)
    for _ in range(MEASUREMENTS):
        if chosen.memory_source == "measured":
            break
        samples = probing.memory_of(chosen)
        if not samples or samples[0].source == OUT_OF_MEMORY:
            new = replace(chosen, fits=False)
        elif samples[0].source != "measured":
            notes.append(f"Measuring the memory of the choice failed: {samples[0].detail['message']}.")
            break
        else:
            new = judge.room.holds(with_memory(chosen, samples[0]))
        rows, new = judge.swapped(rows, chosen, new)
        rows = judge.judged(rows)
        try:
            other = best(rows, judge)
        except InfeasibleError:
            chosen = rows[_place(rows, new)]
            break
        if way_of(other) != way_of(new):
            depth = depth_of(rows)
            notes.append(
                f"{name_of(new, depth)} was chosen first; its measured memory spoke for {name_of(other, depth)}."
            )
        chosen = other
    return replace(decision, rows=rows, row=chosen, notes=tuple(notes))


def _place(rows: Sequence[Row], row: Row) -> int:
    return next(i for i, other in enumerate(rows) if way_of(other) == way_of(row))


def way_of(row: Row) -> tuple[object, ...]:
    """What tells a row from the others of its table."""
    return row.algorithm, row.horizon, row.stride, row.recompute, row.micro_batches, row.precision
