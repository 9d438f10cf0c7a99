"""A fixed classifier: the simplex equiangular tight frame, with the cross-entropy's gradient in closed form.

BP-free local learning ("Towards Interpretable Deep Local Learning with Successive Gradient Reconciliation",
Section 3.3) puts one after each layer: nothing is pulled back through a head, and nothing in it is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100  # torch's label for positions that do not count


def simplex(features: int, classes: int, dtype: torch.dtype | None = None) -> Tensor:
    """``classes`` unit vectors of ``features`` entries, with inner products of -1 / (classes - 1) (Eq. 7).

    The frame's own space is a random one, from torch's generator.

    Returns:
        Shape ``(classes, features)``, one vector a row.

    Raises:
        ValueError: so many vectors do not fit into so few dimensions.

    >>> m = simplex(5, 3)
    >>> (m @ m.T).round(decimals=4).abs().tolist()
    [[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]]
    """
    if classes < 2 or features < classes - 1:
        raise ValueError(f"features={features}: {classes} classes need 2 classes and {classes - 1} features at least.")
    centred = torch.eye(classes, dtype=torch.float64) - 1 / classes
    basis = torch.linalg.eigh(centred).eigenvectors[:, 1:]  # of the vectors that sum to zero
    space = torch.linalg.qr(torch.randn(features, classes - 1, dtype=torch.float64)).Q
    frame: Tensor = (classes / (classes - 1)) ** 0.5 * basis @ space.T
    return frame.to(torch.get_default_dtype() if dtype is None else dtype)


class SimplexETF(nn.Module):
    """Scores of a state by a fixed frame; nothing is trained.

    An image is flattened, a sequence averaged over its positions unless each of them has a label.

    Args:
        features: entries of a flattened image, of a position, or of a vector.
        classes: scores.
        positions: whether each position of a sequence is classified.
        dtype: of the frame; ``None``: torch's default.

    >>> SimplexETF(16, 10)(torch.zeros(2, 4, 2, 2)).shape
    torch.Size([2, 10])
    """

    weight: Tensor

    def __init__(self, features: int, classes: int, positions: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.positions = positions
        self.register_buffer("weight", simplex(features, classes, dtype))

    def forward(self, state: Tensor) -> Tensor:
        """``(B, D)``, ``(B, N, D)`` or ``(B, C, H, W)`` ``-> (B, classes)``, or ``(B, N, classes)``."""
        return F.linear(self._features(state), self.weight)

    def loss_and_gradient(self, state: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and its gradient in the state: ``M (p - y) / n``, without back-propagation.

        The gradient is an expression in the state, so it can be differentiated again.

        Both are computed in the frame's type, whatever the state's.

        Args:
            state: as for a call.
            target: ``(B,)`` or ``(B, N)`` classes; -100 does not count.

        Returns:
            The loss, without a graph; the gradient, of the state's shape and the frame's type.

        Raises:
            ValueError: the targets are no classes of these states.
        """
        scores = F.linear(self._features(state).to(self.weight.dtype), self.weight)
        loss = classification(scores.detach(), target)
        counts = (target != IGNORED).unsqueeze(-1)
        safe = target.clamp_min(0)
        errors = (scores.softmax(-1) - F.one_hot(safe, scores.shape[-1])) * counts / counts.sum()
        return loss, self._back(errors @ self.weight, state)

    def _features(self, state: Tensor) -> Tensor:
        if state.ndim == 3 and not self.positions:
            return state.mean(1)
        return state if state.ndim <= 3 else state.flatten(1)

    def _back(self, gradient: Tensor, state: Tensor) -> Tensor:
        if state.ndim == 3 and not self.positions:
            gradient = (gradient / state.shape[1]).unsqueeze(1).expand(state.shape)
        return gradient.reshape(state.shape)


def classification(scores: Tensor, target: Any) -> Tensor:
    """The loss of frames: cross-entropy.

    Args:
        scores: ``(B, classes)`` or ``(B, N, classes)``.
        target: ``(B,)`` or ``(B, N)`` classes; -100 does not count.

    Raises:
        ValueError: the targets are no classes of these scores.
    """
    if not isinstance(target, Tensor) or target.is_floating_point() or target.shape != scores.shape[:-1]:
        got = f"{tuple(target.shape)} ({target.dtype})" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(
            f"heads='etf': the frame classifies, and got targets {got} for scores {tuple(scores.shape)}; give classes."
        )
    return F.cross_entropy(scores.flatten(0, -2), target.flatten())
