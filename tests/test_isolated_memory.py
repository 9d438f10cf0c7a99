"""Memory measured in a process of its own is what it would be in this one, whatever surrounds the probe."""

import sys

import pytest
import torch
from families import ResidualMLP

from horizonplan import probes
from horizonplan.chain import Chain

pytestmark = pytest.mark.slow


def chain_and_batch(training=True):
    model = ResidualMLP(depth=3, width=64).train(training)
    batch = torch.randn(256, 4), torch.randint(0, 3, (256,))
    return Chain.from_model(model, batch), batch


def both(chain, batch, horizon, **more):
    """The same probe in a process of its own and in this one."""
    (apart,), (here,) = (probes.memory(chain, [batch], [horizon], in_children=c, **more) for c in (True, False))
    assert "in_process" not in apart.detail
    return apart, here


def test_autocast_around_the_probe_reaches_the_process():
    chain, batch = chain_and_batch()
    (plain,) = probes.memory(chain, [batch], [chain.depth])
    with torch.autocast("cpu", torch.bfloat16):
        apart, here = both(chain, batch, chain.depth)
    assert apart.value == here.value != plain.value


@pytest.mark.parametrize("training", [True, False])
def test_model_is_measured_in_the_mode_it_is_in(training):
    chain, batch = chain_and_batch(training)
    apart, here = both(chain, batch, chain.depth)
    assert apart.value == here.value


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_state_of_the_user_s_optimizer_stays_here(monkeypatch, kind):
    chain, batch = chain_and_batch()
    optimizer = kind(chain.parameters(), lr=0.1)
    for p in chain.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state, sent = dict(optimizer.state), []

    def isolated(*given, timeout_seconds):
        sent.extend(given)
        return original(*given, timeout_seconds=timeout_seconds)

    module = sys.modules["horizonplan.probes.memory"]
    original = module.isolated
    monkeypatch.setattr(module, "isolated", isolated)
    apart, here = both(chain, batch, 2, optimizer=optimizer)
    assert apart.value == here.value
    (travelled,) = (given for given in sent if isinstance(given, torch.optim.Optimizer))
    assert not travelled.state
    assert [p for g in travelled.param_groups for p in g["params"]] == list(chain.parameters())
    assert dict(optimizer.state) == state
