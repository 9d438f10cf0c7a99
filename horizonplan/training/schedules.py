"""The paper's rule for the learning rate: smaller after an epoch whose mean training loss grew.

From the general training rule of "Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive
Control": ``lr <- factor * lr`` when ``loss(epoch) > loss(epoch - 1)``. (No subclass of torch's ``LRScheduler``: that
computes rates from a count of steps, takes a first step when it is made, and its ``step`` takes an epoch.)
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class DecayOnGrowth:
    """Multiply the learning rate of every group by ``factor`` when an epoch's loss is larger than the last epoch's.

    Args:
        optimizer: whose groups' ``lr`` is changed.
        factor: between 0 and 1, both excluded.

    Raises:
        ValueError: ``factor`` is not between 0 and 1, or ``optimizer`` is none.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> decay = DecayOnGrowth(optimizer)
    >>> for loss in (2.0, 1.0, 1.5):
    ...     decay.step(loss)
    >>> optimizer.param_groups[0]["lr"]
    0.9
    """

    def __init__(self, optimizer: Optimizer, factor: float = 0.9) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer={optimizer!r}: give a torch.optim.Optimizer.")
        self.optimizer = optimizer
        self.factor = _checked(factor)
        self.last_loss: float | None = None

    def step(self, loss: float) -> None:
        """After an epoch: compare its mean training loss with the last one's.

        Raises:
            ValueError: the loss is NaN, which is neither larger nor smaller.
        """
        loss = float(loss)
        if math.isnan(loss):
            raise ValueError("loss=nan: training has diverged; lower the learning rate or check the data.")
        if self.last_loss is not None and loss > self.last_loss:
            self._decay()
        self.last_loss = loss

    def _decay(self) -> None:
        groups = self.optimizer.param_groups
        rates = [group["lr"] * self.factor for group in groups]  # all before the first is set: groups may share one
        for group, rate in zip(groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """The factor and the last epoch's loss; the learning rates are in the optimiser's."""
        return {"factor": self.factor, "last_loss": self.last_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``'s state.

        Raises:
            ValueError: it is not such a state.
        """
        if set(state) != {"factor", "last_loss"}:
            raise ValueError(f"state: has {sorted(state)}; give what DecayOnGrowth.state_dict() returned.")
        self.factor = _checked(state["factor"])
        self.last_loss = state["last_loss"]


def _checked(factor: float) -> float:
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1:
        raise ValueError(f"factor={factor!r}: give a number between 0 and 1, such as 0.9.")
    return float(factor)
