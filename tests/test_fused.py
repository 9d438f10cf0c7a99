"""A fused step trains as the plain step does, bit for bit, with at most a block's gradients alive.

Oracles: the plain step written out, a count of what operators read, a step that drops its gradients, bytes.
"""

from copy import deepcopy

import pytest
import torch
from families import ALL, Case, ResidualMLP, between, classes, cnn, encoder, ids, in_place, lora, residual_mlp, tied
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from horizonplan.chain import Chain
from horizonplan.gradient import horizon_backward
from horizonplan.probes.steady import standing_bytes
from horizonplan.probes.tracker import LiveBytes, own_bytes
from horizonplan.schedule import Schedule, Window
from horizonplan.training.fused import check_schedule, fused

STEPS = 5

SCHEDULES = {
    "h=1": lambda depth: Schedule.horizon(depth, 1),
    "h=2": lambda depth: Schedule.horizon(depth, 2),
    "h=2, s=2": lambda depth: Schedule.horizon(depth, 2, 2),
    "BP": Schedule.exact,
    "h=2, recompute=1": lambda depth: Schedule.horizon(depth, 2, 1, 1),
    "h=3, recompute=2": lambda depth: Schedule.horizon(depth, 3, 1, 2),
    "BP, recompute=1": lambda depth: Schedule.exact(depth, 1),
    "BP, recompute=2": lambda depth: Schedule.exact(depth, 2),
    "LoCo": lambda depth: Schedule.loco(depth, 3),
    "LoCo, summed": lambda depth: Schedule.loco(depth, 2, summed=True),
    "local": lambda depth: Schedule.local(depth, 2),
}

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "Adam, fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "AdamW, lr a tensor": lambda p: torch.optim.AdamW(p, torch.tensor(0.01)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01, lr_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], 0.01),
}


class TiedTransformer(nn.Module):
    """Embedding and output share a weight."""

    def __init__(self, vocabulary=20, width=8, depth=4):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 12, 0.1, batch_first=True) for _ in range(depth)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).flatten(0, 1)


def tied_transformer():
    tokens = ids(3, 6, 20)
    return Case(TiedTransformer(), (tokens, tokens.flatten()), 4, "layers.0")


def frozen():
    """Stem and every other block do not train."""
    case = residual_mlp()
    for module in (case.model.stem, *case.model.blocks[::2]):
        module.requires_grad_(False)
    return case


class Twice(nn.Module):
    """One weight in two modules of a block, another one without a gradient."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(width, width)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


def used_twice():
    case = residual_mlp()
    case.model.blocks = nn.ModuleList(Twice(6) for _ in range(5))
    return case


def parametrized():
    case = residual_mlp()
    for block in case.model.blocks:
        weight_norm(block.linear)
    return case


def penalised():
    """The loss reads every weight."""
    case = residual_mlp()

    def compute(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss + 0.01 * sum(p.square().sum() for p in model.parameters())

    case.kwargs["compute_loss"] = compute
    return case


def autocast():
    case = residual_mlp()

    def compute(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(batch[0]), batch[1])

    case.kwargs["compute_loss"] = compute
    return case


def checkpointed():
    """Blocks that check-point a part of themselves."""
    case = residual_mlp()

    class Checkpointed(Twice):
        def forward(self, x):
            run = torch.utils.checkpoint.checkpoint
            inner = run(self.first, x, use_reentrant=False)
            return x + run(lambda y: self.second(torch.tanh(y)), inner, use_reentrant=False)

    case.model.blocks = nn.ModuleList(Checkpointed(6) for _ in range(5))
    return case


class Recurrent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lstm = nn.LSTM(width, width)

    def forward(self, x):
        return x + self.lstm(x)[0]


def recurrent():
    case = residual_mlp()
    case.model.blocks = nn.ModuleList(Recurrent(6) for _ in range(5))
    return case


MODELS = [residual_mlp, cnn, tied_transformer, frozen]
CORNERS = [between, in_place, tied, encoder, used_twice, parametrized, penalised, autocast, checkpointed, recurrent]


def built(make):
    torch.manual_seed(0)
    case = make()
    return Chain.from_model(case.model.train(), case.batch, **case.kwargs), case.batch


def trainable(chain):
    return [p for p in chain.parameters() if p.requires_grad]


def plain_step(chain, batch, optimizer, schedule):
    loss = horizon_backward(chain, batch, schedule)
    optimizer.step()
    chain.model.zero_grad(set_to_none=True)
    return loss


def fused_step(chain, batch, optimizer, schedule):
    with fused(optimizer):
        loss = horizon_backward(chain, batch, schedule)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(p.grad is None for p in chain.parameters() if id(p) in held)
    chain.model.zero_grad(set_to_none=True)
    return loss


def trained(step, make, optimizer, name):
    """Losses, weights with buffers, and optimiser state after some steps."""
    chain, batch = built(make)
    made, schedule = optimizer(trainable(chain)), SCHEDULES[name](chain.depth)
    check_schedule(chain, schedule)
    losses = []
    for seed in range(STEPS):
        torch.manual_seed(seed)
        losses.append(step(chain, batch, made, schedule))
    return losses, chain.model.state_dict(), made.state_dict()


def assert_equal(found, wanted, where=""):
    """Bit for bit, whatever the order of a dict's entries."""
    if isinstance(wanted, dict):
        assert set(found) == set(wanted), where
        for key in wanted:
            assert_equal(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_equal(one, other, f"{where}.{i}")
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    else:
        assert found == wanted, where


def assert_same_training(make, optimizer, name):
    wanted = trained(plain_step, make, optimizer, name)
    assert_equal(trained(fused_step, make, optimizer, name), wanted)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimiser_trains_as_in_plain_steps(optimizer):
    assert_same_training(residual_mlp, optimizer, "h=2")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("make", MODELS)
def test_every_schedule_trains_as_in_plain_steps(make, name):
    assert_same_training(make, OPTIMIZERS["AdamW, amsgrad"], name)


@pytest.mark.parametrize("name", ["h=1", "BP, recompute=1", "LoCo, summed"])
@pytest.mark.parametrize("make", CORNERS)
def test_shared_and_unusual_weights_train_as_in_plain_steps(make, name):
    assert_same_training(make, OPTIMIZERS["SGD"], name)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("make", MODELS)
def test_every_optimiser_and_schedule_train_as_in_plain_steps(make, name, optimizer):
    assert_same_training(make, optimizer, name)
