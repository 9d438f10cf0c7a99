"""cos(theta_h), measured: how far the horizon gradient points where back-propagation's does."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.batch import move
from horizonplan.chain import Chain
from horizonplan.chain.calls import scratch_buffers
from horizonplan.probes.budget import host_copy
from horizonplan.probes.memory import Stride, pairs_of
from horizonplan.probes.pieces import check_pieces, gradient
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import random_state, restored, set_random_state
from horizonplan.schedule import Schedule

CHUNK = 2**20
HOST_SHARE = 0.25

Recompute = Callable[[Schedule], int]
Exact = tuple[dict[nn.Parameter, Tensor], float]


def never(schedule: Schedule) -> int:
    """Recompute nothing."""
    return 0


def cosine(
    chain: Chain,
    batches: Iterable[Any],
    horizons: Sequence[int],
    strides: Sequence[Stride] = (1,),
    recompute: Recompute = never,
    micro_batches: int = 1,
) -> list[Sample]:
    """Measure cos(theta_h) between g_h and g_T over all trainable block parameters (not stem, not head).

    ``cos(theta_h) = g_h . g_T / (|g_h| |g_T|)``, the mean over batches of the per-batch cosine (Unifying
    Back-Propagation and Forward-Forward Algorithms through Model Predictive Control, Eq. 13 and
    Algorithm 1, line 11). All horizons see the same dropout masks; buffers, gradients and random
    state are left as they were. The exact gradient waits on the host, so on the device there is never
    more than one gradient.

    Args:
        chain: the model.
        batches: batches on any device; each is moved to the model's in its turn.
        horizons: horizons h.
        strides: strides s at each of them.
        recompute: activation checkpointing for a schedule, the exact one included: the same gradient
            in less memory.
        micro_batches: parts of a batch whose gradients are accumulated, for all horizons alike.

    Returns:
        One sample for each horizon and stride: the mean, its standard error over batches (``None``
        for one batch), and in ``detail`` the values per batch, the mean per block (``None`` where a
        block has nothing to train) and ``scale``, the factor of Eq. 13 that makes g_h as long as
        g_T's projection on it.

    Raises:
        ValueError: a loss is not finite, a gradient vanishes or is not finite, or micro-batches have
            another gradient than the batch.
    """
    return Cosines(chain, list(batches), recompute, micro_batches).measure(pairs_of(chain.depth, horizons, strides))


class Cosines:
    """The exact gradients of a few batches, kept on the host where it has room, to compare others with.

    Args and errors are those of :func:`cosine`.
    """

    def __init__(
        self, chain: Chain, batches: Sequence[Any], recompute: Recompute = never, micro_batches: int = 1
    ) -> None:
        if not batches:
            raise ValueError("batches is empty: give at least one batch.")
        self.chain, self.batches = chain, batches
        self.recompute, self.micro_batches = recompute, micro_batches
        self.groups = _groups(chain)
        self.state = random_state(chain)
        if micro_batches > 1:
            check_pieces(chain, move(batches[0], chain.device), micro_batches)
        own = sum(p.nbytes for group in self.groups for p in group)
        self.keeps = own * len(batches) <= HOST_SHARE * host_bytes()
        self.kept: dict[int, Exact] = {}

    def measure(self, pairs: Sequence[tuple[int, int]]) -> list[Sample]:
        """One sample for each (horizon, stride)."""
        found: dict[tuple[int, int], list[tuple[float, float, list[float | None]]]] = {pair: [] for pair in pairs}
        for number in range(len(self.batches)):
            with restored(self.chain):
                exact, loss = self._exact(number)
                own = [_dot(group, exact, exact) for group in self.groups]
                for pair in pairs:
                    if pair[0] == self.chain.depth:
                        found[pair].append(_angles(self.groups, exact, exact, own, loss))
                        continue
                    reached = self._gradient(number, Schedule.horizon(self.chain.depth, *pair))
                    here = {p: p.grad for p in exact if p.grad is not None}
                    found[pair].append(_angles(self.groups, here, exact, own, reached))
        return [_sample(pair, values) for pair, values in found.items()]

    def _exact(self, number: int) -> Exact:
        if number in self.kept:
            return self.kept[number]
        loss = self._gradient(number, Schedule.exact(self.chain.depth))
        found = {p: host_copy(p.grad) for group in self.groups for p in group if p.grad is not None}
        if self.keeps:
            self.kept[number] = found, loss
        return found, loss

    def _gradient(self, number: int, schedule: Schedule) -> float:
        chain = self.chain
        for p in chain.parameters():
            p.grad = None
        set_random_state(chain, self.state)
        schedule = replace(schedule, recompute=self.recompute(schedule))
        with scratch_buffers(chain.model.modules()):
            batch = move(self.batches[number], chain.device)
            loss = gradient(chain, batch, schedule, self.micro_batches).item()
        if not math.isfinite(loss):
            raise ValueError(f"loss is {loss} on batch {number}: check the data and the model's initial weights.")
        return loss


def host_bytes() -> float:
    """Bytes of memory that the machine has; 0 where it does not tell."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # no such question on this system
        return 0.0


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


def _dot(group: list[nn.Parameter], left: dict[nn.Parameter, Tensor], right: dict[nn.Parameter, Tensor]) -> float:
    """Inner product over a group, in double precision and a chunk at a time."""
    return sum(
        torch.dot(a.double(), b.to(a.device).double()).item()
        for p in group
        if p in left and p in right
        for a, b in _chunks(left[p], right[p])
    )


def _chunks(left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(*(torch.split(side.reshape(-1), CHUNK) for side in (left, right)), strict=True)


def _angles(
    groups: list[list[nn.Parameter]],
    here: dict[nn.Parameter, Tensor],
    exact: dict[nn.Parameter, Tensor],
    own: list[float],
    loss: float,
) -> tuple[float, float, list[float | None]]:
    dots = [_dot(group, here, exact) for group in groups]
    norms = [_dot(group, here, here) for group in groups]
    dot, norm, length = sum(dots), sum(norms), sum(own)
    if not (math.isfinite(dot) and norm > 0 and length > 0):
        raise ValueError(
            f"gradient: |g_h|^2 = {norm:.3g}, |g_T|^2 = {length:.3g} at loss {loss:.3g}: a gradient that "
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
