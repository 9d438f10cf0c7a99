"""Any training method as a black box: the peak bytes, the seconds and the losses of its steps.

Methods that are schedules are folded over a profile; those that are not (SGR with its second-order graph, say) can only
be tried. What is measured is what :func:`horizonplan.probes.memory`, :func:`horizonplan.probes.time` and
:func:`horizonplan.probes.rollout` measure, so the numbers stand in one table.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.algorithms import Algorithm, GradientMethod, short_name
from horizonplan.batch import move
from horizonplan.chain import Chain
from horizonplan.probes.memory import COUNTED_STEPS, OUT_OF_MEMORY, WARM_STEPS, attempt, largest, peak_on_cuda
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize, optimizer_for, restored, seed_all, standing_bytes, trainable
from horizonplan.probes.time import in_turn, stderr_of
from horizonplan.probes.tracker import Flops, LiveBytes


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
    median of ``repeats`` steps.

    Args:
        chain: the model, on the device to be measured.
        batches: batches on that device.
        algorithm: the method; it is prepared for the chain by this, anew.
        optimizer: a class or callable from parameters to an Optimizer, or ``None`` for ``AdamW(lr=1e-3)``. An
            Optimizer's own settings cannot be taken over where there are heads.
        repeats: timed steps.

    Returns:
        A sample in bytes and one in seconds, of horizon and stride 0; ``detail["method"]`` names the method,
        ``detail["extra_parameters"]`` counts the auxiliary heads', ``detail["flops"]`` the FLOPs of a step and
        ``detail["steps"]`` the steps that measuring took. Without enough memory the first one's value is NaN and its
        source ``"out of memory"``, and there is no second one. The model is left bit for bit as it was.

    Raises:
        ValueError: the method does not fit the chain, or an Optimizer is given for a method with heads.
    """
    batch = largest(batches)
    gc.collect()
    with prepared(chain, batch, algorithm, optimizer) as ready:
        step = partial(ready.step, batch)

        def peak() -> tuple[int, dict[str, Any]]:
            with Flops() as counter:
                step()
            ready.optimizer.zero_grad(set_to_none=True)
            price = {"flops": counter.total, "steps": repeats + 3}  # counted, tracked, one to warm the clock up
            if chain.device.type == "cuda":
                found, detail = peak_on_cuda(chain, batch, step, ready.optimizer, ready.extra)
                return found, {**detail, **price, "steps": repeats + 2 + WARM_STEPS + COUNTED_STEPS}
            base = standing_bytes(chain, ready.optimizer, batch, ready.extra)
            with LiveBytes() as tracker:
                step()
            return base + tracker.peak, {"how": "live storages", "base_bytes": base, **price}

        named = {"method": short_name(algorithm), "extra_parameters": sum(p.numel() for p in ready.heads)}
        found, message = attempt(peak, chain.device)
        if found is None:
            lost = {**named, "message": str(message)}
            return [Sample("memory", "bytes", 0, 0, math.nan, source=OUT_OF_MEMORY, detail=lost)]
        (rounds,) = in_turn([step], chain.device, repeats)
    seconds = statistics.median(rounds), stderr_of(rounds)
    return [
        Sample("memory", "bytes", 0, 0, found[0], detail={**named, **found[1]}),
        Sample("time", "seconds", 0, 0, *seconds, detail={**named, "rounds": tuple(rounds)}),
    ]


def method_losses(
    chain: Chain,
    batches: Sequence[Any],
    algorithm: Algorithm,
    optimizer: Optimize | None = None,
    seed: int = 0,
) -> list[float]:
    """Train a step on each of the batches, and bring everything back; the terminal losses, NaN once one is not finite.

    Weights, order and random numbers are those of :func:`horizonplan.probes.rollout`'s runs with the same seed. The
    heads' initial weights come from that seed too, before them.

    Args:
        chain: the model in the mode to train in.
        batches: batches in order, on any device.
        algorithm: as for :func:`method`, and so is ``optimizer``.
        optimizer: likewise.
        seed: seed of torch's generators.
    """
    found: list[float] = []
    with prepared(chain, move(batches[0], chain.device), algorithm, optimizer, seed) as ready:
        for batch in batches:
            try:
                found.append(ready.step(move(batch, chain.device)).item())
            except FloatingPointError:  # a method that owns its step may say so itself
                break
            if not math.isfinite(found[-1]):
                break
    return found + [math.nan] * (len(batches) - len(found))


@dataclass(frozen=True)
class Prepared:
    """A method ready to train.

    Attributes:
        step: from a batch on the model's device to the terminal loss, detached.
        optimizer: over the model's parameters and the heads'.
        extra: the auxiliary heads, if there are any.
        heads: their parameters.
    """

    step: Callable[[Any], Tensor]
    optimizer: torch.optim.Optimizer
    extra: nn.Module | None
    heads: list[nn.Parameter]


@contextmanager
def prepared(
    chain: Chain, batch: Any, algorithm: Algorithm, optimizer: Optimize | None, seed: int | None = None
) -> Iterator[Prepared]:
    """A method with its heads and a fresh optimiser; the model is brought back afterwards, bit for bit.

    Args:
        chain: the model.
        batch: what the method is prepared with.
        algorithm: the method.
        optimizer: as for :func:`method`.
        seed: of the heads and again of the first step; ``None``: torch's generators as they are.
    """
    with restored(chain, weights=True):
        if seed is not None:
            seed_all(chain, seed)
        extra = algorithm.prepare(chain, batch)
        heads = [] if extra is None else [p for p in extra.parameters() if p.requires_grad]
        if heads and isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer: {short_name(algorithm)} has heads that it does not hold; give callable(params)."
            )
        made = optimizer_for([*trainable(chain), *heads], optimizer)
        if seed is not None:
            seed_all(chain, seed)

        def step(batch: Any) -> Tensor:
            if not isinstance(algorithm, GradientMethod):
                return algorithm.step(chain, batch, made)
            made.zero_grad(set_to_none=True)
            loss = algorithm.backward(chain, batch)  # without the check for NaN, as the other probes
            made.step()
            return loss

        yield Prepared(step, made, extra, heads)
