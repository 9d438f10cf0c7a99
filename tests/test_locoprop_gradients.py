"""One local step of plain SGD is a step of back-propagation times gamma, however the model uses its weights."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.algorithms import LocoProp

VARIANTS = ["S", "M", "PocoS", "PocoM"]
GAMMA, RATE = 3.0, 0.1


def batch():
    torch.manual_seed(1)
    return torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3


def blocks():
    return nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))


def stepped_as_back_propagation(make, variant, data=None, compute_loss=None, **settings):
    """Assert it for all parameters; returns the method."""
    data = batch() if data is None else data
    torch.manual_seed(0)
    model = make().double()
    chain = hp.Chain.from_model(model, data, compute_loss=compute_loss)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    chain.loss(data).backward()
    expected = {name: before[name] - RATE * GAMMA * p.grad for name, p in model.named_parameters()}
    inner = partial(torch.optim.SGD, lr=RATE)
    method = LocoProp(variant, iterations=1, gamma=GAMMA, inner=inner, **settings)
    method.prepare(chain, data)
    method.step(chain, data, torch.optim.SGD(model.parameters(), lr=RATE * GAMMA))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], msg=name)
    return method


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = blocks()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Cosine(Plain):
    def forward(self, x):
        return super().forward(x) / self.head.weight.norm(dim=1)


class AutoEncoder(nn.Module):
    """The decoder is the encoder, transposed, by a function."""

    def __init__(self):
        super().__init__()
        self.encoder, self.blocks = nn.Linear(6, 6), blocks()
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        x = self.encoder(x).tanh()
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.encoder.weight.t(), self.bias)


def penalised(model, data):
    return F.cross_entropy(model(data[0]), data[1]) + 0.1 * sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_uses_of_the_weights_outside_the_layers_call_count(variant):
    stepped_as_back_propagation(Cosine, variant)
    stepped_as_back_propagation(Plain, variant, compute_loss=penalised)
    x = batch()[0]
    method = stepped_as_back_propagation(AutoEncoder, variant, (x, x.clone()))
    assert ("encoder" in method.layers) == (variant in "SM")  # its tanh is no module


def test_such_uses_count_in_every_local_step():
    """A penalty alone, under S: every step is drawn back to the old weights and pushed by gamma times its gradient."""
    data, model = batch(), Plain().double()
    chain = hp.Chain.from_model(model, data, compute_loss=lambda m, b: 0 * m(b[0]).sum() + m.head.weight.sum())
    y, start = nn.Sequential(*model.blocks)(data[0]).detach(), model.head.weight.detach().clone()
    y = torch.cat([y, torch.ones(8, 1)], 1)
    start = torch.cat([start, model.head.bias.detach()[:, None]], 1)
    expected, pushed = start.clone(), torch.tensor([GAMMA] * 6 + [0.0])
    for share in (1.0, 0.9, 0.8):
        expected -= 0.01 * share * ((expected - start) @ y.T @ y + pushed)
    method = LocoProp("S", iterations=3, gamma=GAMMA, inner=partial(torch.optim.SGD, lr=0.01))
    method.prepare(chain, data)
    method.step(chain, data, torch.optim.SGD(model.parameters(), lr=0.0))
    torch.testing.assert_close(torch.cat([model.head.weight, model.head.bias[:, None]], 1).detach(), expected)


class Joined(nn.Module):
    """Pre-activations go on beside what the activation makes of them, joined by a call that takes a list."""

    def __init__(self, join):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))
        self.act, self.head, self.join = nn.ReLU(), nn.Linear(6, 3), join

    def forward(self, x):
        for layer in self.layers:
            a = layer(x)
            x = self.join([a, self.act(a)])
        return self.head(x)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("join", [partial(torch.cat, dim=-1), lambda both: torch.stack(both, -1).flatten(1)])
def test_an_output_that_a_call_takes_in_a_list_goes_into_several_things(variant, join):
    method = stepped_as_back_propagation(partial(Joined, join), variant)
    assert {str(f) for name, f in method.layers.items() if name != "head"} == {"linear"}
