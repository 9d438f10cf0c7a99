"""cos(theta_h), measured: how far the horizon gradient points where back-propagation's does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.chain import Chain
from horizonplan.chain.calls import scratch_buffers
from horizonplan.gradient import horizon_backward
from horizonplan.probes.memory import Stride, pairs_of
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import random_state, restored, set_random_state
from horizonplan.schedule import Schedule


def cosine(
    chain: Chain,
    batches: Iterable[Any],
    horizons: Sequence[int],
    strides: Sequence[Stride] = (1,),
) -> list[Sample]:
    """Measure cos(theta_h) between g_h and g_T over all trainable block parameters (not stem, not head).

    ``cos(theta_h) = g_h . g_T / (|g_h| |g_T|)``, the mean over batches of the per-batch cosine (Unifying
    Back-Propagation and Forward-Forward Algorithms through Model Predictive Control, Eq. 13 and
    Algorithm 1, line 11). All horizons see the same dropout masks; buffers, gradients and random
    state are left as they were. Besides the model, one copy of the exact gradient is held.

    Returns:
        One sample for each horizon and stride: the mean, its standard error over batches (``None``
        for one batch), and in ``detail`` the values per batch, the mean per block (``None`` where a
        block has nothing to train) and ``scale``, the factor of Eq. 13 that makes g_h as long as
        g_T's projection on it.

    Raises:
        ValueError: a loss is not finite, or a gradient vanishes or is not finite.
    """
    pairs = pairs_of(chain.depth, horizons, strides)
    groups = _groups(chain)
    found: dict[tuple[int, int], list[tuple[float, float, list[float | None]]]] = {pair: [] for pair in pairs}
    for number, batch in enumerate(batches):
        with restored(chain):
            state = random_state(chain)
            exact = _gradient(chain, batch, Schedule.exact(chain.depth), state, number)
            kept = {p: p.grad.clone() for group in groups for p in group if p.grad is not None}
            own = [_dot(group, kept, kept) for group in groups]
            for pair in pairs:
                loss = exact
                if pair[0] < chain.depth:
                    loss = _gradient(chain, batch, Schedule.horizon(chain.depth, *pair), state, number)
                here = kept if pair[0] == chain.depth else {p: p.grad for p in kept if p.grad is not None}
                found[pair].append(_angles(groups, here, kept, own, loss))
    if not all(found.values()):
        raise ValueError("batches is empty: give at least one batch.")
    return [_sample(pair, values) for pair, values in found.items()]


def _groups(chain: Chain) -> list[list[nn.Parameter]]:
    """Trainable parameters of each block with what runs before it (the stem excepted), each once."""
    seen: set[int] = set()
    groups = []
    for t in range(chain.depth):
        members = chain.layout.group(t)
        groups.append([p for p in members if p.requires_grad and id(p) not in seen])
        seen |= {id(p) for p in members}
    if not any(groups):
        raise ValueError("model: no block has a trainable parameter, so there is no cosine; unfreeze one.")
    return groups


def _gradient(chain: Chain, batch: Any, schedule: Schedule, rng: list[Tensor], number: int) -> Tensor:
    for p in chain.parameters():
        p.grad = None
    set_random_state(chain, rng)
    with scratch_buffers(chain.model.modules()):
        loss = horizon_backward(chain, batch, schedule)
    if not torch.isfinite(loss):
        raise ValueError(f"loss is {loss.item()} on batch {number}: check the data and the model's initial weights.")
    return loss


def _dot(group: list[nn.Parameter], left: dict[nn.Parameter, Tensor], right: dict[nn.Parameter, Tensor]) -> float:
    return sum(torch.sum(left[p].double() * right[p].double()).item() for p in group if p in left and p in right)


def _angles(
    groups: list[list[nn.Parameter]],
    here: dict[nn.Parameter, Tensor],
    exact: dict[nn.Parameter, Tensor],
    own: list[float],
    loss: Tensor,
) -> tuple[float, float, list[float | None]]:
    dots = [_dot(group, here, exact) for group in groups]
    norms = [_dot(group, here, here) for group in groups]
    dot, norm, length = sum(dots), sum(norms), sum(own)
    if not (math.isfinite(dot) and norm > 0 and length > 0):
        raise ValueError(
            f"gradient: |g_h|^2 = {norm:.3g}, |g_T|^2 = {length:.3g} at loss {loss.item():.3g}: a gradient that "
            "vanishes or is not finite has no angle; check the initial weights and the loss."
        )
    blocks = [_clip(d / math.sqrt(n * o)) if n * o > 0 else None for d, n, o in zip(dots, norms, own, strict=True)]
    return _clip(dot / math.sqrt(norm * length)), dot / norm, blocks


def _clip(value: float) -> float:
    return max(-1.0, min(1.0, value))


def _sample(pair: tuple[int, int], values: list[tuple[float, float, list[float | None]]]) -> Sample:
    cosines = [value[0] for value in values]
    stderr = statistics.stdev(cosines) / math.sqrt(len(cosines)) if len(cosines) > 1 else None
    columns = zip(*(value[2] for value in values), strict=True)
    known = [[c for c in column if c is not None] for column in columns]
    detail = {
        "per_batch": tuple(cosines),
        "per_block": tuple(statistics.fmean(column) if column else None for column in known),
        "scale": statistics.fmean(value[1] for value in values),
    }
    return Sample("cosine", "1", *pair, statistics.fmean(cosines), stderr, detail=detail)
