"""Batches of every kind reach the model, and its loss is found or refused with a remedy."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from horizonplan.batch import (
    as_loader,
    default_loss,
    model_inputs,
    move,
    nbytes,
    resolve_loss,
    scalar,
    signature,
    take,
    target_of,
    tensors,
)

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])


@dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor


Pair = namedtuple("Pair", "x y")


class Named(nn.Module):
    """Takes its input by name and returns scores."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x)


class Own(Named):
    """Returns its own loss, as Hugging Face models do."""

    def forward(self, x, y=None):
        logits = self.linear(x)
        return {"logits": logits, "loss": None if y is None else F.cross_entropy(logits, y, label_smoothing=0.5)}


@pytest.mark.parametrize(
    "batch", [(X, Y), [X, Y], {"x": X, "labels": Y}, UserDict(x=X, target=Y), Sample(X, Y), Pair(X, Y)]
)
def test_every_kind_of_batch_gives_the_loss_of_its_pair(batch):
    model = Named()
    wanted = F.cross_entropy(model(X), Y)
    assert torch.equal(resolve_loss()(model, batch), wanted)
    assert torch.equal(
        resolve_loss(lambda output, target: F.cross_entropy(output, target) * 2)(model, batch), wanted * 2
    )


@pytest.mark.parametrize("batch", [{"x": X, "y": Y}, Sample(X, Y), UserDict(x=X, y=Y)])
def test_the_model_s_own_loss_is_preferred(batch):
    model = Own()
    assert torch.equal(resolve_loss()(model, batch), F.cross_entropy(model(X)["logits"], Y, label_smoothing=0.5))


def test_a_loss_of_the_user_s_sees_the_logits_of_a_model_with_its_own_loss():
    model = Own()
    value = resolve_loss(F.cross_entropy)(model, {"x": X, "y": Y})
    assert torch.equal(value, F.cross_entropy(model(X)["logits"], Y))


def test_several_inputs_come_before_the_target():
    batch = (X, Y, X)
    assert model_inputs(batch) == (X, Y)
    assert target_of(batch) is X


def test_compute_loss_sees_model_and_whole_batch():
    seen = []
    resolve_loss(compute_loss=lambda model, batch: seen.append((model, batch)) or X.sum())("model", "batch")
    assert seen == [("model", "batch")]


@pytest.mark.parametrize(
    ("output", "target", "wanted"),
    [
        ((4, 3), torch.tensor([0, 1, 2, 0]), lambda o, t: F.cross_entropy(o, t)),
        ((2, 5, 3), torch.ones(2, 5, dtype=torch.long), lambda o, t: F.cross_entropy(o.transpose(1, 2), t)),
        ((2, 3, 4, 4), torch.ones(2, 4, 4, dtype=torch.long), lambda o, t: F.cross_entropy(o, t)),
        ((4, 2), torch.zeros(4, 2), lambda o, t: F.mse_loss(o, t)),
    ],
)
def test_the_default_loss_follows_from_types_and_shapes(output, target, wanted):
    output = torch.randn(output)
    torch.testing.assert_close(default_loss(output, target), wanted(output, target))


@pytest.mark.parametrize(
    ("output", "target"),
    [
        (torch.zeros(4, 1), torch.zeros(4)),  # would broadcast to (4, 4)
        (torch.zeros(4), torch.zeros(4, dtype=torch.long)),
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool)),
        ({"a": X}, Y),
    ],
)
def test_no_default_loss_is_guessed_for_what_does_not_fit(output, target):
    with pytest.raises(ValueError, match=r"loss=None: no default loss .*give loss= or compute_loss="):
        default_loss(output, target)


def test_loss_and_compute_loss_together_are_refused():
    with pytest.raises(ValueError, match="loss and compute_loss are both given: give one"):
        resolve_loss(F.mse_loss, lambda model, batch: X.sum())


@pytest.mark.parametrize("loss", [torch.ones(3), torch.ones(2, 1), torch.tensor(3), 1.0, None, {"loss": 1}])
def test_a_loss_that_is_no_floating_scalar_is_refused_with_what_it_is(loss):
    with pytest.raises(ValueError, match=r"loss: expected one floating-point scalar, got .*loss\.mean\(\)"):
        scalar(loss)


def test_a_loss_of_one_element_is_a_scalar():
    assert scalar(torch.ones(1, 1)).shape == ()


@pytest.mark.parametrize("batch", [X, (X,), {"x": X}])
def test_a_batch_without_target_is_refused_with_the_remedy(batch):
    with pytest.raises(ValueError, match=r"batch: no target .*compute_loss"):
        resolve_loss()(Named(), batch)
    with pytest.raises(ValueError, match=r"batch: no target .*compute_loss"):
        resolve_loss(F.mse_loss)(Named(), batch)


def test_tensors_are_found_in_a_fixed_order_with_their_signature_and_bytes():
    batch = {"a": X, "more": [(Y, "text"), Sample(X, Y)]}
    assert [t is u for t, u in zip(tensors(batch), [X, Y, X, Y], strict=True)] == [True] * 4
    assert signature(batch)[:2] == (((4, 3), torch.float32), ((4,), torch.int64))
    assert nbytes(batch) == 4 * 3 * 4 + 4 * 8  # each storage once


@pytest.mark.parametrize(
    "batch", [X, (X, Y), [X, Y], {"x": X, "y": (Y, 1)}, UserDict(x=X), Sample(X, Y), Pair(X, Y), "text"]
)
def test_moving_a_batch_keeps_its_kind(batch):
    moved = move(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    assert all(t.device.type == "meta" for t in tensors(moved))
    assert len(list(tensors(moved))) == len(list(tensors(batch)))


def test_a_dataset_becomes_batches_of_one_order_for_one_seed():
    data = TensorDataset(torch.arange(10))
    first, again = ([b[0].tolist() for b in as_loader(data, 4, True, seed=3)] for _ in range(2))
    assert first == again
    assert sorted(i for batch in first for i in batch) == list(range(10))
    assert [len(b) for b in first] == [4, 4, 2]


def test_shuffling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    loader = as_loader(TensorDataset(torch.arange(10)), 4, True)
    assert torch.equal(before, torch.get_rng_state())
    passes = [[b[0].tolist() for b in loader] for _ in range(2)]
    assert passes[0] != passes[1]


class Endless(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(10))


def test_lists_loaders_and_streams_pass():
    batches = [(X, Y)]
    assert as_loader(batches) is batches
    loader = DataLoader(TensorDataset(X, Y))
    assert as_loader(loader) is loader
    assert [len(b) for b in as_loader(Endless(), 4)] == [4, 4, 2]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "no batches"),
        ((b for b in [(X, Y)]), "generator"),
        ({"x": X}, "dict"),
        (X, "Tensor"),
        (None, "NoneType"),
        (TensorDataset(torch.empty(0)), "empty dataset"),
    ],
)
def test_data_that_cannot_be_iterated_again_or_is_empty_is_refused(data, words):
    with pytest.raises(ValueError, match=f"data .*{words}.*: give "):
        as_loader(data)


def test_take_gives_the_first_batches_and_refuses_none():
    assert take([1, 2, 3], 2) == [1, 2]
    assert take([1], 5) == [1]
    with pytest.raises(ValueError, match="data has no batches"):
        take([], 1)
