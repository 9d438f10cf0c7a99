"""The paper's experiments in miniature, for the tests of ``horizonplan reproduce``."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from horizonplan.models import ResidualCNN, ResidualLinear, ResidualMLP
from horizonplan.reproduce import Sources, cases, e1, theorem, verses
from horizonplan.reproduce import lab as lab_module
from horizonplan.reproduce.cells import Cells
from horizonplan.reproduce.lab import Lab

ALL_CASES = cases.cases


def noise_images(training=24, validation=12):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 3, 8, 8, generator=generator) for n in (training, validation)]
    return cases.Data(*(TensorDataset(x, torch.arange(len(x)) % 10) for x in parts))


def tiny_cases(scale, sources):
    """The small cases with fewer blocks, samples and epochs."""
    found = ALL_CASES("small", sources)
    sizes = {"horizons": (1, 2, 3, 5, 6), "disjoint": (2, 3, 5), "epochs": 2, "seeds": 1, "sizes": "tiny"}
    m1 = replace(found["M1"], make=lambda: ResidualLinear(10, 10, 10, 6), batch=500, **sizes)
    m2 = replace(found["M2"], make=lambda: ResidualMLP(1, 10, 4, 6), batch=500, learning_rate=0.01, **sizes)
    m3 = replace(found["M3"], make=lambda: ResidualCNN(3, (2, 4), 3), data=noise_images, batch=8, **sizes)
    cnn = replace(m3, name="CNN", horizons=(1, 3, 6), disjoint=(3,))
    return {case.name: case for case in (m1, m2, m3, cnn, found["MiniLM"])}


def shrink(monkeypatch):
    """Everything in miniature, steps timed once."""
    monkeypatch.setattr(lab_module, "cases", tiny_cases)
    monkeypatch.setattr(lab_module, "ROUNDS", 1)
    monkeypatch.setattr(lab_module, "SECONDS", 0.0)
    monkeypatch.setattr(e1, "full_m3", lambda count: replace(tiny_cases("small", Sources())["M3"], batch=count))
    monkeypatch.setattr(e1, "GRID", (1, 2, 3, 5, 6))
    monkeypatch.setattr(e1, "IMAGES", 2)
    monkeypatch.setattr(verses, "USUAL", Path("no text here"))
    monkeypatch.setattr(theorem, "DEPTHS", (32, 128))
    monkeypatch.setattr(theorem, "SEEDS", 2)


def make_lab(folder, **options):
    """A lab that keeps its cells in a folder, in which there is no text either."""
    return Lab("small", Sources(text=folder), Cells(folder, lambda line: None), **options)


def write_cifar(folder, classes, binary):
    """A CIFAR of 40 training and 8 test images in its authors' form; returns pixels and labels of each file."""
    generator = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"]
    folder.mkdir()
    kept = []
    for name in (*names, "test_batch" if classes == 10 else "test"):
        count = 8 if name.startswith("test") else 40 // len(names)
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = generator.integers(0, classes, count)
        kept.append((pixels, labels))
        if binary:
            coarse = [np.zeros((count, 1), np.uint8)] if classes == 100 else []
            rows = np.hstack([*coarse, labels[:, None].astype(np.uint8), pixels])
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            key = b"labels" if classes == 10 else b"fine_labels"
            batch = {b"data": pixels, key: labels.tolist(), b"batch_label": b"made up"}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return kept
