"""Residual networks as discretised dynamics: explicit Euler, and the Verlet scheme for Hamiltonian dynamics.

    Euler     x(t+1) = x(t) + step * tanh(K x(t) + b)
    Verlet    y(t+1) = y(t) + step * K' tanh(K z(t) + b),   z(t+1) = z(t) - step * K' tanh(K y(t+1) + b)

"Stable Architectures for Deep Neural Networks" (Haber & Ruthotto), Sections 3 and 4; "Predict Globally, Correct
Locally: Parallel-in-Time Optimal Control of Neural Networks" splits such networks over processes. A network of the
same dynamics with half of the blocks at twice the step is its coarse model. A Verlet state is x = (y, z); y and z are
halves of its features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dynamics(nn.Module):
    """A block that is one step of some dynamics; ``step`` is its length."""

    step: float


class EulerBlock(Dynamics):
    """``x + step * tanh(K x + b)``: the residual block whose step is 1 otherwise.

    Args:
        width: features of a state.
        step: length of the step.
    """

    def __init__(self, width: int, step: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width) -> (B, width)``."""
        return x + self.step * torch.tanh(self.linear(x))


class VerletBlock(Dynamics):
    """One symplectic step: y by z, then z by the new y, with the same antisymmetric coupling.

    Args:
        width: features of a state, y and z together; even.
        step: length of the step.

    Raises:
        ValueError: ``width`` is odd.
    """

    def __init__(self, width: int, step: float = 1.0) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width={width}: a Verlet state has two halves; give an even number.")
        self.linear = nn.Linear(width // 2, width // 2)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width) -> (B, width)``."""
        y, z = x.chunk(2, -1)
        y = y + self.step * self._force(z)
        z = z - self.step * self._force(y)
        return torch.cat([y, z], -1)

    def _force(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.linear(x)), self.linear.weight.T)


SCHEMES = {"euler": EulerBlock, "verlet": VerletBlock}


class DynamicalNet(nn.Module):
    """Linear stem, ``depth`` steps of a scheme over a span of time, linear head.

    Args:
        in_features: features of an input.
        width: features of a state.
        out_features: features of an output.
        depth: T, blocks.
        scheme: ``"euler"`` or ``"verlet"``.
        time: the span; a step is ``time / depth``, so that a deeper network is a finer discretisation.

    Raises:
        ValueError: there is no such scheme.

    >>> DynamicalNet(2, 8, 2, depth=16, scheme="verlet")(torch.zeros(3, 2)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self, in_features: int, width: int, out_features: int, depth: int, scheme: str = "euler", time: float = 4.0
    ) -> None:
        super().__init__()
        if scheme not in SCHEMES:
            raise ValueError(f"scheme={scheme!r}: give {', '.join(map(repr, SCHEMES))}.")
        self.stem = nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(SCHEMES[scheme](width, time / depth) for _ in range(depth))
        self.head = nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_features) -> (B, out_features)``."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x)
        return scores
