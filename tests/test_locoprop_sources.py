"""LocoProp around the library's gradient methods: first steps, states, memory."""

import copy
import math
from functools import partial

import families
import pytest
import torch
from torch import nn

import horizonplan as hp
from horizonplan.algorithms import SGR, BackPropagation, Horizon, LoCo, LocoProp, RMSProp
from horizonplan.models import ResidualCNN
from horizonplan.probes.tracker import LiveBytes


def sgd(rate):
    return partial(torch.optim.SGD, lr=rate)


def batch():
    torch.manual_seed(1)
    return torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 3


def mlp():
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(5, 5), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(5, 3)).double()


SOURCES = [
    BackPropagation(),
    BackPropagation(2),
    Horizon(1),
    Horizon(2),
    Horizon(3, 1, 1),
    Horizon(2, 2),
    Horizon(4, 2, 1),
    LoCo(2, summed=True),
    SGR(2, weight=0.0),
]


def deep():
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(nn.Linear(5, 6), *hidden, nn.Linear(6, 3)).double()


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("variant", ["M", "PocoM"])
def test_first_iteration_is_a_step_along_the_sources_gradient(variant, source):
    """For every trained weight; layer norms and auxiliary heads take the ordinary gradient."""
    data = batch()
    model, twin = deep(), deep()
    chain = hp.Chain.from_model(twin, data, blocks=[str(t) for t in range(1, 5)])
    torch.manual_seed(1)
    heads = source.prepare(chain, data)
    source.backward(chain, data)
    optimizer = torch.optim.SGD([*twin.parameters(), *(heads.parameters() if heads else [])], lr=0.2)
    optimizer.step()
    torch.manual_seed(1)
    method = LocoProp(variant, iterations=1, gamma=4.0, inner=sgd(0.05), source=source)
    chain = hp.Chain.from_model(model, data, blocks=[str(t) for t in range(1, 5)])
    extra = method.prepare(chain, data)
    method.step(chain, data, torch.optim.SGD([*model.parameters(), *(extra.parameters() if extra else [])], lr=0.2))
    assert len(method.layers) == 10
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for p, q in zip(extra.parameters() if extra else [], heads.parameters() if heads else [], strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "source"), [("M", BackPropagation()), ("PocoS", Horizon(2, 2, 1))], ids=str)
@pytest.mark.parametrize("make", [m for m in families.ALL if m is not families.gpt2], ids=lambda m: m.__name__)
def test_first_iteration_in_models_of_every_family(make, variant, source):
    case = make().double()
    model, twin = case.model, copy.deepcopy(case.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(1)
    source.backward(hp.Chain.from_model(twin, case.batch, **case.kwargs), case.batch)
    chain = hp.Chain.from_model(model, case.batch, **case.kwargs)
    method = LocoProp(variant, iterations=1, gamma=3.0, inner=sgd(0.1), source=source)
    method.prepare(chain, case.batch)
    torch.manual_seed(1)
    method.step(chain, case.batch, torch.optim.SGD(model.parameters(), lr=0.2))
    treated = {f"{layer}.{kind}" for layer in method.layers for kind in ("weight", "bias")}
    for name, p in twin.named_parameters():
        step = 0.0 if p.grad is None else (0.3 if name in treated else 0.2) * p.grad
        torch.testing.assert_close(model.get_parameter(name), before[name] - step, rtol=1e-6, atol=1e-9, msg=name)
    for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)


def test_the_inner_state_persists_over_batches():
    """Two steps are those of one optimiser that sees all local gradients; its step count says so."""
    model, data = mlp(), batch()
    chain = hp.Chain.from_model(model, data)
    method = LocoProp("M", iterations=3, inner=partial(torch.optim.Adam, lr=1e-3))
    method.prepare(chain, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for done in (3, 6):
        method.step(chain, data, optimizer)
        states = method.state_dict()["inner"]
        assert {float(s["step"]) for layer in states.values() for s in layer["state"].values()} == {done}
    assert not any(optimizer.state.values())
    assert all(p.grad is None for p in model.parameters())


def test_memory_is_the_horizons_and_what_weights_and_widths_take():
    """The peak over a step, weights apart: at most the source's, the captures, and one layer's local step."""
    torch.manual_seed(0)
    rows, width, depth = 256, 64, 12
    hidden = [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(depth)]
    model = nn.Sequential(nn.Linear(5, width), *hidden, nn.Linear(width, 3))
    data = torch.randn(rows, 5), torch.zeros(rows, dtype=torch.long)
    chain = hp.Chain.from_model(model, data, blocks=[str(t) for t in range(1, depth + 1)])

    def peak(source, local):
        method = LocoProp("M", inner=sgd(1e-3), source=source) if local else source
        method.prepare(chain, data)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        method.step(chain, data, optimizer)
        model.zero_grad(set_to_none=True)
        with LiveBytes() as tracker:
            method.step(chain, data, optimizer)
        return tracker.peak

    weights = sum(p.nbytes for p in model.parameters())
    states = 4 * rows * width * (2 * depth + 2)  # one tensor of batch x width a layer
    local, plain = peak(Horizon(2, 2), True), peak(Horizon(2, 2), False)
    assert local <= plain + 2 * states + weights
    assert peak(BackPropagation(), True) <= peak(BackPropagation(), False) + 2 * states + weights


def test_non_finite_gradients_change_nothing():
    model, data = mlp(), batch()
    before = [p.detach().clone() for p in model.parameters()]
    chain = hp.Chain.from_model(model, data)
    method = LocoProp()
    method.prepare(chain, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bad = data[0].clone()
    bad[0, 0] = math.nan
    assert method.step(chain, (bad, data[1]), optimizer).isnan()
    model[0].weight.register_hook(lambda g: g)  # a user's hook is no matter
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(not layer["state"] for layer in method.state_dict()["inner"].values())


def test_it_runs_under_the_users_autocast():
    torch.manual_seed(0)
    model = mlp().float()
    data = batch()[0].float(), batch()[1]
    chain = hp.Chain.from_model(model, data)
    method = LocoProp("M", inner=partial(RMSProp, lr=1e-3))
    method.prepare(chain, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [method.step(chain, data, optimizer).item() for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_residual_network_trains():
    images = torch.randn(8, 1, 8, 8), torch.arange(8)
    torch.manual_seed(0)
    model = ResidualCNN(1, (4, 8), 2)
    chain = hp.Chain.from_model(model, images)
    method = LocoProp(source=Horizon(2, 2), inner=partial(RMSProp, lr=1e-3))
    method.prepare(chain, images)
    assert set(method.left.values()) == {"BatchNorm2d is no Linear or Conv2d"}
    optimizer = torch.optim.AdamW(model.parameters())
    losses = [method.step(chain, images, optimizer).item() for _ in range(20)]
    assert losses[-1] < 0.3 * losses[0]
