"""The six tasks on which ways of choosing a horizon are judged: model, data, optimiser, budget.

M1 to M3 are those of "Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive Control",
Section 5, made smaller: 8 residual layers instead of 13, a ResNet with 9 blocks instead of 30 on the digits of
scikit-learn instead of CIFAR-10, some hundred steps instead of 40 epochs, and no decay of the learning rate. How
the learning rates were found is in docs/log.md; `selection.py --tune` tries them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from horizonplan.datasets import digits
from horizonplan.models import CharacterGPT, Patches, ResidualCNN, ResidualLinear, ResidualMLP, SequenceClassifier

Parts = tuple[TensorDataset, TensorDataset]
Batch = tuple[Tensor, ...]

WIDTH, SAMPLES, HELD = 10, 10_000, 1000
CONTEXT, TOKENS, VERSES = 48, 16, (2048, 256)


@dataclass(frozen=True)
class Task:
    """What is trained, on what, how, and for how many steps of how many rows.

    `model()` draws its weights from torch's generator, `data(seed)` gives training and validation data.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    data: Callable[[int], Parts]
    optimiser: type[torch.optim.Optimizer]
    rate: float
    rows: int
    steps: int

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """A fresh optimiser at the task's learning rate."""
        return self.optimiser(parameters, lr=self.rate)

    def start(self, seed: int) -> nn.Module:
        """The model at a seed's weights, in training mode."""
        torch.manual_seed(seed)
        return self.model().train()


def batches(data: TensorDataset, rows: int, count: int, seed: int) -> list[Batch]:
    """So many batches in the order of a seed: shuffled epochs, what is left over at an epoch's end left out."""
    generator, found = torch.Generator().manual_seed(seed), list[Batch]()
    while len(found) < count:
        order = torch.randperm(len(data), generator=generator)
        found += [data[order[at : at + rows]] for at in range(0, len(order) - rows + 1, rows)]
    return found[:count]


def linear_data(seed: int) -> Parts:
    """y = W0 x with entries of variance N^(-1/2), N = 10 (the paper's Table D2)."""
    generator, deviation = torch.Generator().manual_seed(seed), WIDTH**-0.25
    weight = deviation * torch.randn(WIDTH, WIDTH, generator=generator)
    x = deviation * torch.randn(SAMPLES + HELD, WIDTH, generator=generator)
    return _parts(x, x @ weight.T)


def trigonometric_data(seed: int) -> Parts:
    """y = (1 + e) (cos pi x, sin pi x, cos 2 pi x, sin 2 pi x), x uniform on [-2, 2], e of variance .03."""
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(SAMPLES + HELD, 1, generator=generator) - 2
    noise = 1 + math.sqrt(0.03) * torch.randn(len(x), 1, generator=generator)
    waves = [wave(k * math.pi * x) for k in (1, 2) for wave in (torch.cos, torch.sin)]
    return _parts(x, noise * torch.cat(waves, 1))


def text_data(seed: int) -> Parts:
    """Pieces of CONTEXT characters of the King James text, and the characters that follow each."""
    codes = [torch.tensor([_vocabulary().index(character) for character in part]) for part in _texts(seed)]
    counts = [(len(part) - 1) // CONTEXT for part in codes]
    counts[1] = min(counts[1], 200)
    train, held = (
        TensorDataset(*(part[first : first + count * CONTEXT].view(count, CONTEXT) for first in (0, 1)))
        for part, count in zip(codes, counts, strict=True)
    )
    return train, held


def verse_data(seed: int) -> Parts:
    """The first TOKENS tokens of verses, the mask, and the book they are from."""
    import random

    example = _example("lora_minilm")
    kjv = _example("kjv")
    parts = zip(kjv.split(kjv.load(), seed), VERSES, strict=True)
    encoded = [example.encode(random.Random(seed).sample(part, count), "book") for part, count in parts]
    ids = [(part.tensors[0][:, :TOKENS], part.tensors[1][:, :TOKENS], part.tensors[2]) for part in encoded]
    return TensorDataset(*ids[0]), TensorDataset(*ids[1])


def _parts(x: Tensor, y: Tensor) -> Parts:
    return TensorDataset(x[HELD:], y[HELD:]), TensorDataset(x[:HELD], y[:HELD])


def _example(name: str) -> Any:
    """A module of the examples, which are no package."""
    folder = str(Path(__file__).resolve().parents[1] / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return __import__(name)


@cache
def _texts(seed: int) -> tuple[str, str]:
    kjv = _example("kjv")
    train, held = ("\n".join(verse.text for verse in part) for part in kjv.split(kjv.load(), seed))
    return train[:400_000], held


@cache
def _vocabulary() -> str:
    kjv = _example("kjv")
    return "".join(sorted(set("\n".join(verse.text for verse in kjv.load()))))


def _character_gpt() -> nn.Module:
    return CharacterGPT(len(_vocabulary()), width=48, depth=8, context=CONTEXT)


def _minilm() -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return _example("lora_minilm").Classifier(_example("kjv").BOOKS)


def _digits(seed: int) -> Parts:
    return digits(images=True, seed=seed)


SGD, ADAM = torch.optim.SGD, torch.optim.AdamW
TASKS = {
    task.name: task
    for task in (
        Task("m1", "M1, linear", lambda: ResidualLinear(10, 10, 10, 8), linear_data, SGD, 0.1, 100, 400),
        Task("m2", "M2, MLP", lambda: ResidualMLP(1, 10, 4, 8), trigonometric_data, SGD, 0.03, 100, 800),
        Task("m3", "M3, ResNet", lambda: ResidualCNN(1, (8, 16, 32), 3), _digits, SGD, 0.05, 32, 200),
        Task(
            "vit",
            "digits ViT",
            lambda: nn.Sequential(Patches(2), SequenceClassifier(4, 16, 10, width=32, depth=8)),
            _digits,
            ADAM,
            3e-3,
            32,
            240,
        ),
        Task("gpt", "character GPT", _character_gpt, text_data, ADAM, 3e-3, 8, 240),
        Task("minilm", "MiniLM, LoRA", _minilm, verse_data, ADAM, 3e-3, 16, 80),
    )
}
