"""The networks that are trained, with their data and the training rule of the paper (Appendix D, Tables D1 and D2).

``scale="paper"`` has the paper's sizes. ``scale="small"`` is cut down to minutes on one core; every size that differs
is in ``Case.sizes``, which stands in each caption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from horizonplan.batch import LossFunction
from horizonplan.models import ResidualCNN, ResidualLinear, ResidualMLP
from horizonplan.reproduce import cifar, generators, pretrained, verses
from horizonplan.reproduce.images import images, source

Scale = Literal["small", "paper"]
SCALES: tuple[Scale, ...] = ("small", "paper")
IMAGES: dict[Scale, tuple[int, int]] = {"small": (800, 400), "paper": (45_000, 10_000)}  # training, validation
WIDTH, DEPTH = 10, 13  # of M1 and M2, stem and head not counted
RESNETS: dict[Scale, tuple[tuple[int, ...], int]] = {"small": ((4, 8, 16), 3), "paper": ((16, 32, 64), 10)}  # M3
HUNDRED = (50_000, 10_000)  # of CIFAR-100


@dataclass(frozen=True)
class Data:
    """Training and validation data."""

    training: Dataset[Any]
    validation: Dataset[Any]


@dataclass(frozen=True)
class Case:
    """One network and how it is trained.

    Attributes:
        name: M1, M2, M3, ...
        title: what it is.
        sizes: what the blocks are and the number of samples, in words that follow the number T.
        source: what the samples are, in words.
        make: the network, with fresh random weights (seed torch before).
        data: loads the data.
        loss: of output and target.
        learning_rate: of the first epoch.
        batch: samples a step.
        epochs: passes over the data.
        optimizer: ``"SGD"`` or ``"Adam"``.
        horizons: trained at stride 1, the last of them the depth.
        disjoint: those of them that are trained with stride h, too.
        seeds: how many runs with other weights and another order, where nothing else is asked for.
        classes: whether targets are classes, so that there is an accuracy.
        origin: a fingerprint of the user's files that go in; ``None`` if none do.
    """

    name: str
    title: str
    sizes: str
    source: str
    make: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss: LossFunction
    learning_rate: float
    batch: int
    epochs: int
    optimizer: str
    horizons: tuple[int, ...]
    disjoint: tuple[int, ...]
    seeds: int
    classes: bool
    origin: Callable[[], str | None] = lambda: None

    @property
    def depth(self) -> int:
        """T, blocks."""
        return self.horizons[-1]

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the outcome of training, for the cells."""
        names = "name", "depth", "sizes", "source", "learning_rate", "batch", "epochs", "optimizer"
        return {name: getattr(self, name) for name in names} | {"origin": self.origin()}

    @property
    def network(self) -> str:
        """Depth and sizes in words."""
        return f"T = {self.depth} {self.sizes}"

    @property
    def words(self) -> str:
        """The network and its training in words, for captions."""
        rule = f"{self.optimizer} {self.learning_rate:g}, batches of {self.batch}, {self.epochs} epochs"
        return f"{self.name} ({self.title}: {self.network} {self.source}; {rule})"


@dataclass(frozen=True)
class Sources:
    """Where the user's files lie.

    Attributes:
        images: folder of CIFAR.
        text: folder of the packages with MiniLM and the King James verses.
        weights: folder of the pre-trained ResNet-50 and ViT-B/16.
    """

    images: Path | None = None
    text: Path | None = None
    weights: Path | None = None


def cases(scale: Scale, sources: Sources) -> dict[str, Case]:
    """All cases of a scale, by name. Nothing is read before a case's ``make`` or ``data`` is called."""
    found = [_m1(scale), _m2(scale), _m3(scale, sources)]
    found += [_cnn(sources), _lora(sources)] if scale == "small" else pretrained_cases(sources)
    return {case.name: case for case in found}


def fine_tuning(scale: Scale) -> tuple[str, ...]:
    """The names of Figure 3's and 4's two cases."""
    return ("CNN", "MiniLM") if scale == "small" else ("ResNet-50", "ViT-B/16")


def _m1(scale: Scale) -> Case:
    samples, held = (2_000, 1_000) if scale == "small" else (10_000, 2_000)
    return Case(
        name="M1",
        title="residual linear network",
        sizes=f"blocks of width {WIDTH} between linear stem and head, {samples:,} samples",
        source="of y = W x",
        make=lambda: ResidualLinear(WIDTH, WIDTH, WIDTH, DEPTH),
        data=lambda: Data(generators.linear(samples, 0), generators.linear(held, 1)),
        loss=F.mse_loss,
        learning_rate=0.03,
        batch=100,
        epochs=40,
        optimizer="SGD",
        horizons=(1, 2, 3, 5, 8, 11, DEPTH),
        disjoint=(2, 3, 5, 8),
        seeds=3,
        classes=False,
    )


def _m2(scale: Scale) -> Case:
    small = scale == "small"
    theirs, their_rate = 100_000, 0.01
    samples, held, learning_rate = (2_000, 1_000, 0.1) if small else (theirs, 10_000, their_rate)
    why = (
        f" ({learning_rate / their_rate:g} times the paper's rate, as its samples are {theirs / samples:g} times as "
        "many)"
        if small
        else ""
    )
    return replace(
        _m1(scale),
        name="M2",
        title="residual MLP",
        sizes=(
            f"blocks of width {WIDTH} between linear stem and head, initial block weights divided by √T, {samples:,} "
            "samples"
        ),
        source=f"of cosines and sines{why}",
        make=_mlp,
        data=lambda: Data(generators.trigonometric(samples, 0), generators.trigonometric(held, 1)),
        learning_rate=learning_rate,
    )


def _mlp() -> nn.Module:
    """M2 with smaller blocks at the start: with torch's initial weights back-propagation diverges for some seeds."""
    model = ResidualMLP(1, WIDTH, 4, DEPTH)
    with torch.no_grad():
        for block in model.blocks.children():
            block.get_submodule("linear").get_parameter("weight").mul_(len(model.blocks) ** -0.5)
    return model


def _m3(scale: Scale, sources: Sources) -> Case:
    small = scale == "small"
    channels, blocks = RESNETS[scale]
    count, held = IMAGES[scale]
    layers = 2 * blocks * len(channels) + 2
    return Case(
        name="M3",
        title=f"ResNet-{layers}",
        sizes=_of_images(scale, count),
        source=source(sources.images, 10),
        make=lambda: ResidualCNN(3, channels, blocks),
        data=lambda: Data(*images(sources.images, 10, count, held)),
        loss=F.cross_entropy,
        learning_rate=0.01,
        batch=16 if small else 32,
        epochs=10 if small else 40,
        optimizer="SGD",
        horizons=(1, 2, 3, 5, 7, 9) if small else (1, 2, 3, 5, 10, 15, 20, 25, 30),
        disjoint=(2, 3, 5) if small else (2, 3, 5, 10, 15),
        seeds=2,
        classes=True,
        origin=lambda: None if sources.images is None else cifar.origin(sources.images, 10),
    )


def full_m3(count: int) -> Case:
    """The whole ResNet-62 of the paper, for measurements of one step on so many images."""
    return replace(_m3("paper", Sources()), batch=count, sizes=_of_images("paper", count))


def _of_images(scale: Scale, count: int) -> str:
    return f"blocks, channels {'/'.join(map(str, RESNETS[scale][0]))}, {count:,} images"


def _cnn(sources: Sources) -> Case:
    """M3's small network in the place of the full fine-tuning of ResNet-50."""
    return replace(_m3("small", sources), name="CNN", horizons=(1, 3, 5, 9), disjoint=(3, 5), epochs=6)


def _lora(sources: Sources) -> Case:
    training, held = 320, 160
    return Case(
        name="MiniLM",
        title=f"LoRA of rank {pretrained.RANK} on a pre-trained MiniLM",
        sizes=f"layers, {training} verses of {verses.TOKENS} tokens",
        source="of the King James text: which testament?",
        make=lambda: verses.classifier(sources.text),
        data=lambda: Data(*verses.data(sources.text, training, held)),
        loss=F.cross_entropy,
        learning_rate=0.001,
        batch=8,
        epochs=3,
        optimizer="Adam",
        horizons=(1, 2, 3, 4, 5, 6),
        disjoint=(2, 3),
        seeds=2,
        classes=True,
        origin=lambda: verses.origin(sources.text),
    )


def pretrained_cases(sources: Sources) -> list[Case]:
    """The paper's fine-tuning: ResNet-50 in full, ViT-B/16 with LoRA, on CIFAR-100 enlarged to 224 x 224."""
    size = f"{HUNDRED[0]:,} images, enlarged to {pretrained.SIDE} x {pretrained.SIDE},"
    both: Mapping[str, Any] = {
        "source": source(sources.images, 100),
        "data": lambda: Data(*images(sources.images, 100, *HUNDRED)),
        "loss": F.cross_entropy,
        "learning_rate": 0.001,
        "batch": 64,
        "epochs": 30,
        "optimizer": "Adam",
        "seeds": 1,
        "classes": True,
    }
    return [
        Case(
            name="ResNet-50",
            title="full fine-tuning",
            sizes=f"blocks, {size}",
            make=lambda: pretrained.resnet50(sources.weights),
            horizons=(1, 2, 4, 6, 8, 10, 12, 14, 16),
            disjoint=(2, 4, 8),
            origin=lambda: _origin(sources, pretrained.RESNET),
            **both,
        ),
        Case(
            name="ViT-B/16",
            title=f"LoRA of rank {pretrained.RANK}",
            sizes=f"layers, {size}",
            make=lambda: pretrained.vit(sources.weights),
            horizons=(1, 2, 3, 4, 6, 8, 10, 12),
            disjoint=(2, 3, 4, 6),
            origin=lambda: _origin(sources, pretrained.VIT),
            **both,
        ),
    ]


def _origin(sources: Sources, name: str) -> str | None:
    """Of CIFAR-100 and a pre-trained network; ``None`` without a folder of CIFAR (its data cannot be loaded either)."""
    if sources.images is None:
        return None
    return f"{cifar.origin(sources.images, 100)} {pretrained.origin(sources.weights, name)}"
