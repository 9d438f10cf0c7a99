"""M(h), measured: the peak bytes of one full training step at steady state."""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from horizonplan.batch import move, nbytes
from horizonplan.chain import Chain
from horizonplan.chain.calls import Ambient
from horizonplan.probes.budget import recover
from horizonplan.probes.child import out_of_memory
from horizonplan.probes.isolated import CannotTravel, ChildFailed, ChildKilled, IsolationError, isolated
from horizonplan.probes.nvml import Reading, read, seen_bytes
from horizonplan.probes.pieces import gradient
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize, optimizer_for, restored, standing_bytes, trainable
from horizonplan.probes.tracker import LiveBytes
from horizonplan.schedule import Schedule

Stride = int | str
Value = TypeVar("Value")

OUT_OF_MEMORY, FAILED = "out of memory", "failed"
WARM_STEPS, COUNTED_STEPS = 2, 3  # on CUDA: optimiser state and workspaces come with the first
TIMEOUT_SECONDS = 600.0


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
    in_children: bool | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    micro_batches: int = 1,
) -> list[Sample]:
    """Measure M(h) on the largest of the batches (Eq. 11's left side, for any stride).

    On CPU the tracker's peak over a step (``zero_grad(set_to_none=True)``, backward, optimiser step)
    plus the bytes alive at its start (parameters, buffers, optimiser state, batch), exact and
    repeatable. On CUDA ``max_memory_allocated`` of three steps after two, in a process of its own;
    the detail has NVML's bytes of the process (``nvml_bytes``), how they were had (``nvml``) and what
    stood in the way (``nvml_fallback``).

    Running out of memory is a measurement: a sample of value NaN and source ``"out of memory"``. Larger
    horizons of the same stride are then not tried, and have no sample. So it is with a child process
    that crashed or took too long, whose sample has the source ``"failed"``.

    Args:
        chain: the model, on the device to be measured.
        batches: batches on that device.
        horizons: horizons h.
        strides: strides s at each of them.
        optimizer: as for :func:`horizonplan.probes.profile`.
        recompute: activation checkpointing every so many blocks.
        in_children: measure each in a fresh process; ``None``: on CUDA. What cannot be handed to
            another process is measured in this one, and ``detail["in_process"]`` says why.
        timeout_seconds: limit for one such process.
        micro_batches: parts of the batch whose gradients are accumulated.

    Returns:
        One sample in bytes for each horizon and stride, by horizon. The model is left bit for bit as it was.
    """
    batch, pairs = largest(batches), sorted(pairs_of(chain.depth, horizons, strides))
    if in_children or (in_children is None and chain.device.type == "cuda"):
        return _until_full(pairs, _in_children(chain, batch, optimizer, recompute, timeout_seconds, micro_batches))
    gc.collect()
    with restored(chain, weights=True):
        made = optimizer_for(trainable(chain), optimizer)
        warm: Schedule | None = Schedule.horizon(chain.depth, 1)  # the cheapest; it brings all that outlives a step

        def measure(pair: tuple[int, int]) -> Sample:
            nonlocal warm
            schedule = Schedule.horizon(chain.depth, *pair, recompute)
            found, message = attempt(lambda: _peak(chain, batch, schedule, made, warm, micro_batches), chain.device)
            warm = None
            made.zero_grad(set_to_none=True)
            if found is None:
                return _lost(pair, str(message))
            return Sample("memory", "bytes", *pair, found[0], detail=found[1])

        return _until_full(pairs, measure)


def step(
    chain: Chain, batch: Any, schedule: Schedule, optimizer: torch.optim.Optimizer, micro_batches: int = 1
) -> torch.Tensor:
    """One full training step; returns the terminal loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = gradient(chain, batch, schedule, micro_batches)
    optimizer.step()
    return loss


def attempt(call: Callable[[], Value], device: torch.device) -> tuple[Value | None, str | None]:
    """What a call returns, or ``None`` and the message with which it ran out of memory."""
    message = None
    try:
        return call(), None
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and so is cuBLAS without room for its workspace
        if not out_of_memory(error):
            raise
        message = str(error)
    recover(device)
    return None, message


def _until_full(pairs: Iterable[tuple[int, int]], measure: Callable[[tuple[int, int]], Sample]) -> list[Sample]:
    """Measure in order; after one that does not fit, none of its stride."""
    samples: list[Sample] = []
    full: set[int] = set()
    for pair in pairs:
        if pair[1] not in full:
            samples.append(measure(pair))
            full |= {pair[1]} if math.isnan(samples[-1].value) else set()
    return samples


def _lost(pair: tuple[int, int], message: str, source: str = OUT_OF_MEMORY) -> Sample:
    return Sample("memory", "bytes", *pair, math.nan, source=source, detail={"message": message})


def _peak(
    chain: Chain,
    batch: Any,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    warm: Schedule | None,
    micro_batches: int,
) -> tuple[int, dict[str, Any]]:
    make = partial(step, chain, batch, schedule, optimizer, micro_batches)
    if chain.device.type == "cuda":
        return peak_on_cuda(chain, batch, make, optimizer)
    if warm is not None:
        step(chain, batch, warm, optimizer, micro_batches)
        optimizer.zero_grad(set_to_none=True)
    base = standing_bytes(chain, optimizer, batch)
    with LiveBytes() as tracker:
        make()
    return base + tracker.peak, {"how": "live storages", "base_bytes": base}


def peak_on_cuda(
    chain: Chain,
    batch: Any,
    make: Callable[[], object],
    optimizer: torch.optim.Optimizer,
    extra: nn.Module | None = None,
) -> tuple[int, dict[str, Any]]:
    """The allocator's peak over steps that ``make`` makes, and how it was had; in this process."""
    device = chain.device
    for _ in range(WARM_STEPS):
        make()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before, retries = torch.cuda.memory_allocated(device), torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    for _ in range(COUNTED_STEPS):
        make()
    torch.cuda.synchronize(device)
    seen = read(device)
    unknown = replace(seen, used_bytes=None, peak_bytes=None)  # no reading of this process is older than its context
    nvml_bytes, how = seen_bytes(unknown, seen)
    optimizer.zero_grad(set_to_none=True)
    base = standing_bytes(chain, optimizer, batch, extra)
    detail = {
        "how": "max_memory_allocated",
        "base_bytes": base,
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "alloc_retries": torch.cuda.memory_stats(device).get("num_alloc_retries", 0) - retries,
        "nvml_bytes": nvml_bytes,
        "nvml": how,
        "nvml_fallback": seen.fallback,
        "process_bytes": seen.process_bytes,
        "driver_peak_bytes": seen.peak_bytes,
        "used_bytes": seen.used_bytes,
    }
    return base + torch.cuda.max_memory_allocated(device) - before, detail


def _in_children(
    chain: Chain, batch: Any, optimizer: Optimize | None, recompute: int, timeout_seconds: float, micro_batches: int
) -> Callable[[tuple[int, int]], Sample]:
    """A function that measures a (horizon, stride) in a fresh process, the device left free for it."""
    device, cannot_travel, bare = chain.device, "", _stateless(optimizer)

    def in_process(pair: tuple[int, int]) -> Sample:
        how: dict[str, Any] = {"in_children": False, "micro_batches": micro_batches}
        (sample,) = memory(chain, [batch], [pair[0]], [pair[1]], optimizer, recompute, **how)
        return replace(sample, detail={**sample.detail, "in_process": cannot_travel})

    def measure(pair: tuple[int, int]) -> Sample:
        nonlocal cannot_travel
        if cannot_travel:  # a child may have run the whole main script before it failed: once is enough
            return in_process(pair)
        try:
            with _parked(chain.model, device):
                baseline = read(device)
                data = move(batch, torch.device("cpu"))
                given = (
                    chain.model,
                    chain.recipe,
                    data,
                    str(device),
                    pair,
                    bare,
                    (recompute, micro_batches),
                    Ambient(),
                )
                sample = isolated(_as_child, *given, _fraction(device), timeout_seconds=timeout_seconds).value
        except CannotTravel as error:
            cannot_travel = " ".join(str(error).split())
            return in_process(pair)
        except IsolationError as error:
            if isinstance(error, ChildFailed) and not error.out_of_memory:
                if "busy or unavailable" not in str(error):  # a card for one process at a time, and this is one
                    raise
                cannot_travel = str(error)
                return in_process(pair)
            full = error.out_of_memory or (isinstance(error, ChildKilled) and error.signal_name == "SIGKILL")
            return _lost(pair, str(error), OUT_OF_MEMORY if full else FAILED)
        return _since(baseline, sample)

    return measure


def _as_child(
    model: nn.Module,
    recipe: Callable[[nn.Module, Any], Chain],
    batch: Any,
    device: str,
    pair: tuple[int, int],
    optimizer: Optimize | None,
    thrift: tuple[int, int],
    ambient: Ambient,
    fraction: float | None,
) -> Sample:
    """What the fresh process does, under the autocast and the limit that the probe was called under."""
    place = torch.device(device)
    if fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction, place)
    model.to(place)
    here = move(batch, place)
    with ambient.restored():
        chain = recipe(model, here)
        how: dict[str, Any] = {"recompute": thrift[0], "in_children": False, "micro_batches": thrift[1]}
        (sample,) = memory(chain, [here], [pair[0]], [pair[1]], optimizer, **how)
    return sample


def _stateless(optimizer: Optimize | None) -> Optimize | None:
    """An optimiser without its state, of which a probe's fresh one takes nothing: it would fill the child's device."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    bare = copy(optimizer)
    bare.state = defaultdict(dict)
    return bare


def _fraction(device: torch.device) -> float | None:
    """The part of a CUDA device that ``set_per_process_memory_fraction`` has left this process."""
    ask = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # not in older torch
    return ask(device) if ask is not None and device.type == "cuda" else None


def _since(before: Reading, sample: Sample) -> Sample:
    """What the device used more than before the child began: NVML's bytes of a child that hides its own."""
    used = sample.detail.get("used_bytes")
    if used is None or before.used_bytes is None or used < before.used_bytes:  # another process let go of more
        return sample
    seen: dict[str, Any] = {"used_more_bytes": used - before.used_bytes}
    if sample.detail.get("nvml") not in ("process", "driver peak"):
        seen |= {"nvml_bytes": used - before.used_bytes, "nvml": "device used minus baseline"}
    return replace(sample, detail={**sample.detail, **seen})


@contextmanager
def _parked(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in the host's memory for a while, so that its device is free."""
    if device.type != "cuda" or {p.device for p in model.parameters()} != {device}:
        yield  # spread over devices: it could not be put back by one move
        return
    try:
        model.to("cpu")
        torch.cuda.empty_cache()
        yield
    finally:
        model.to(device)
