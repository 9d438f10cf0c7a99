"""Images for the networks of convolutions: the user's CIFAR, or real digits of MNIST in the same shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from horizonplan.datasets import mnist5k
from horizonplan.reproduce import cifar


@dataclass(frozen=True)
class Images:
    """Training and test images, and what they are, in words.

    Attributes:
        training: images ``(N, 3, 32, 32)`` and labels ``(N,)``.
        test: likewise.
        classes: how many.
        words: for captions.
    """

    training: TensorDataset
    test: TensorDataset
    classes: int
    words: str


def images(folder: Path | None, classes: int, training: int | None = None, test: int | None = None) -> Images:
    """CIFAR from a folder, or digits of MNIST where there is no folder (10 classes only).

    Args:
        folder: of the user's CIFAR; ``None``: MNIST, 28 x 28 pixels with a border of 2 and three equal channels.
        classes: 10 or 100.
        training: how many training images, the first ones of a shuffled order; ``None``: all.
        test: likewise.

    Raises:
        CifarError: the folder has no CIFAR, or there is no folder and 100 classes are wanted.
    """
    if folder is not None:
        parts, name = cifar.load(folder, classes), f"CIFAR-{classes}"
    elif classes == 10:
        parts, name = _digits(), "MNIST digits padded to 3 x 32 x 32 (no CIFAR was given)"
    else:
        raise cifar.CifarError(f"data: CIFAR-{classes} is needed; give the folder that it lies in, --data FOLDER.")
    (x, y), (u, v) = (_some(pair, count) for pair, count in zip(parts, (training, test), strict=True))
    return Images(TensorDataset(x, y), TensorDataset(u, v), classes, f"{len(x):,} {name}")


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    parts = mnist5k()
    background = float(parts[0].tensors[0].min())
    pairs = [(F.pad(part.tensors[0], (2, 2, 2, 2), value=background), part.tensors[1]) for part in parts]
    (x, y), (u, v) = ((pixels.expand(-1, 3, -1, -1), labels) for pixels, labels in pairs)
    return (x, y), (u, v)


def _some(pair: tuple[Tensor, Tensor], count: int | None) -> tuple[Tensor, Tensor]:
    pixels, labels = pair
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    return pixels[order].contiguous(), labels[order]
