"""Transfer functions and their matching losses.

A non-decreasing transfer function f is the gradient of a convex F, and F makes a Bregman divergence between
pre-activations, the matching loss of f ("LocoProp: Enhancing BackProp via Local Loss Optimization", Eq. 1, 2, 5 and
Table 2):

    D_F(â, a) = F(â) - F(a) - f(a) (â - a),        dD_F(â, a) / dâ = f(â) - f(a).

Training needs f only. Table 2's step function is left out: its derivative is zero, so no gradient passes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

LI2_TERMS = 60  # of a series in powers of at most 1/2


@dataclass(frozen=True)
class Transfer:
    """A transfer function. Two of one name are equal.

    Attributes:
        name: its name, with its parameters.
        function: f; the same shape as its argument's.
        integral: F, entry by entry; softmax's along its dimension, which is kept with one entry.

    >>> TANH.divergence(torch.tensor([1.0]), torch.tensor([1.0])).item()
    0.0
    """

    name: str
    function: Callable[[Tensor], Tensor] = field(compare=False)
    integral: Callable[[Tensor], Tensor] = field(compare=False)

    def __str__(self) -> str:
        return self.name

    def divergence(self, at: Tensor, of: Tensor) -> Tensor:
        """D_F(at, of), the matching loss of pre-activations ``at`` for those ``of`` the target, summed over entries.

        Args:
            at: pre-activations, of any shape.
            of: likewise.

        Returns:
            Shape ``()``; at least 0, and convex in ``at``.
        """
        difference: Tensor = self.integral(at).sum() - self.integral(of).sum() - (self.function(of) * (at - of)).sum()
        return difference


def _log_cosh(a: Tensor) -> Tensor:
    return a.abs() + F.softplus(-2 * a.abs()) - math.log(2)


def dilogarithm(a: Tensor) -> Tensor:
    """``-Li2(-exp(a))``, the integral of softplus.

    For a <= 0 by Landen's identity, in powers of at most 1/2; above by inversion.
    """
    z = torch.exp(-a.abs())
    w = z / (1 + z)
    series = torch.zeros_like(a)
    for k in range(LI2_TERMS, 0, -1):
        series = w * (series + 1 / k**2)
    below = series + torch.log1p(z).square() / 2
    return torch.where(a <= 0, below, math.pi**2 / 6 + a.square() / 2 - below)


LINEAR = Transfer("linear", lambda a: a, lambda a: a.square() / 2)
RELU = Transfer("relu", torch.relu, lambda a: torch.relu(a).square() / 2)
SIGMOID = Transfer("sigmoid", torch.sigmoid, F.softplus)
TANH = Transfer("tanh", torch.tanh, _log_cosh)
ARCTAN = Transfer("arctan", torch.atan, lambda a: a * torch.atan(a) - torch.log1p(a.square()) / 2)


def leaky_relu(slope: float = 0.01) -> Transfer:
    """``a`` above zero, ``slope * a`` below.

    Raises:
        ValueError: a slope below zero, with which the function is not monotone.
    """
    _not_below("slope", slope, 0)

    def function(a: Tensor) -> Tensor:
        return F.leaky_relu(a, slope)

    return Transfer(f"leaky_relu({slope:g})", function, lambda a: a * function(a) / 2)


def elu(alpha: float = 1.0) -> Transfer:
    """``a`` above zero, ``alpha * (exp(a) - 1)`` below.

    Raises:
        ValueError: an alpha below zero, with which the function is not monotone.
    """
    _not_below("alpha", alpha, 0)

    def integral(a: Tensor) -> Tensor:
        low = a.clamp(max=0)
        return torch.relu(a).square() / 2 + alpha * (torch.expm1(low) - low)

    return Transfer(f"elu({alpha:g})", lambda a: F.elu(a, alpha), integral)


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Transfer:
    """``log(1 + exp(beta * a)) / beta``; torch takes ``a`` itself where ``beta * a`` is above ``threshold``.

    Raises:
        ValueError: a beta of 0 or less, or a threshold so low that the function jumps there.
    """
    _not_below("beta", beta, 1e-6)
    _not_below("threshold", threshold, 15)
    return Transfer(
        f"softplus({beta:g})",
        lambda a: F.softplus(a, beta, threshold),
        lambda a: dilogarithm(beta * a) / beta**2,
    )


def softmax(dim: int = -1) -> Transfer:
    """Softmax along a dimension."""
    return Transfer(f"softmax({dim})", lambda a: a.softmax(dim), lambda a: a.logsumexp(dim, keepdim=True))


TABLE = {
    "linear": lambda: LINEAR,
    "relu": lambda: RELU,
    "leaky_relu": leaky_relu,
    "sigmoid": lambda: SIGMOID,
    "softmax": softmax,
    "tanh": lambda: TANH,
    "arctan": lambda: ARCTAN,
    "softplus": softplus,
    "elu": elu,
}


def named(name: str, dim: int = -1) -> Transfer:
    """The transfer function of a name, with torch's parameters.

    Args:
        name: one of ``TABLE``.
        dim: the features' dimension, for softmax.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TABLE:
        raise ValueError(f"transfer={name!r}: give {', '.join(map(repr, TABLE))}, a Transfer, or None.")
    make: Callable[[], Transfer] = TABLE[name]
    return softmax(dim) if name == "softmax" else make()


def _not_below(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ValueError(f"{name}={value!r}: give a number >= {least:g}; the transfer function has to be monotone.")
