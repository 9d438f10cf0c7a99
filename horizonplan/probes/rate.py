"""r, measured: how fast the loss falls under a schedule, relative to back-propagation, in short real runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from horizonplan.batch import move
from horizonplan.chain import Chain
from horizonplan.probes.cosine import Recompute, never
from horizonplan.probes.memory import step
from horizonplan.probes.pieces import check_pieces
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize, optimizer_for, restored, seed_all, trainable
from horizonplan.schedule import Schedule

TAIL = 4


def rollout(
    chain: Chain,
    batches: Sequence[Any],
    pairs: Sequence[tuple[int, int]],
    steps: int = 50,
    optimizer: Optimize | None = None,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
    recompute: Recompute = never,
    micro_batches: int = 1,
) -> list[Sample]:
    """Train ``steps`` steps with back-propagation and with each (horizon, stride), from the same start.

    Same weights, same data order, same random numbers; everything is restored bit for bit. With J the
    mean terminal loss over the last quarter of the steps, and J_0 that of the initial weights on the
    same batches, r = ln(J_h / J_0) / ln(J_T / J_0) (Unifying Back-Propagation and Forward-Forward
    Algorithms through Model Predictive Control, Eq. 14). Losses that are not positive take the ratio
    of decreases instead.

    Args:
        chain: the model in the mode to train in.
        batches: batches in order; they repeat when there are fewer than ``steps``.
        pairs: (horizon, stride) to try. Back-propagation is always run and is not listed in the result.
        steps: steps of each run.
        optimizer: as for :func:`horizonplan.probes.memory`; a fresh one for each run.
        seed: seed of torch's generator at each run's start.
        advance: called after each run, for progress.
        recompute: activation checkpointing for a schedule, back-propagation's included: the same gradient in
            less memory.
        micro_batches: parts of a batch whose gradients are accumulated, in all runs alike.

    Returns:
        One sample per pair. Its value is NaN where r is undefined: the run diverged, or
        back-propagation itself did not lower the loss; ``detail["why"]`` says which.
    """
    if not batches:
        raise ValueError("batches is empty: give at least one batch.")
    if steps < 1:
        raise ValueError(f"steps={steps!r}: give a whole number >= 1.")
    order = [batches[i % len(batches)] for i in range(steps)]
    if micro_batches > 1:
        for batch in batches:
            check_pieces(chain, move(batch, chain.device), micro_batches)
    tail = max(1, steps // TAIL)
    with restored(chain), torch.no_grad():
        seed_all(chain, seed)
        start = [chain.loss(move(batch, chain.device)).item() for batch in order[-tail:]]

    def run(pair: tuple[int, int]) -> list[float]:
        schedule = Schedule.horizon(chain.depth, *pair)
        schedule = replace(schedule, recompute=recompute(schedule))
        with restored(chain, weights=True):
            seed_all(chain, seed)
            made = optimizer_for(trainable(chain), optimizer)
            losses = [step(chain, move(batch, chain.device), schedule, made, micro_batches).item() for batch in order]
        advance()
        return losses[-tail:]

    exact = run((chain.depth, 1))
    return [_sample(pair, exact if pair[0] == chain.depth else run(pair), exact, start, steps) for pair in pairs]


def relative_rate(losses: Sequence[float], exact: Sequence[float], start: Sequence[float]) -> float:
    """Eq. 14 from the losses of a run, of back-propagation and of the initial weights on the same batches.

    >>> round(relative_rate([0.5], [0.25], [1.0]), 3)
    0.5
    """
    j, j_exact, j_start = map(statistics.fmean, (losses, exact, start))
    if not all(map(math.isfinite, (j, j_exact, j_start))) or j_exact >= j_start:
        return math.nan
    if min(j, j_exact, j_start) > 0:
        return math.log(j / j_start) / math.log(j_exact / j_start)
    return (j_start - j) / (j_start - j_exact)


def _sample(
    pair: tuple[int, int], losses: Sequence[float], exact: Sequence[float], start: Sequence[float], steps: int
) -> Sample:
    rate = relative_rate(losses, exact, start)
    why = "measured"
    if math.isnan(rate):
        falls = statistics.fmean(exact) < statistics.fmean(start)
        why = "the run diverged" if falls else f"back-propagation did not lower the loss in {steps} steps"
    detail = {
        "why": why,
        "exact_fell": statistics.fmean(exact) < statistics.fmean(start),
        "steps": steps,
        "loss": statistics.fmean(losses),
        "loss_exact": statistics.fmean(exact),
        "loss_start": statistics.fmean(start),
    }
    return Sample("rate", "1", *pair, rate, _jackknife(losses, exact, start), detail=detail)


def _jackknife(*series: Sequence[float]) -> float | None:
    """Standard error of the rate when each of the last batches is left out once."""
    count = len(series[0])
    if count < 3:
        return None
    left_out = [relative_rate(*([*s[:i], *s[i + 1 :]] for s in series)) for i in range(count)]
    if not all(map(math.isfinite, left_out)):
        return None
    return math.sqrt((count - 1) * statistics.pvariance(left_out))
