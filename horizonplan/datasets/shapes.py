"""Two made-up sets of points in the plane: co-centric ellipses, and the Swiss roll.

After "Stable Architectures for Deep Neural Networks" (Haber & Ruthotto), Section 6, which gives their form but not
all of their numbers; those here are ours. They are made anew from a seed, alike on every machine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


def ellipses(points: int = 1200, validation: int = 300, seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """An ellipse (class 0) inside an elliptic ring (class 1), with a gap between them.

    Args:
        points: of both parts together.
        validation: points of the second part.
        seed: of the points.

    Returns:
        Training and validation data of ``(point, class)``: float32 ``(2,)`` and int64 ``()``.

    Raises:
        ValueError: a part would be empty.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(points) % 2
    radius = 0.5 * torch.rand(points, generator=generator).sqrt() + 0.65 * labels
    angle = 2 * math.pi * torch.rand(points, generator=generator)
    where = torch.stack([2 * radius * angle.cos(), radius * angle.sin()], 1)
    return _split(where, labels, validation, generator)


def swiss_roll(points: int = 1200, validation: int = 300, seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Two spirals around each other, one a class.

    Args:
        points: of both parts together.
        validation: points of the second part.
        seed: of the points.

    Returns:
        As :func:`ellipses`.

    Raises:
        ValueError: a part would be empty.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(points) % 2
    along = torch.rand(points, generator=generator)
    radius, angle = 3 * along + 0.6 * labels, 4 * math.pi * along
    where = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return _split(where, labels, validation, generator)


def _split(
    where: Tensor, labels: Tensor, validation: int, generator: torch.Generator
) -> tuple[TensorDataset, TensorDataset]:
    points = len(labels)
    if not 0 < validation < points:
        raise ValueError(f"validation={validation}: choose 1 to {points - 1} of the {points} points.")
    held, train = torch.randperm(points, generator=generator).tensor_split([validation])
    return TensorDataset(where[train], labels[train]), TensorDataset(where[held], labels[held])
