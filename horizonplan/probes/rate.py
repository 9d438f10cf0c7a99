"""r, measured: how fast the loss falls under a schedule, relative to back-propagation, in short real runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from horizonplan.chain import Chain
from horizonplan.probes.cosine import Recompute, never
from horizonplan.probes.runs import Pair, Runs, Stream
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize
from horizonplan.rates import jackknife, relative_rate, tail_of


def rollout(
    chain: Chain,
    batches: Sequence[Any],
    pairs: Sequence[Pair],
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
    same batches, r = ln(J_h / J_0) / ln(J_T / J_0) (:func:`horizonplan.rates.relative_rate`).

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
    runs = Runs(chain, Stream(batches), optimizer, seed, recompute, micro_batches, room_bytes=0)
    runs.check_parts()
    last = range(steps - tail_of(steps), steps)
    start, exact = runs.start(last), runs.advance((chain.depth, 1), steps)
    advance()
    samples = []
    for pair in pairs:
        samples.append(rate_sample(pair, runs.advance(pair, steps), exact, start))
        if pair[0] < chain.depth:
            advance()
    return samples


def rate_sample(pair: Pair, losses: Sequence[float], exact: Sequence[float], start: Sequence[float]) -> Sample:
    """The rate of a run: all its losses, all of back-propagation's, and J_0 on the batches of the last quarter."""
    steps, tail = len(losses), len(start)
    losses, exact = losses[-tail:], exact[-tail:]
    rate = relative_rate(losses, exact, start)
    falls = statistics.fmean(exact) < statistics.fmean(start)
    why = "measured"
    if math.isnan(rate):
        why = "the run diverged" if falls else f"back-propagation did not lower the loss in {steps} steps"
    detail = {
        "why": why,
        "exact_fell": falls,
        "steps": steps,
        "loss": statistics.fmean(losses),
        "loss_exact": statistics.fmean(exact),
        "loss_start": statistics.fmean(start),
    }
    return Sample("rate", "1", *pair, rate, jackknife(losses, exact, start), detail=detail)
