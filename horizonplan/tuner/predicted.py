"""What a trial's step is predicted to need, in the parts, in the precision and on the kind of device it trains with.

The step runs on tensors without values, as for :func:`horizonplan.fits`. Gradients that wait for the next
micro-batch, or the next batch of a step, are there while it goes forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from horizonplan.batch import move
from horizonplan.chain import Chain
from horizonplan.chain.calls import training_mode
from horizonplan.precision import autocast
from horizonplan.probes.memory import step
from horizonplan.probes.pieces import at_most, gradient
from horizonplan.probes.simulation import SimulationError, all_at_once, simulated
from horizonplan.probes.steady import optimizer_for, restored, standing_bytes, trainable
from horizonplan.probes.tracker import LiveBytes
from horizonplan.schedule import Schedule


@dataclass(frozen=True)
class Step:
    """A step as a trial makes it.

    Attributes:
        optimizer: from parameters to an optimiser.
        blocks: as for :func:`horizonplan.plan_horizon`.
        micro_batches: parts of a batch.
        accumulate: batches of a step.
        precision: of its forwards.
        cuda: whether it is for a CUDA device; else for the CPU.
        how: ``loss``, ``compute_loss`` and ``projection``, those that are given.
    """

    optimizer: Callable[[Any], Optimizer]
    blocks: str | Sequence[str] | None
    micro_batches: int
    accumulate: int
    precision: str
    cuda: bool
    how: Mapping[str, Any]

    def peak_bytes(self, model: nn.Module, batch: Any, schedules: Sequence[Schedule]) -> int:
        """The most that one of these schedules is predicted to need; the model is left as it is.

        Args:
            model: any chain of blocks.
            batch: a batch as in training.
            schedules: one or more, of the model's depth.
        """
        with training_mode(model):
            try:
                with simulated(model, self.cuda) as simulation:
                    fake = simulation.batch(batch)
                    return self._peak(self._chain(model, fake), fake, schedules)
            except SimulationError:  # what depends on values is run where it is
                place = next((p.device for p in model.parameters()), torch.device("cpu"))
                batch = move(batch, place)
                chain = self._chain(model, batch)
                with restored(chain, weights=True):
                    return self._peak(chain, batch, schedules)

    def _chain(self, model: nn.Module, batch: Any) -> Chain:
        return Chain.from_model(model, batch, self.blocks, **self.how)

    def _peak(self, chain: Chain, batch: Any, schedules: Sequence[Schedule]) -> int:
        optimizer = optimizer_for(trainable(chain), self.optimizer)
        if self.cuda:
            all_at_once(optimizer)
        parts = at_most(batch, self.micro_batches)
        found: list[int] = []
        with autocast(self.precision, chain.device):
            step(chain, batch, Schedule.horizon(chain.depth, 1), optimizer, parts)  # the optimiser makes its state
        for schedule in schedules:
            optimizer.zero_grad(set_to_none=True)
            standing = standing_bytes(chain, optimizer, batch)
            with LiveBytes() as tracker:
                for _ in range(self.accumulate):
                    with autocast(self.precision, chain.device):  # which keeps copies of weights until it ends
                        gradient(chain, batch, schedule, parts, 1 / self.accumulate)
                optimizer.step()
            found.append(standing + tracker.peak)
        optimizer.zero_grad(set_to_none=True)
        return max(found)
