"""All parts of a chain in one step: this process's part where there are several processes, else all in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from horizonplan.algorithms.base import gradient_norm, not_finite
from horizonplan.algorithms.coarse import Coarse
from horizonplan.algorithms.links import Mailbox, Port, Wire
from horizonplan.algorithms.part import Part
from horizonplan.algorithms.regression import Regression
from horizonplan.algorithms.section import PredictionError, Section
from horizonplan.algorithms.whole import share
from horizonplan.chain import Chain


class Sections:
    """The parts with their links and regressions.

    Args:
        chain: the chain.
        parts: all of its parts.
        predictors: for each part; the last has none.
        coarse: the coarse model, if there is a global prediction.
        exact: wait for the true co-states.
        time_limit: seconds that a process waits for another one.

    Attributes:
        all: a section a part; those of other processes are as the last exchange left them.
        own: those that this process works on.
    """

    def __init__(
        self,
        chain: Chain,
        parts: Sequence[Part],
        predictors: Sequence[Regression | None],
        coarse: Coarse | None,
        exact: bool,
        time_limit: float,
    ) -> None:
        self.chain, self.coarse = chain, coarse
        self.wire = meet(len(parts), time_limit, chain.device)
        ports: Sequence[Port] = Mailbox.ports(len(parts)) if self.wire is None else [self.wire] * len(parts)
        self.all = [
            Section(number, *of_part, exact)
            for number, of_part in enumerate(zip(parts, ports, predictors, strict=True))
        ]
        self.weights = list(chain.parameters())  # walking through the modules takes longer than clearing
        self.own = self.all if self.wire is None else [self.all[self.wire.part]]

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where the parts start, and the depth."""
        return (*(section.part.first for section in self.all), self.chain.depth)

    @property
    def errors(self) -> list[PredictionError]:
        """Of all cuts."""
        return [error for section in self.all for error in section.errors]

    def predict_globally(self, batch: Any, optimizer: Optimizer, last: bool) -> Tensor:
        """Train the coarse model on a batch, in the first process (Algorithm 3); returns its loss.

        Args:
            batch: the batch.
            optimizer: the user's, over the fine model's weights.
            last: whether local correction follows; the other processes then take over all that the first one has.
        """
        with fresh(self.weights, optimizer, []):
            loss = self._coarse_step(batch, optimizer)
        if last:
            self.share(optimizer, all_from_first=True)
        return loss

    def correct_locally(self, batch: Any, optimizer: Optimizer, step: int) -> Tensor:
        """Train the parts on a batch (Algorithm 4); returns the loss."""
        with fresh(self.weights, optimizer, [section.port for section in self.own]):
            try:
                loss = self._gradients(batch, optimizer, step)
            except BaseException:
                for section in self.own:
                    section.waiting = None
                raise
        optimizer.step()
        return loss

    def gather(self, optimizer: Optimizer, coarse: bool) -> None:
        """Learn from the pairs under way, and give every process everything.

        Args:
            optimizer: the user's.
            coarse: whether the coarse model is being trained.
        """
        for section in self.own:
            section.absorb()
        self.share(optimizer, all_from_first=coarse)

    def share(self, optimizer: Optimizer, all_from_first: bool) -> None:
        """Give every process what the others have, or all that the first one has."""
        given = (self.all if self.wire is None or self.wire.part == 0 else []) if all_from_first else self.own
        states = {section.number: section.state_dict() for section in given}
        parts = [section.part for section in given]
        for number, state in share(self.wire, self.chain, optimizer, parts, states).items():
            self.all[number].load_state_dict(state, self.chain.device)

    def state_dict(self) -> list[dict[str, Any]]:
        """Of each section."""
        return [section.state_dict() for section in self.all]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Restore them."""
        for section, state in zip(self.all, states, strict=True):
            section.load_state_dict(state, self.chain.device)

    def _coarse_step(self, batch: Any, optimizer: Optimizer) -> Tensor:
        assert self.coarse is not None
        loss, norm = torch.zeros((), device=self.chain.device), torch.zeros(())
        if self.wire is None or self.wire.part == 0:
            loss = self.coarse.backward(batch)
            norm = gradient_norm(optimizer)
        if self.wire is not None:
            value, size = self.wire.gather((loss.item(), norm.item()))[0]
            loss, norm = loss.new_tensor(value), loss.new_tensor(size)
        refuse_not_finite(loss, norm)
        if self.wire is None or self.wire.part == 0:
            optimizer.step()
            self.coarse.prolong()
            self._learn(batch)
        return loss

    def _learn(self, batch: Any) -> None:
        """Pairs of the coarse model are the regressions' first ones."""
        assert self.coarse is not None
        for section in self.all[:-1]:
            if (pair := self.coarse.pairs.get(section.part.stop)) is not None and section.regression is not None:
                section.regression.add(pair[0], section.regression.targets(batch, pair[0]), pair[1])

    def _gradients(self, batch: Any, optimizer: Optimizer, step: int) -> Tensor:
        """Accumulate the gradients of this process's parts; returns the loss."""
        try:
            losses = [loss for section in self.own if (loss := section.forward(batch)) is not None]
            for loss in losses:  # before anything is sent back
                refuse_not_finite(loss, torch.zeros_like(loss))
        except Exception:
            for section in self.own if self.wire is None else []:
                section.absorb()  # the pair of the step before has come, and is not to be lost with this one
            raise
        for section in reversed(self.own):
            section.backward(step, rate_of(optimizer, section.part), batch)
        losses += [section.port.receive_loss() for section in self.own if not section.part.last]
        refuse_not_finite(losses[0], gradient_norm(optimizer))
        return losses[0]


def meet(parts: int, time_limit: float, device: torch.device) -> Wire | None:
    """This process's links to the others; ``None`` for a process by itself.

    Raises:
        ValueError: there are not as many processes as parts.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return None
    if world != parts:
        raise ValueError(f"parts={parts}: there are {world} processes; start as many as parts, or one that does all.")
    return Wire(time_limit, device)


def rate_of(optimizer: Optimizer, part: Part) -> float:
    """The learning rate of a part: of the group that holds its first trainable weight; 0 where it has none."""
    weight = next((p for p in part.parameters() if p.requires_grad), None)
    rates = (group["lr"] for group in optimizer.param_groups if any(p is weight for p in group["params"]))
    return float(next(rates, 0.0))


@contextmanager
def fresh(weights: Sequence[nn.Parameter], optimizer: Optimizer, ports: Sequence[Port]) -> Iterator[None]:
    """No gradient is there at the start; after an error none is left, and in one process no message."""
    torch.clear_autocast_cache()  # an optimiser may have changed the weights behind it
    held = [*weights, *(p for group in optimizer.param_groups for p in group["params"])]
    for p in held:
        p.grad = None
    try:
        yield
    except BaseException:
        for p in held:
            p.grad = None
        for port in ports:
            if isinstance(port, Mailbox):
                port.queues.clear()
        raise


def refuse_not_finite(loss: Tensor, norm: Tensor) -> None:
    """See that a loss and a gradient's norm are finite.

    Raises:
        FloatingPointError: one is not.
    """
    if wrong := not_finite(loss, norm):
        raise FloatingPointError(
            f"{wrong}: check the data, lower the learning rate; this process's weights were not updated."
        )
