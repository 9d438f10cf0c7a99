"""Any training method as a black box: the peak bytes and the seconds of its steps.

Methods that are schedules are folded over a profile; those that are not (SGR with its second-order graph, say) can only
be tried. What is measured is what :func:`horizonplan.probes.memory` and :func:`horizonplan.probes.time` measure, so the
numbers stand in one table.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Iterable
from time import perf_counter
from typing import Any

import torch

from horizonplan.algorithms import Algorithm, GradientMethod
from horizonplan.chain import Chain
from horizonplan.probes.memory import OUT_OF_MEMORY, attempt, largest, peak_on_cuda
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize, optimizer_for, restored, standing_bytes, trainable
from horizonplan.probes.tracker import LiveBytes


def method(
    chain: Chain,
    batches: Iterable[Any],
    algorithm: Algorithm,
    optimizer: Optimize | None = None,
    repeats: int = 5,
) -> list[Sample]:
    """Measure a method's memory and time on the largest of the batches, auxiliary heads and their training included.

    A full step at steady state (``zero_grad(set_to_none=True)``, backward, optimiser step). Memory on the CPU is the
    tracker's peak plus the bytes alive at the step's start; on CUDA the allocator's peak, in this process. Time is the
    median of ``repeats`` steps after that one.

    Args:
        chain: the model, on the device to be measured.
        batches: batches on that device.
        algorithm: the method; it is prepared for the chain by this, anew.
        optimizer: a class or callable from parameters to an Optimizer, or ``None`` for ``AdamW(lr=1e-3)``. An
            Optimizer's own settings cannot be taken over where there are heads.
        repeats: timed steps.

    Returns:
        A sample in bytes and one in seconds, of horizon and stride 0; ``detail["method"]`` names the method,
        ``detail["extra_parameters"]`` counts the auxiliary heads'. Without enough memory the first one's value is NaN
        and its source ``"out of memory"``, and there is no second one. The model is left bit for bit as it was.

    Raises:
        ValueError: the method does not fit the chain, or an Optimizer is given for a method with heads.
    """
    batch = largest(batches)
    gc.collect()
    with restored(chain, weights=True):
        extra = algorithm.prepare(chain, batch)
        heads = [] if extra is None else [p for p in extra.parameters() if p.requires_grad]
        if heads and isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer: {algorithm} has heads that it does not hold; give callable(params).")
        made = optimizer_for([*trainable(chain), *heads], optimizer)

        def step() -> None:
            if isinstance(algorithm, GradientMethod):  # without the check for NaN, as the other probes
                made.zero_grad(set_to_none=True)
                algorithm.backward(chain, batch)
                made.step()
            else:
                algorithm.step(chain, batch, made)

        def peak() -> tuple[int, dict[str, Any]]:
            if chain.device.type == "cuda":
                return peak_on_cuda(chain, batch, step, made, extra)
            step()
            made.zero_grad(set_to_none=True)
            base = standing_bytes(chain, made, batch, extra)
            with LiveBytes() as tracker:
                step()
            return base + tracker.peak, {"how": "live storages", "base_bytes": base}

        named = {"method": str(algorithm), "extra_parameters": sum(p.numel() for p in heads)}
        found, message = attempt(peak, chain.device)
        if found is None:
            lost = {**named, "message": str(message)}
            return [Sample("memory", "bytes", 0, 0, math.nan, source=OUT_OF_MEMORY, detail=lost)]
        rounds = [_seconds(step, chain.device) for _ in range(repeats)]
        stderr = statistics.stdev(rounds) / len(rounds) ** 0.5 if len(rounds) > 1 else None
        return [
            Sample("memory", "bytes", 0, 0, found[0], detail={**named, **found[1]}),
            Sample(
                "time", "seconds", 0, 0, statistics.median(rounds), stderr, detail={**named, "rounds": tuple(rounds)}
            ),
        ]


def _seconds(step: Any, device: torch.device) -> float:
    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    settle()
    start = perf_counter()
    step()
    settle()
    return perf_counter() - start
