"""What the optimizer that LocoProp is given decides: which weights and biases are trained, and at which share."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import horizonplan as hp
from horizonplan.algorithms import LocoProp
from horizonplan.algorithms.locoprop import scheduled


def batch():
    torch.manual_seed(1)
    return torch.randn(8, 6), torch.arange(8) % 3


def prepared(freeze_bias=False):
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(6, 6), nn.Tanh())], nn.Linear(6, 3))
    if freeze_bias:
        model[0].bias.requires_grad_(False)
    chain = hp.Chain(None, list(model), None)
    method = LocoProp(inner=partial(torch.optim.SGD, lr=0.1, weight_decay=0.1))
    method.prepare(chain, batch())
    return model, method


def changed(model, method, optimizer):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method.step(method._chain, batch(), optimizer)
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def named(model, ending):
    return {name: p for name, p in model.named_parameters() if name.endswith(ending)}


@pytest.mark.parametrize("held", ["weight", "bias", "0.weight", "0.bias"])
def test_only_what_the_optimizer_holds_is_trained(held):
    model, method = prepared()
    parts = named(model, held)
    assert changed(model, method, torch.optim.SGD(parts.values(), lr=0.1)) == set(parts)


def test_a_bias_unfrozen_after_prepare_is_trained():
    model, method = prepared(freeze_bias=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert "0.bias" not in changed(model, method, optimizer)
    model[0].bias.requires_grad_(True)
    assert {"0.weight", "0.bias"} <= changed(model, method, optimizer)


def test_a_bias_whose_weight_is_frozen_after_prepare_takes_the_ordinary_gradient():
    model, method = prepared()
    model[0].weight.requires_grad_(False)
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(model(batch()[0]), batch()[1]), model[0].bias)
    expected = model[0].bias.detach() - 0.3 * expected
    assert "0.weight" not in changed(model, method, torch.optim.SGD(model.parameters(), lr=0.3))
    torch.testing.assert_close(model[0].bias.detach(), expected)


def test_schedules_of_a_weight_and_its_bias_that_differ_are_refused():
    model, method = prepared()
    parts = [list(named(model, ending).values()) for ending in ("weight", "bias")]
    optimizer = torch.optim.SGD([{"params": part} for part in parts], lr=0.1)
    LambdaLR(optimizer, [lambda epoch: 1.0, lambda epoch: 0.0])
    with pytest.raises(ValueError, match=r"\[1.0, 0.0\] of the learning rates of the weight and bias of 'blocks.0'"):
        method.step(method._chain, batch(), optimizer)
    optimizer = torch.optim.SGD([{"params": parts[0], "lr": 0.1}, {"params": parts[1], "lr": 0.2}])
    assert changed(model, method, optimizer) == {name for name, _ in model.named_parameters()}


def test_a_one_cycle_schedule_is_relative_to_its_top():
    model, _ = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule, factors = OneCycleLR(optimizer, max_lr=0.1, total_steps=11), []
    for _ in range(10):
        factors.append(scheduled(optimizer)[id(model[0].weight)])
        optimizer.step()
        schedule.step()
    assert max(factors) == pytest.approx(1.0, abs=0.05)
    assert factors[0] == pytest.approx(1 / 25)


def test_a_scheduler_made_after_a_step_starts_from_the_rate_of_then():
    model, method = prepared()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method.step(method._chain, batch(), optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    LambdaLR(optimizer, lambda epoch: 1.0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert scheduled(optimizer)[id(model[0].weight)] == 1.0
