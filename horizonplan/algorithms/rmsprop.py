"""RMSProp as TensorFlow has it, which LocoProp's paper trains with.

For a gradient g, with s starting at one and m at zero:

    g <- g + weight_decay w
    s <- decay s + (1 - decay) g^2
    m <- momentum m + lr g / sqrt(s + eps)
    w <- w - m

``torch.optim.RMSprop`` starts s at zero, adds eps to the root, and multiplies by the learning rate after the momentum:
a change of the learning rate acts on past gradients too. The first updates differ by more than their own size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class RMSProp(Optimizer):
    """TensorFlow's RMSProp.

    Args:
        params: parameters or groups of them.
        lr: learning rate; the default is for LocoProp's ten local steps a batch.
        decay: of the mean square.
        momentum: of the buffer.
        eps: added to the mean square, under the root.
        weight_decay: times the parameter, added to the gradient; the paper has 1e-5.

    Raises:
        ValueError: a number out of its range.

    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> w.grad = torch.ones(1)
    >>> RMSProp([w], lr=0.1, momentum=0.0, eps=0.0).step()
    >>> w.item()  # the mean square is 1, as at the start
    -0.10000000149011612
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        decay: float = 0.9,
        momentum: float = 0.9,
        eps: float = 1e-5,
        weight_decay: float = 0.0,
    ) -> None:
        given = {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        for name, value in given.items():
            top = math.inf if name in ("lr", "weight_decay") else 1
            if not 0 <= value < top:
                raise ValueError(f"{name}={value!r}: give a number >= 0 and < {top:g}.")
        super().__init__(params, given)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; returns what ``closure`` does, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: torch.nn.Parameter, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["square"], state["buffer"] = torch.ones_like(p), torch.zeros_like(p)
        square, buffer = state["square"], state["buffer"]
        gradient = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
        square.lerp_(gradient.square(), 1 - group["decay"])
        buffer.mul_(group["momentum"]).add_(gradient * (square + group["eps"]).rsqrt_() * group["lr"])
        p.sub_(buffer)
