"""Runs whose processes share the layers: every process sees every batch, and the processes are up to a step apart.

A process tells the others before each step what it has for it, and hears what they said before the step before. So
none waits for another one's present step, and all stop, or end, at the same one (a step after one of them asked to).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from horizonplan.algorithms import Algorithm, LayerParallel
from horizonplan.algorithms.links import answered
from horizonplan.batch import tensors
from horizonplan.training import state
from horizonplan.training.data import Turn
from horizonplan.training.run import Run
from horizonplan.training.signals import Asked, Terminated


def time_limit(algorithm: Algorithm | Mapping[int, Algorithm] | None) -> float | None:
    """Seconds that processes wait for each other where they share the layers; ``None``: the methods do not."""
    methods = algorithm.values() if isinstance(algorithm, Mapping) else [algorithm]
    return max((method.time_limit for method in methods if isinstance(method, LayerParallel)), default=None)


def rounds(run: Run, asked: Asked, to_stop: Callable[[], bool]) -> Iterator[tuple[list[Turn], list[float]]]:
    """The batch of each step, until the epoch's end or until some process stops.

    Args:
        run: the run.
        asked: whether this process is to end.
        to_stop: whether a callback on some process has asked to stop; called on all processes.

    Raises:
        Terminated: SIGTERM has come to one of the processes, and the run is saved.
        ValueError: the processes do not have the same batches.
    """
    team = run.stepper.team
    batches = run.stream.batches(run.epoch) if run.stream.epoch == run.epoch else iter(())  # saved at its very end
    turns: list[Turn] | None = None
    while turns != []:
        if turns is not None:
            stops, ends = _agreed(run)
            if ends:
                state.save(run)
                run.log.event("terminated", step=run.step)
                raise Terminated(f"SIGTERM: {run.step} steps are made and saved; go on with resume=True (--resume).")
            if stops and to_stop():
                return
        turns = list(islice(batches, 1))
        team.say(run.stop_reason is not None, asked.to_end, len(turns), fingerprint(turns))
        if turns:
            yield turns, [1.0]
    _agreed(run)


def fingerprint(turns: list[Turn]) -> float:
    """A number that differs where batches do, in the order of samples too, most likely: a checksum of all bytes."""
    found = 0
    for tensor in (tensor for turn in turns for tensor in tensors(turn.batch)):
        dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        found = zlib.crc32(str((tuple(tensor.shape), tensor.dtype)).encode(), found)
        found = zlib.crc32(dense.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), found)
    return float(found)


def _agreed(run: Run) -> tuple[bool, bool]:
    """Whether to stop, and to end, as all said last, if all had the same batch then."""
    method: Any = run.algorithm
    with answered(method.time_limit):
        said = run.stepper.team.heard()
    stops, ends, counts, prints = (list(column) for column in zip(*said, strict=True))
    if len(set(counts)) > 1 or len(set(prints)) > 1:
        raise ValueError(
            f"data: before step {run.step} the processes had different batches; with {type(method).__name__} "
            "all need the same ones in the same order: give a seeded generator, and no sampler that shares."
        )
    return any(stops), any(ends)
