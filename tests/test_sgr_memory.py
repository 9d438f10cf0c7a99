"""What a step of local learning has alive, and when: a module's activations are freed before the next one runs."""

import pytest
import torch
from torch import nn

import horizonplan as hp
from horizonplan.algorithms import DGL, SGR, BackPropagation, InfoPro, partition, trial
from horizonplan.models import ResidualCNN
from horizonplan.probes import LiveBytes


class Block(nn.Module):
    """Keeps four states' worth of activations."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(*(m for _ in range(2) for m in (nn.Linear(width, width, bias=False), nn.Tanh())))

    def forward(self, x):
        return x + self.layers(x)


def deep(depth, width=8, rows=256):
    torch.manual_seed(0)
    blocks = [Block(width) for _ in range(depth)]
    chain = hp.Chain(None, blocks, nn.Linear(width, 4), nn.CrossEntropyLoss())
    batch = (torch.randn(rows, width), torch.arange(rows) % 4)
    return chain, batch


def watched(method, chain, batch):
    """Bytes alive when each module but the first begins, and the peak, of a step that finds its gradients' memory."""
    method.prepare(chain, batch)
    method.backward(chain, batch)
    alive = []
    hooks = [
        chain.blocks[t].register_forward_pre_hook(lambda *_: alive.append(tracker.live)) for t in method.bounds[1:-1]
    ]
    with LiveBytes() as tracker:
        method.backward(chain, batch)
    for hook in hooks:
        hook.remove()
    assert len(alive) == len(method.bounds) - 2
    return alive, tracker.peak


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_activations_are_freed_before_the_next_module_runs(weight):
    chain, batch = deep(12)
    alive, _ = watched(SGR(4, weight=weight, split="blocks"), chain, batch)
    state = 256 * 8 * 4
    # The next module's input, and with the regulariser the gradient in it; the rest are a few losses.
    kept = state * (2 if weight else 1)
    assert all(kept <= bytes_ <= kept + 512 for bytes_ in alive), alive


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_peak_does_not_grow_with_the_number_of_modules(weight):
    peaks = []
    for modules in (3, 6, 12):
        chain, batch = deep(2 * modules)
        peaks.append(watched(SGR(modules, weight=weight, split="blocks"), chain, batch)[1])
    assert max(peaks) - min(peaks) <= 1024, peaks
    chain, batch = deep(24)
    BackPropagation().backward(chain, batch)
    with LiveBytes() as tracker:
        BackPropagation().backward(chain, batch)
    assert peaks[-1] < tracker.peak / (3 if weight else 6)


def test_the_balanced_split_balances_what_blocks_keep():
    batch = (torch.randn(8, 1, 8, 8), torch.arange(8) % 10)
    chain = hp.Chain.from_model(ResidualCNN(1, (4, 8, 16), 2), batch)
    found = trial.trial(chain, batch)
    # A block keeps inputs of its convolutions, normalisations and activations: from half the side on, half as much.
    assert found.kept_bytes[1] > 1.9 * found.kept_bytes[3] > 3.6 * found.kept_bytes[5]
    method = SGR(2, weight=0)
    method.prepare(chain, batch)
    assert method.bounds == partition.balanced(found.kept_bytes, 2)


@pytest.mark.parametrize(("method", "times"), [(DGL, 2.0), (InfoPro, 3.0)])
def test_heads_are_counted(method, times):
    """DGL's head holds many times its block's parameters."""
    batch = (torch.randn(4, 1, 16, 16), torch.arange(4) % 10)
    chain = hp.Chain.from_model(ResidualCNN(1, (8, 16), 2), batch)
    heads = method(modules=4).prepare(chain, batch)
    assert len(heads) == 3
    for block, head in zip(chain.blocks, heads, strict=False):
        own = sum(p.numel() for p in block.parameters())
        assert sum(p.numel() for p in head.parameters()) > times * own
