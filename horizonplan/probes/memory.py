"""M(h), measured: the peak bytes of one full training step at steady state."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from horizonplan.batch import nbytes
from horizonplan.chain import Chain
from horizonplan.gradient import horizon_backward
from horizonplan.probes.nvml import Reading, read, seen_bytes
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize, optimizer_for, restored, standing_bytes, trainable
from horizonplan.probes.tracker import LiveBytes
from horizonplan.schedule import Schedule

Stride = int | str


def stride_of(stride: Stride, horizon: int) -> int:
    """A stride, ``"horizon"`` standing for disjoint windows.

    Raises:
        ValueError: it is neither a whole number in 1..horizon nor ``"horizon"``.
    """
    if stride == "horizon":
        return horizon
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= horizon:
        raise ValueError(f"stride={stride!r}: give a whole number between 1 and horizon={horizon}, or 'horizon'.")
    return stride


def pairs_of(depth: int, horizons: Sequence[int], strides: Sequence[Stride]) -> list[tuple[int, int]]:
    """Every (horizon, stride) asked for, each once.

    Raises:
        ValueError: a horizon or stride that a chain of this depth does not have.
    """
    for horizon in horizons:
        Schedule.horizon(depth, horizon)
    return list(dict.fromkeys((h, stride_of(s, h)) for h in horizons for s in strides))


def largest(batches: Iterable[Any]) -> Any:
    """The batch of most bytes, storages that batches share not counted in full.

    Raises:
        ValueError: there is none.
    """
    if not (found := list(batches)):
        raise ValueError("batches is empty: give at least one batch.")
    return max(found, key=nbytes)


def memory(
    chain: Chain,
    batches: Iterable[Any],
    horizons: Sequence[int],
    strides: Sequence[Stride] = (1,),
    optimizer: Optimize | None = None,
    recompute: int = 0,
) -> list[Sample]:
    """Measure M(h) on the largest of the batches (Eq. 11's left side, for any stride).

    On CPU the tracker's peak over a step (``zero_grad(set_to_none=True)``, backward, optimiser step)
    plus the bytes alive at its start (parameters, buffers, optimiser state, batch), exact and
    repeatable. On CUDA ``max_memory_allocated``; the detail has NVML's bytes of the process
    (``nvml_bytes``), how they were had (``nvml``) and what stood in the way (``nvml_fallback``).

    Returns:
        One sample in bytes for each horizon and stride. The model is left bit for bit as it was.
    """
    batch, pairs = largest(batches), pairs_of(chain.depth, horizons, strides)
    samples = []
    gc.collect()
    with restored(chain, weights=True):
        made = optimizer_for(trainable(chain), optimizer)
        for pair in pairs:
            value, detail = _peak(chain, batch, Schedule.horizon(chain.depth, *pair, recompute), made)
            samples.append(Sample("memory", "bytes", *pair, value, detail=detail))
    return samples


def step(chain: Chain, batch: Any, schedule: Schedule, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """One full training step; returns the terminal loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = horizon_backward(chain, batch, schedule)
    optimizer.step()
    return loss


def _peak(chain: Chain, batch: Any, schedule: Schedule, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
    baseline = _baseline(chain.device)
    step(chain, batch, schedule, optimizer)
    optimizer.zero_grad(set_to_none=True)
    if chain.device.type != "cuda":
        base = standing_bytes(chain, optimizer, batch)
        with LiveBytes() as tracker:
            step(chain, batch, schedule, optimizer)
        optimizer.zero_grad(set_to_none=True)
        return base + tracker.peak, {"how": "live storages", "base_bytes": base}
    device = chain.device
    step(chain, batch, schedule, optimizer)
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step(chain, batch, schedule, optimizer)
    torch.cuda.synchronize(device)
    seen = read(device)
    nvml_bytes, how = seen_bytes(baseline, seen)
    detail = {
        "how": "max_memory_allocated",
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "nvml_bytes": nvml_bytes,
        "nvml": how,
        "nvml_fallback": seen.fallback,
    }
    peak = standing_bytes(chain, optimizer, batch) + torch.cuda.max_memory_allocated(device) - before
    optimizer.zero_grad(set_to_none=True)
    return peak, detail


def _baseline(device: torch.device) -> Reading:
    """What NVML sees besides this process's allocator: other processes, and the context."""
    seen = read(device)
    if seen.used_bytes is None:
        return seen
    return replace(seen, used_bytes=seen.used_bytes - torch.cuda.memory_reserved(device))
