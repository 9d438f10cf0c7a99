"""The local problem of one layer: a target made from the gradient, and some steps of an optimiser towards it.

"LocoProp: Enhancing BackProp via Local Loss Optimization". A layer has inputs y (rows), pre-activations a = W y (with
its bias), a transfer function f, and its gradient of the loss, taken at the old weights. Sums are over rows:

    S       target a* = a - gamma dL/da        step on  1/2 |W y - a*|^2               (Algorithm 1, Eq. 3)
    M       target y* = f(a) - gamma dL/da     step on  F(W y) - y* W y                (Algorithm 2, Eq. 7)
    PocoS   target y* = f(a) - gamma dL/df(a)  step on  1/2 |f(W y) - y*|^2            (Algorithm 3, Eq. 16)
    PocoM   target a* = a - gamma dL/df(a)     step on  D_F*(f(W y), f(a*))            (Algorithm 4, Eq. 18)

(M's is D_F(W y, a*) with f(a*) = y*, up to a constant; it needs no a*, which need not exist.) In all four the gradient
of the first step is gamma times the loss's. What the loss's gradient G in W owes to other uses of the weights (a
penalty on them, a tied decoder) is in ``p.grad`` before the steps, and adds gamma <G, W> to the local loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from horizonplan.algorithms.layers import Layer, evaluate
from horizonplan.algorithms.taps import Capture
from horizonplan.algorithms.transfer import Transfer

VARIANTS = ("S", "M", "PocoS", "PocoM")
LEAST_RATE, RATE_STEPS = 0.25, 10


@dataclass(frozen=True)
class Descent:
    """How local problems are made and descended.

    Attributes:
        variant: one of ``VARIANTS``.
        iterations: steps.
        gamma: step size of the activations.
        anchored: every step starts from the old weights (Eq. 4, 8, 17, 19), so the iterate's fixed point minimises
            the local loss plus ``|W - W_old|^2 / (2 lr)``; else Algorithms 1 to 4.
        damping: natural-gradient targets (Proposition 1) with this damping, see :func:`natural`; ``None``: gradient
            targets.
    """

    variant: str
    iterations: int
    gamma: float
    anchored: bool = False
    damping: float | None = None

    def target(self, transfer: Transfer, a: Tensor, gradient: Tensor, features: int) -> Tensor:
        """The target of a layer, from pre-activations and gradient at the old weights."""
        if self.damping is not None:
            gradient = natural(gradient, self.damping, features)
        start = transfer.function(a) if self.variant in ("M", "PocoS") else a
        return start - self.gamma * gradient

    def slope(self, transfer: Transfer, a: Tensor, target: Tensor) -> Tensor:
        """The gradient of the local loss in the pre-activations ``a``."""
        if self.variant == "S":
            return a - target
        if self.variant == "M":
            return transfer.function(a) - target
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            post = transfer.function(leaf)
            error = post.detach() - target if self.variant == "PocoS" else a - target
            (slope,) = torch.autograd.grad(post, leaf, error)
        return slope

    def rate(self, iteration: int) -> float:
        """The share of the learning rate in an iteration, from 0; it falls by a tenth each to a quarter."""
        return 1.0 if self.anchored else max(1 - iteration / RATE_STEPS, LEAST_RATE)

    def run(
        self, layer: Layer, seen: Capture, optimizer: Optimizer, trained: Sequence[nn.Parameter], schedule: float = 1.0
    ) -> None:
        """Take the steps: the layer's weights are changed.

        Args:
            layer: the layer, with its old weights.
            seen: its inputs and gradient.
            optimizer: over the layer's parameters.
            trained: those of them that are to change.
            schedule: factor on the learning rate.
        """
        assert seen.input is not None
        assert seen.gradient is not None
        module = layer.module
        x, gradient = seen.input.to(module.weight.dtype), seen.gradient.to(module.weight.dtype)
        elsewhere = [p.grad for p in trained]  # from uses of the weights other than the layer's call
        old = [p.detach().clone() for p in trained] if self.anchored else []
        rates = [group["lr"] for group in optimizer.param_groups]
        target: Tensor | None = None
        layer.module.zero_grad()
        try:
            for j in range(self.iterations):
                with torch.enable_grad():
                    out = evaluate(module, x, module.weight, module.bias)
                a = out.detach()
                if target is None:
                    target = self.target(layer.transfer, a, gradient, layer.features)
                slopes = torch.autograd.grad(out, trained, self.slope(layer.transfer, a, target))
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * self.rate(j) * schedule
                with torch.no_grad():
                    for p, slope, value, more in zip(trained, slopes, old or slopes, elsewhere, strict=True):
                        p.grad = slope if more is None else slope + self.gamma * more
                        if self.anchored:
                            p.copy_(value)
                optimizer.step()
        finally:
            layer.module.zero_grad()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


def natural(gradient: Tensor, damping: float, features: int = -1) -> Tensor:
    """A natural gradient in pre-activations, ``(D + damping I)^-1 g`` (Proposition 1).

    D is the empirical Fisher matrix of the batch: the mean over rows (samples, and places in an image or a sequence)
    of ``g_i g_i^T`` with g_i the gradient of the row's own sample, which is n times that of a mean over n samples. The
    paper has the labels drawn from the model; these are the data's.

    The damping is absolute, as in K-FAC: where the gradients vanish the result is ``g / damping``, and vanishes too. A
    share of D's own size would make it grow like ``1 / |g|``.

    Args:
        gradient: ``(n, ..., d, ...)``, or of one sample without the first dimension.
        damping: added to D's diagonal; in units of a squared gradient of one sample's loss.
        features: the dimension of size d, counted from the end.
    """
    samples = len(gradient) if gradient.dim() > -features else 1
    rows = gradient.movedim(features, -1)
    flat = rows.reshape(-1, rows.shape[-1])
    fisher = samples**2 / len(flat) * flat.T @ flat
    rounding = torch.finfo(fisher.dtype).eps * fisher.diagonal().sum()
    fisher.diagonal().add_(damping + rounding)
    solved: Tensor = torch.linalg.solve(fisher, flat.T)
    return solved.T.reshape(rows.shape).movedim(-1, features)


def plain_descent(optimizer: Optimizer) -> bool:
    """Whether an optimiser takes the gradient times its learning rate, and nothing else."""
    extras = ("momentum", "weight_decay", "nesterov", "maximize")
    return type(optimizer) is SGD and not any(group[name] for group in optimizer.param_groups for name in extras)
