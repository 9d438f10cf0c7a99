"""The largest micro-batch whose step fits into a given memory, by folding profiles of small ones.

Bytes of states and graphs are straight lines in the samples, so the profiles of two small micro-batches tell those of
all others (:func:`horizonplan.predict.at_batch_size`), and a whole batch never has to fit. What is found is profiled
itself in the end, as an operator may choose another algorithm at another size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from horizonplan.batch import ComputeLoss, LossFunction, batch_size, move, nbytes, resized
from horizonplan.chain import Chain
from horizonplan.chain.calls import training_mode
from horizonplan.chain.chain import refuse_wrappers
from horizonplan.predict import accumulated_bytes, at_batch_size, step_bytes
from horizonplan.probes.profile import Profile, profile
from horizonplan.probes.steady import Optimize
from horizonplan.projection import Projection
from horizonplan.schedule import Schedule
from horizonplan.units import format_bytes, parse_bytes

SMALL = (2, 4)  # samples, from which the lines are drawn


@dataclass(frozen=True)
class MicroBatch:
    """What fits.

    Attributes:
        samples: of the largest micro-batch; 0: not even one sample fits.
        parts: micro-batches that the batch is split into then; 0 where nothing fits.
        predicted_bytes: peak of a step with them; of one sample where nothing fits.
        limit_bytes: what there was to fit into.
        batch_size: samples of the batch.
    """

    samples: int
    parts: int
    predicted_bytes: int
    limit_bytes: int
    batch_size: int

    def explain(self) -> str:
        """The answer in plain words."""
        needed, limit = format_bytes(self.predicted_bytes), format_bytes(self.limit_bytes)
        if not self.samples:
            return f"Not even micro-batches of one sample fit {limit}: a step needs {needed}."
        if self.parts == 1:
            return f"The batch of {self.batch_size} samples fits {limit} as it is: a step needs {needed}."
        return (
            f"Micro-batches of up to {self.samples} samples fit {limit}: the batch of {self.batch_size} in "
            f"{self.parts} parts, a step needs {needed}."
        )


def largest_micro_batch(
    model: nn.Module,
    batch: Any,
    limit: int | str,
    horizon: int | None = None,
    *,
    stride: int = 1,
    recompute: int = 0,
    optimizer: Optimize | None = None,
    loss: LossFunction | None = None,
    compute_loss: ComputeLoss | None = None,
    blocks: str | Sequence[str] | None = None,
    projection: Projection | None = None,
) -> MicroBatch:
    """Find into how few parts a batch must be split for its step to stay within ``limit``.

    Gradients are accumulated over the parts. That is the batch's own gradient where its loss is a mean over samples
    and no layer couples them; whether it is, :func:`horizonplan.plan_horizon` tells with ``candidates="all"``.

    Args:
        model: any chain of blocks, on the device that it would train on. It is left bit for bit as it was.
        batch: a batch as in training; its tensors share their first dimension, the samples.
        limit: bytes that a step may occupy, or ``"24GiB"``.
        horizon: h, 1..T; ``None``: back-propagation.
        stride: s, 1..horizon.
        recompute: activation checkpointing every so many blocks; 0: none.
        optimizer: as for :func:`horizonplan.plan_horizon`, and so are the others.
        loss: likewise.
        compute_loss: likewise.
        blocks: likewise.
        projection: likewise.

    Raises:
        ValueError: bad arguments, or the batch has no number of samples.

    >>> layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(6)], nn.Linear(64, 3))
    >>> batch = torch.ones(256, 64), torch.zeros(256, dtype=torch.long)
    >>> found = largest_micro_batch(layers, batch, "900KiB")
    >>> 1 < found.samples < 256 and found.predicted_bytes <= 900 * 2**10
    True
    """
    limit_bytes, count = parse_bytes(limit, "limit"), batch_size(batch)
    if count is None:
        raise ValueError("batch: its tensors share no first dimension, so it cannot be split into micro-batches.")
    refuse_wrappers(model)
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    with training_mode(model):
        first = move(resized(batch, min(count, SMALL[1])), place)
        chain = Chain.from_model(model, first, blocks, loss, compute_loss, projection)
        schedule = Schedule.horizon(chain.depth, chain.depth if horizon is None else horizon, stride, recompute)

        def measured(samples: int) -> Profile:
            return profile(chain, move(resized(batch, samples), place), optimizer, repeats=0, summed=False)

        return _search(measured, schedule, count, nbytes(batch), limit_bytes)


def _search(
    measured: Callable[[int], Profile], schedule: Schedule, count: int, batch_bytes: int, limit_bytes: int
) -> MicroBatch:
    sizes = SMALL if count >= SMALL[1] else (1, min(count, 2))
    small, large = (measured(samples) for samples in sizes)
    standing = large.base_bytes - round(batch_bytes * sizes[1] / count)

    def needed(parts: int, piece: Profile | None = None) -> int:
        """Bytes of a step in so many parts, of which the largest has ``piece``'s profile."""
        samples = -(-count // parts)
        if piece is None:
            piece = large if sizes[0] == sizes[1] else at_batch_size(small, large, sizes, samples)
        whole = replace(piece, base_bytes=standing + batch_bytes)
        return step_bytes(schedule, whole) if parts == 1 else accumulated_bytes(schedule, whole, piece)

    counts = _counts(count)
    if needed(count) > limit_bytes:
        return MicroBatch(0, 0, needed(count), limit_bytes, count)
    place = next(i for i, parts in enumerate(counts) if needed(parts) <= limit_bytes)
    while (size := needed(counts[place], measured(-(-count // counts[place])))) > limit_bytes:
        if place + 1 == len(counts):
            return MicroBatch(0, 0, size, limit_bytes, count)
        place += 1
    return MicroBatch(-(-count // counts[place]), counts[place], size, limit_bytes, count)


def _counts(count: int) -> list[int]:
    """Numbers of parts whose largest part differs, fewest first."""
    sizes: dict[int, int] = {}
    for parts in range(1, count + 1):
        sizes.setdefault(-(-count // parts), parts)
    return list(sizes.values())
