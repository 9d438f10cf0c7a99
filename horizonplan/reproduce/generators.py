"""The paper's two data generators (Appendix D, Table D2): a linear map, and four trigonometric functions with noise."""

from __future__ import annotations

import math

import torch
from torch.utils.data import TensorDataset

LINEAR_WIDTH = 10
NOISE_VARIANCE = 0.03


def linear(samples: int, seed: int, width: int = LINEAR_WIDTH) -> TensorDataset:
    """``y = W_0 x``, entries of W_0 and x normal with mean 0 and variance ``width ** -0.5`` (the data of M1).

    W_0 depends on the width only, so that data of two seeds belong to one map.

    Args:
        samples: how many.
        seed: of the inputs.
        width: N, features of x and y.

    Returns:
        Inputs and targets, both float32 ``(samples, width)``.

    Raises:
        ValueError: ``samples`` is not positive.
    """
    _checked(samples)
    deviation = width**-0.25
    matrix = deviation * torch.randn(width, width, generator=torch.Generator().manual_seed(width))
    x = deviation * torch.randn(samples, width, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x @ matrix.T)


def trigonometric(samples: int, seed: int) -> TensorDataset:
    """``y = (1 + e) (cos pi x, sin pi x, cos 2 pi x, sin 2 pi x)``, x uniform in [-2, 2], e normal (the data of M2).

    The paper's N(0, 0.03) is read as mean and variance, and one e belongs to a sample.

    Args:
        samples: how many.
        seed: of inputs and noise.

    Returns:
        Inputs float32 ``(samples, 1)`` and targets ``(samples, 4)``.

    Raises:
        ValueError: ``samples`` is not positive.
    """
    _checked(samples)
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(samples, 1, generator=generator) - 2
    noise = math.sqrt(NOISE_VARIANCE) * torch.randn(samples, 1, generator=generator)
    angle = math.pi * x
    clean = torch.cat([angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()], dim=1)
    return TensorDataset(x, (1 + noise) * clean)


def _checked(samples: int) -> None:
    if samples < 1:
        raise ValueError(f"samples={samples}: give at least 1.")
