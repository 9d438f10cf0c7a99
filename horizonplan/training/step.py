"""One optimiser step: the gradient over its micro-batches, and what stands between a gradient and an update.

The order is that of every mixed-precision loop: backward passes under autocast, reduction over processes, unscaling,
the check that all is finite, clipping, the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from horizonplan.algorithms import Algorithm, GradientMethod
from horizonplan.algorithms.base import gradient_norm, not_finite
from horizonplan.batch import batch_size, move
from horizonplan.chain import Chain
from horizonplan.precision import autocast
from horizonplan.probes.pieces import at_most, pieces
from horizonplan.training.data import Turn
from horizonplan.training.fused import fused
from horizonplan.training.team import Team


@dataclass
class Stepper:
    """What a step is made with.

    Attributes:
        chain: the model as a chain.
        optimizer: the user's.
        place: the device to move batches to.
        team: the processes whose gradients are summed.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        scaler: fp16's.
        max_grad_norm: what the gradient's norm is clipped to.
        fuse: update each parameter as soon as its gradient is complete.
        accumulate: batches whose gradients make one step.
        micro_batches: parts that each of them is split into.
        updated: whether the last step changed the weights.
    """

    chain: Chain
    optimizer: Optimizer
    place: torch.device
    team: Team
    precision: str = "fp32"
    scaler: torch.amp.GradScaler | None = None
    max_grad_norm: float | None = None
    fuse: bool = False
    accumulate: int = 1
    micro_batches: int = 1
    updated: bool = False

    def __post_init__(self) -> None:
        self.own = list(self.chain.parameters())  # walking through the modules takes longer than clearing

    def gradient(self, algorithm: Algorithm, turns: Sequence[Turn], shares: Sequence[float]) -> Tensor:
        """Accumulate the gradient of the turns' mean loss; returns that loss. A method that owns its step makes it.

        Args:
            algorithm: the method.
            turns: this process's micro-batches.
            shares: their weights in the mean, which add up to 1 over all processes.
        """
        self.clear()
        if not isinstance(algorithm, GradientMethod):
            return _checked(algorithm, algorithm.step(self.chain, move(turns[0].batch, self.place), self.optimizer))
        own = [(turn, share) for turn, share in zip(turns, shares, strict=True) if turn.counts]
        self.team.silent = not own
        parts = [piece for turn, share in own or [(turns[-1], 0.0)] for piece in self._pieces(turn, share)]
        total: Tensor | None = None
        for number, (batch, share) in enumerate(parts):
            self.team.reducing = number == len(parts) - 1
            with autocast(self.precision, self.place), self._updating():
                loss = _checked(algorithm, algorithm.backward(self.chain, move(batch, self.place), self._scale(share)))
            part = share * loss if own else torch.zeros_like(loss)
            total = part if total is None else total + part
        assert total is not None
        return total if self.team.world == 1 else total.new_tensor(self.team.finish(total.item()))

    def update(self, algorithm: Algorithm, loss: Tensor) -> str | None:
        """Clip and update, unless the loss or the gradient is not finite; that is said in words, then.

        In fp16 a gradient that overflows is no fault while the scale is above 1: the scale is lowered.
        """
        if self.fuse or not isinstance(algorithm, GradientMethod):  # the update is made: the weights tell
            weights = [p.detach() for p in _parameters(self.optimizer) if p.is_floating_point()]
            wrong = not_finite(loss, torch.nn.utils.get_total_norm(weights))
            self.updated = wrong is None
            return wrong
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.optimizer)
        wrong = not_finite(loss, norm)
        self.updated = wrong is None
        if self.updated:
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(_parameters(self.optimizer), self.max_grad_norm, norm)
            self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update()
            if torch.isfinite(loss) and self.scaler.get_scale() >= 1:
                wrong = None
        return wrong

    def clear(self) -> None:
        """Forget all gradients."""
        for p in (*self.own, *_parameters(self.optimizer)):
            p.grad = None

    def _pieces(self, turn: Turn, share: float) -> list[tuple[Any, float]]:
        """A turn's micro-batches, each with its share in the mean."""
        if self.micro_batches == 1:
            return [(turn.batch, share)]
        return [(piece, share * part) for piece, part in pieces(turn.batch, at_most(turn.batch, self.micro_batches))]

    def _updating(self) -> AbstractContextManager[None]:
        return fused(self.optimizer) if self.fuse else nullcontext()

    def _scale(self, share: float) -> float | Tensor:
        return share if self.scaler is None else self.scaler.scale(torch.tensor(share, device=self.place))


def samples(turns: Sequence[Turn]) -> list[int] | None:
    """Each turn's samples, 0 for one that does not count; ``None`` where they cannot be told."""
    sizes = [batch_size(turn.batch) for turn in turns]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    return [size if turn.counts else 0 for turn, size in zip(turns, known, strict=True)]


def _checked(algorithm: Algorithm, loss: object) -> Tensor:
    """What a method returned, if it is a loss."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"algorithm: {algorithm} returned {type(loss).__name__}; return the terminal loss, a scalar tensor."
        )
    return loss.detach().reshape(())


def _parameters(optimizer: Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]
