"""One part's work in a step of parallel-in-time training: Algorithm 4's processor A, or B, or one between them."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from horizonplan.algorithms.links import Port
from horizonplan.algorithms.part import Part
from horizonplan.algorithms.regression import Regression
from horizonplan.batch import signature


@dataclass(frozen=True)
class PredictionError:
    """What was wrong with one prediction of a co-state, once the co-state had come.

    Attributes:
        step: the step, from 0.
        cut: the block before which the chain is cut.
        mse: mean square of the difference, over samples and features (Fig. 3).
        relative: that as a share of the co-state's mean square.
        epsilon_p: the constant of Eq. 7, ``|predicted - true| / (learning rate * |predicted|)``; infinite where the
            prediction is zero.
    """

    step: int
    cut: int
    mse: float
    relative: float
    epsilon_p: float

    @classmethod
    def of(cls, step: int, cut: int, predicted: Tensor, true: Tensor, rate: float) -> PredictionError:
        """Compare a prediction with the co-state."""
        wrong, size = (predicted - true).double(), predicted.double().norm().item()
        power, missed = true.double().square().mean().item(), wrong.square().mean().item()
        epsilon = wrong.norm().item() / (rate * size) if size > 0 and rate > 0 else math.inf
        return cls(step, cut, missed, missed / power if power > 0 else math.inf, epsilon)


class Section:
    """A part with its links and its regression.

    Args:
        number: the part's, from 0.
        part: the part.
        port: its links.
        regression: predicts the gradient in x(stop); ``None`` for the last part.
        exact: wait for the true gradient instead.

    Attributes:
        errors: of the predictions so far.
    """

    def __init__(self, number: int, part: Part, port: Port, regression: Regression | None, exact: bool) -> None:
        self.number, self.part, self.port, self.regression, self.exact = number, part, port, regression, exact
        self.errors: list[PredictionError] = []
        self.waiting: tuple[int, float, Tensor, Tensor | None, Tensor] | None = None

    def forward(self, batch: Any) -> Tensor | None:
        """Run the part and hand its state on; the last one returns the loss, detached, and tells it."""
        key = signature(batch) or None
        self.end = self.part.run(batch, lambda: self.port.receive_state(key))
        if not self.part.last:
            self.port.send_state(self.end.detach(), key)
            return None
        loss = self.end.detach()
        self.port.send_loss(loss)
        return loss

    def backward(self, step: int, rate: float, batch: Any) -> None:
        """Accumulate the part's gradients, and hand the gradient in x(first) on.

        Args:
            step: the step's number.
            rate: the learning rate of the part's weights, for Eq. 7.
            batch: the batch.
        """
        end, self.end = self.end, torch.empty(0)
        if self.part.last:
            if end.requires_grad:
                torch.autograd.backward(end)
        else:
            cotangent = self._cotangent(end, step, rate, batch)
            if end.requires_grad:
                torch.autograd.backward(end, cotangent)
        leaf, self.part.leaf = self.part.leaf, None
        if leaf is not None:
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            self.port.send_back(gradient, self.number - 1)

    def absorb(self) -> None:
        """Learn from the last step's pair, whose co-state comes from the part after.

        Raises:
            FloatingPointError: the co-state is not finite.
        """
        if self.waiting is None:
            return
        step, rate, state, target, predicted = self.waiting
        self.waiting = None
        true = self.port.receive_back(state, self.number + 1)
        if not torch.isfinite(true).all():
            raise FloatingPointError(
                f"step {step}: the co-state at block {self.part.stop} is not finite: lower the learning rate."
            )
        assert self.regression is not None
        self.errors.append(PredictionError.of(step, self.part.stop, predicted, true, rate))
        self.regression.add(state, target, true)

    def state_dict(self) -> dict[str, Any]:
        """Regression and errors."""
        rows = [astuple(error) for error in self.errors]
        kept = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 5)
        return {"errors": kept, "regression": None if self.regression is None else self.regression.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them; a pair that has not come is forgotten."""
        if self.waiting is not None:
            self.port.receive_back(self.waiting[2], self.number + 1)
            self.waiting = None
        self.errors = [PredictionError(int(s), int(c), m, r, e) for s, c, m, r, e in state["errors"].tolist()]
        if self.regression is not None:
            self.regression.load_state_dict(state["regression"], device)

    def _cotangent(self, end: Tensor, step: int, rate: float, batch: Any) -> Tensor:
        """The gradient in x(stop), predicted (Eq. 6) or true."""
        state = end.detach()
        if self.exact:
            return self.port.receive_back(state, self.number + 1)
        assert self.regression is not None
        self.absorb()
        target = self.regression.targets(batch, state)
        predicted = self.regression.predict(state, target)
        self.waiting = step, rate, state, target, predicted
        return predicted
