"""Residual networks of fully connected layers, with and without activation.

    x(0) = W_in z,    x(t+1) = x(t) + phi(W_t x(t) + b_t),    output = W_out x(T)

They are the models M1 (no phi, no b) and M2 of *Unifying Back-Propagation and Forward-Forward
Algorithms through Model Predictive Control*, Section 5: 15 layers, residual except the first and the
last, width 10. Those two change the width, so here they are stem and head, and 15 layers are depth 13.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


class ResidualLayer(nn.Module):
    """``x + phi(W x + b)``; ``activation=None``: phi is the identity.

    Args:
        width: features of a state.
        activation: elementwise, ``(B, width) -> (B, width)``.
        bias: whether there is a b.
    """

    def __init__(self, width: int, activation: Activation | None = F.relu, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width) -> (B, width)``."""
        y: Tensor = self.linear(x)
        return x + (y if self.activation is None else self.activation(y))


class ResidualMLP(nn.Module):
    """Linear stem, ``depth`` residual layers, linear head (the paper's M2).

    Args:
        in_features: features of an input.
        width: features of a state.
        out_features: features of an output.
        depth: T, residual layers.
        activation: elementwise function of a layer; ``None``: the identity.
        bias: whether stem, layers and head have a bias.

    >>> import torch
    >>> ResidualMLP(1, 10, 4, depth=13)(torch.zeros(32, 1)).shape
    torch.Size([32, 4])
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        out_features: int,
        depth: int,
        activation: Activation | None = F.relu,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(in_features, width, bias=bias)
        self.blocks = nn.ModuleList(ResidualLayer(width, activation, bias) for _ in range(depth))
        self.head = nn.Linear(width, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_features) -> (B, out_features)``."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


class ResidualLinear(ResidualMLP):
    """A deep linear network, ``W_out (I + W_T-1) ... (I + W_0) W_in`` (the paper's M1).

    Args:
        in_features: features of an input.
        width: features of a state.
        out_features: features of an output.
        depth: T, residual layers.
    """

    def __init__(self, in_features: int, width: int, out_features: int, depth: int) -> None:
        super().__init__(in_features, width, out_features, depth, activation=None, bias=False)
