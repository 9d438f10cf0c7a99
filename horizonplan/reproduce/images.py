"""Images for the networks of convolutions: the user's CIFAR, or real digits of MNIST in the same shape."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from horizonplan.datasets import mnist5k
from horizonplan.reproduce import cifar

DIGITS = 5_000  # of MNIST, training and test images together


def images(folder: Path | None, classes: int, training: int, test: int) -> tuple[TensorDataset, TensorDataset]:
    """CIFAR from a folder, or digits of MNIST where there is no folder (10 classes only).

    Args:
        folder: of the user's CIFAR; ``None``: MNIST, 28 x 28 pixels with a border of 2 and three equal channels.
        classes: 10 or 100.
        training: how many training images, the first ones of a shuffled order.
        test: likewise.

    Returns:
        Training and test part, each images float32 ``(N, 3, 32, 32)`` and labels int64 ``(N,)``.

    Raises:
        CifarError: the folder has no CIFAR or fewer images, or there is no folder and 100 classes are wanted.
    """
    if folder is not None:
        parts = cifar.load(folder, classes)
    elif classes == 10:
        parts = _digits()
    else:
        raise cifar.CifarError(f"data: CIFAR-{classes} is needed; give the folder that it lies in, --data FOLDER.")
    for (x, _), wanted, part in zip(parts, (training, test), ("training", "test"), strict=True):
        if len(x) < wanted:
            raise cifar.CifarError(
                f"data={str(folder)!r}: {len(x):,} {part} images of {wanted:,} are there; unpack the whole archive."
            )
    some, held = (TensorDataset(*_some(pair, count)) for pair, count in zip(parts, (training, test), strict=True))
    return some, held


def source(folder: Path | None, classes: int) -> str:
    """What :func:`images` gives, in words, without reading it."""
    if folder is not None:
        return f"of CIFAR-{classes}"
    return f"of {DIGITS:,} real MNIST digits, padded to 3 x 32 x 32 (no CIFAR was given)"


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    parts = mnist5k()
    background = float(parts[0].tensors[0].min())
    pairs = [(F.pad(part.tensors[0], (2, 2, 2, 2), value=background), part.tensors[1]) for part in parts]
    (x, y), (u, v) = ((pixels.expand(-1, 3, -1, -1), labels) for pixels, labels in pairs)
    return (x, y), (u, v)


def _some(pair: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    pixels, labels = pair
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    return pixels[order].contiguous(), labels[order]
