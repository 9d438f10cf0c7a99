"""Bring a state to the shape the head expects, without parameters: pool, then pad channels.

The loss must be computable at every state (Unifying Back-Propagation and Forward-Forward Algorithms
through Model Predictive Control, Section 3: "a linear projection ... that unifies x(t)"). States
whose shape is that of x(T) already are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

Projection = Callable[[Tensor, tuple[int, ...]], Tensor]


def project(state: Tensor, shape: Sequence[int]) -> Tensor:
    """Average-pool positions, then pool or zero-pad channels, to ``shape``.

    Dimension 0 is the batch. Channels are dimension 1 of states with four or more dimensions
    (images) and the last dimension of states with two or three (vectors, sequences). An image or
    sequence reaches a vector head by its mean over positions. Pooling goes first, so that no padded
    channel is ever pooled over.

    Args:
        state: floating tensor ``(B, ...)``.
        shape: the wanted shape ``(B, ...)``; its first entry is ignored.

    Raises:
        ValueError: the state has fewer dimensions than wanted; pass a projection of your own then.

    >>> import torch
    >>> project(torch.ones(2, 3, 8, 8), (2, 5, 4, 4)).shape
    torch.Size([2, 5, 4, 4])
    """
    if tuple(state.shape[1:]) == tuple(shape[1:]):
        return state
    channels, positions = _layout(shape)
    if state.ndim < 2 or state.ndim < len(shape) or (state.ndim > len(shape) > 3):
        raise ValueError(
            f"projection: no way from a state of shape {tuple(state.shape)} to {tuple(shape)}; "
            "give projection=callable(state, shape)."
        )
    if state.ndim == 3:
        state = state.transpose(1, 2)
    if state.ndim > len(shape):
        state = state.flatten(2)
        state = state if positions else state.mean(2)
    if tuple(state.shape[2:]) != positions:
        state = _pool(state, positions)
    if state.shape[1] > channels:
        state = _pool_channels(state, channels)
    elif state.shape[1] < channels:
        state = F.pad(state, (*(0, 0) * len(positions), 0, channels - state.shape[1]))
    return state.transpose(1, 2) if len(shape) == 3 else state


def _layout(shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Channels and positions of a shape ``(B, C)``, ``(B, N, C)`` or ``(B, C, H, W, ...)``."""
    return (shape[-1], tuple(shape[1:-1])) if len(shape) <= 3 else (shape[1], tuple(shape[2:]))


def _pool(state: Tensor, positions: tuple[int, ...]) -> Tensor:
    match positions:
        case (n,):
            return F.adaptive_avg_pool1d(state, n)
        case (n, m):
            return F.adaptive_avg_pool2d(state, (n, m))
        case (n, m, k):
            return F.adaptive_avg_pool3d(state, (n, m, k))
    raise ValueError(f"projection: no pooling to {len(positions)} dimensions; give projection=callable(state, shape).")


def _pool_channels(state: Tensor, channels: int) -> Tensor:
    rows = state.movedim(1, -1)
    pooled = F.adaptive_avg_pool1d(rows.flatten(0, -2), channels)
    return pooled.reshape(*rows.shape[:-1], channels).movedim(-1, 1)
