"""Parallel in time and layer-parallel windows at their limits: frozen weights, odd targets, steps, buffers, losses."""

import copy

import pytest
import torch
from test_parallel import data, equal, net, trained

import horizonplan as hp
from horizonplan.algorithms import BackPropagation, ParallelInTime, ParallelWindows


def trainable(parameters):
    return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1)


def backpropagated(model, batches):
    chain, optimizer = hp.Chain.from_model(model, batches[0]), trainable(model.parameters())
    return [BackPropagation().step(chain, batch, optimizer) for batch in batches]


def test_exact_alone_is_back_propagation():
    model = net()
    twin = copy.deepcopy(model)
    trained(ParallelInTime(exact=True), model, data(), trainable)
    backpropagated(twin, data())
    assert equal(model, twin)


@pytest.mark.parametrize("method", [lambda: ParallelInTime(coarse_steps=0), ParallelWindows])
def test_a_last_part_and_head_that_are_frozen_stay(method):
    model = net()
    for p in [*model.blocks[4:].parameters(), *model.head.parameters()]:
        p.requires_grad_(False)
    before = copy.deepcopy(model)
    trained(method(), model, data(), trainable)
    assert equal(model.blocks[4:], before.blocks[4:])
    assert not equal(model.blocks[:4], before.blocks[:4])


def test_a_coarse_model_with_nothing_to_train_is_refused():
    model = net()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("blocks.1.", "blocks.5.")))
    with pytest.raises(hp.ChainError, match=r"no trainable parameter in the coarse model.*coarse_steps=0"):
        trained(ParallelInTime(), model, data(), trainable)
    before = copy.deepcopy(model)
    trained(ParallelInTime(coarse_steps=0), model, data(), trainable)
    assert not equal(model.blocks[5], before.blocks[5])
