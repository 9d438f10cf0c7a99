"""The data of ``horizonplan reproduce``: generators, CIFAR from a folder, digits, verses."""

import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import write_cifar

import horizonplan as hp
from horizonplan.reproduce import cifar, generators, verses
from horizonplan.reproduce.images import images, source

ROOT = Path(__file__).parents[1]


def test_linear_data_is_one_map_with_the_paper_s_variances():
    (x, y), (u, v) = (generators.linear(4000, seed).tensors for seed in (0, 1))
    found = torch.linalg.lstsq(x.double(), y.double()).solution
    torch.testing.assert_close(u.double() @ found, v.double(), rtol=0, atol=1e-5)
    assert float(x.var()) == pytest.approx(10**-0.5, rel=0.05)
    assert float(found.var()) == pytest.approx(10**-0.5, rel=0.3)
    assert not torch.equal(x[:10], u[:10])


def test_trigonometric_data_is_the_paper_s_up_to_one_factor_a_sample():
    x, y = generators.trigonometric(5000, 0).tensors
    clean = torch.cat([f(k * math.pi * x) for k in (1, 2) for f in (torch.cos, torch.sin)], dim=1)
    factor = (y * clean).sum(1) / clean.square().sum(1)
    torch.testing.assert_close(factor[:, None] * clean, y, rtol=0, atol=1e-5)
    assert float(factor.mean()) == pytest.approx(1, abs=0.02)
    assert float(factor.var()) == pytest.approx(0.03, rel=0.1)
    assert float(x.min()) < -1.9
    assert float(x.max()) > 1.9
    assert float(x.abs().max()) <= 2


@pytest.mark.parametrize("make", [generators.linear, generators.trigonometric])
def test_no_data_is_refused(make):
    with pytest.raises(ValueError, match="samples=0"):
        make(0, 0)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_is_read_in_both_forms(tmp_path, classes, binary, inside):
    names = {(10, False): "cifar-10-batches-py", (10, True): "cifar-10-batches-bin"}
    names |= {(100, False): "cifar-100-python", (100, True): "cifar-100-binary"}
    folder = tmp_path / (names[classes, binary] if inside else "own")
    kept = write_cifar(folder, classes, binary)
    (x, y), (u, v) = cifar.load(tmp_path if inside else folder, classes)
    assert y.tolist() == np.concatenate([labels for _, labels in kept[:-1]]).tolist()
    assert v.tolist() == kept[-1][1].tolist()
    assert x.shape == (40, 3, 32, 32)
    assert u.shape == (8, 3, 32, 32)
    torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.std(dim=(0, 2, 3)), torch.ones(3), rtol=0, atol=1e-4)
    raw = torch.from_numpy(np.concatenate([p for p, _ in kept[:-1]]).reshape(-1, 3, 32, 32) / 255.0)
    wanted = (raw - raw.mean(dim=(0, 2, 3), keepdim=True)) / raw.std(dim=(0, 2, 3), keepdim=True)
    torch.testing.assert_close(x.double(), wanted, rtol=0, atol=1e-4)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    write_cifar(tmp_path / "own", 10, binary=False)
    (tmp_path / "own" / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil(tmp_path / "made")}, protocol=2))
    with pytest.raises(cifar.CifarError, match="was not run"):
        cifar.load(tmp_path / "own", 10)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no batch of CIFAR"),
        (b"not a pickle", "no batch of CIFAR"),
        (pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [0, 1]}, protocol=2), "shapes"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 77]}, protocol=2), "classes"),
    ],
)
def test_a_broken_batch_is_named(tmp_path, content, complaint):
    write_cifar(tmp_path / "own", 10, binary=False)
    (tmp_path / "own" / "data_batch_1").write_bytes(content)
    with pytest.raises(cifar.CifarError, match=complaint) as caught:
        cifar.load(tmp_path / "own", 10)
    assert "data_batch_1" in str(caught.value)


def test_missing_cifar_and_a_cut_file(tmp_path):
    with pytest.raises(cifar.CifarError, match="cifar-10-batches-py/data_batch_1"):
        cifar.load(tmp_path, 10)
    with pytest.raises(cifar.CifarError, match="classes=20"):
        cifar.load(tmp_path, 20)
    with pytest.raises(cifar.CifarError, match="--data"):
        images(None, 100, 1, 1)
    write_cifar(tmp_path / "own", 10, binary=True)
    (tmp_path / "own" / "test_batch.bin").write_bytes(b"x" * 100)
    with pytest.raises(cifar.CifarError, match="no whole number of images"):
        cifar.load(tmp_path / "own", 10)


def test_digits_stand_in_for_cifar():
    training, test = images(None, 10, 50, 20)
    x, y = training.tensors
    assert (x.shape, len(y), len(test)) == ((50, 3, 32, 32), 50, 20)
    assert torch.equal(x[:, 0], x[:, 2])
    assert torch.equal(x[:, :, :2], x[:1, :, :1, :1].expand(50, 3, 2, 32))  # the border is background
    assert "5,000 real MNIST digits" in source(None, 10)


def test_images_from_a_folder_are_some_of_them_and_never_fewer_than_asked(tmp_path):
    kept = write_cifar(tmp_path / "own", 10, binary=True)
    (training, test), labels = images(tmp_path / "own", 10, 16, 4), np.concatenate([found for _, found in kept[:-1]])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:16]
    assert training.tensors[1].tolist() == labels[order].tolist()
    assert len(test) == 4
    assert source(tmp_path, 10) == "of CIFAR-10"
    with pytest.raises(cifar.CifarError, match="40 training images of 41"):
        images(tmp_path / "own", 10, 41, 4)


def test_verses_without_the_packages(tmp_path):
    assert "--text" in verses.missing(tmp_path)
    with pytest.raises(verses.TextError, match="is missing"):
        verses.classifier(tmp_path)


@pytest.mark.skipif(verses.missing(ROOT / "examples" / "data") is not None, reason="make venv brings the text")
def test_verses_and_lora():
    place = ROOT / "examples" / "data"
    train, held = verses.data(place, 12, 6)
    assert [part.tensors[2].sum().item() for part in (train, held)] == [6, 3]
    model = verses.classifier(place)
    chain = hp.Chain.from_model(model, train[:4])
    assert chain.depth == 6
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora" in name or name.startswith("head") for name in names)
