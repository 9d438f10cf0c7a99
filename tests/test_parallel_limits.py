"""Parallel in time and layer-parallel windows at their limits: frozen weights, odd targets, steps, buffers, losses."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from test_parallel import data, equal, net, trained
from torch import nn
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.algorithms import BackPropagation, ParallelInTime, ParallelWindows
from horizonplan.algorithms.coarse import Coarse
from horizonplan.algorithms.links import Wire
from horizonplan.algorithms.regression import classes_of, known
from horizonplan.models import DynamicalNet, EulerBlock, ResidualMLP
from horizonplan.training.shared import fingerprint


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


class Trainable(EulerBlock):
    """A block whose step is a parameter."""

    def __init__(self, width, step):
        super().__init__(width)
        del self.step
        self.step = nn.Parameter(torch.tensor(step, dtype=torch.float64))


def coarse_of(model, bounds):
    chain = hp.Chain.from_model(model, data()[0])
    return Coarse(chain, bounds, 2, [torch.zeros(6, 4)] * (chain.depth + 1))


def test_a_step_that_is_a_parameter_is_lengthened_and_trained():
    model = net()
    model.blocks = nn.ModuleList(Trainable(4, 0.5) for _ in range(8)).double()
    plain = net()
    plain.load_state_dict(model.state_dict(), strict=False)
    found, wanted = (coarse_of(m, (0, 4, 8)).backward(data()[0]) for m in (model, plain))
    assert torch.equal(found, wanted)
    assert [block.step.grad is not None for block in model.blocks] == [True, False] * 4
    trained(ParallelInTime(coarse_steps=2), model, data())
    assert all(isinstance(block.step, nn.Parameter) for block in model.blocks)


def test_the_coarse_model_spans_the_time_of_unequal_steps():
    model, short = net(), net(4)
    for t, block in enumerate(model.blocks):
        block.step = 0.1 + 0.2 * t
    for t, block in enumerate(short.blocks):
        block.load_state_dict(model.blocks[2 * t].state_dict())
        block.step = 0.4 + 0.8 * t
    short.stem.load_state_dict(model.stem.state_dict())
    short.head.load_state_dict(model.head.state_dict())
    found = coarse_of(model, (0, 4, 8)).backward(data()[0])
    torch.testing.assert_close(found, hp.Chain.from_model(short, data()[0]).loss(data()[0]).detach())
    assert [block.step for block in model.blocks] == [0.1 + 0.2 * t for t in range(8)]


def test_a_weight_that_a_block_of_the_coarse_model_has_as_well_is_not_interpolated():
    model = net(4)
    model.blocks[1].linear.weight = model.blocks[2].linear.weight
    was, bias = model.blocks[2].linear.weight.clone(), model.blocks[1].linear.bias.clone()
    coarse_of(model, (0, 4)).prolong()
    assert torch.equal(model.blocks[2].linear.weight, was)
    assert not torch.equal(model.blocks[1].linear.bias, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_with_many_channels_train(dtype):
    torch.manual_seed(0)
    model = ResidualMLP(3, 300, 3, 4).to(dtype)
    losses = trained(ParallelInTime(coarse_steps=0), model, data(4, dtype=dtype))
    assert torch.isfinite(torch.stack(losses)).all()


def test_processes_with_other_orders_or_labels_of_a_batch_are_told_apart():
    x, y = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])

    def print_of(*tensors):
        return fingerprint([SimpleNamespace(batch=tensors)])

    order = torch.tensor([1, 0, 2, 3, 4, 5])
    others = [(x[order], y[order]), (x, y[order]), (x.T.contiguous(), y), (y, x), (x.double(), y), (x,)]
    found = {print_of(x, y), *(print_of(*other) for other in others)}
    assert len(found) == len(others) + 1
    assert print_of(x.clone(), y) == print_of(x.T.contiguous().T, y) == print_of(x, y)
    assert all(0 <= value < 2**32 and value == int(value) for value in found)
    assert print_of(torch.tensor(math.nan)) == print_of(torch.tensor(math.nan))


class Counting(nn.Module):
    """Buffers that the model's own forward changes, before its blocks, between them and after them."""

    def __init__(self):
        super().__init__()
        made = net(4)
        self.stem, self.blocks, self.head = made.stem, made.blocks, made.head
        self.inner = nn.Module()
        self.inner.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.middle, self.late = nn.Module(), nn.Module()
        for module in (self, self.middle, self.late):
            module.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls += 1
            self.inner.mean = 0.9 * self.inner.mean + 0.1 * x.mean(0)
        x = self.stem(x)
        for t, block in enumerate(self.blocks):
            if self.training and t == 3:
                self.middle.calls += 1
            x = block(x)
        if self.training:
            self.late.calls += 1
        return self.head(x)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("kind", [lambda parts: ParallelInTime(parts, exact=True), ParallelWindows])
def test_buffers_of_the_model_itself_change_once_a_step(kind, parts):
    model = Counting()
    twin = copy.deepcopy(model)
    method = kind(parts)
    trained(method, model, data(), trainable)
    backpropagated(twin, data())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert isinstance(method, ParallelWindows) or equal(model, twin)
    owned = [part.modules() for part in parts_of(method)]
    for module, owner in ((model, 0), (model.inner, 0), (model.middle, parts - 1), (model.late, parts - 1)):
        assert [n for n, found in enumerate(owned) if module in found] == [owner]


def parts_of(method):
    return [one.part for one in (method._all if isinstance(method, ParallelWindows) else method._ready.all)]


def test_a_state_whose_shape_does_not_follow_from_the_batch_s_is_not_sent(monkeypatch):
    sent = []
    wire = Wire.__new__(Wire)
    wire.part, wire.told, wire.talk, wire.up = 0, {}, None, None
    monkeypatch.setattr(wire, "_send", lambda tensor, *_: sent.append(tensor))
    wire.send_state(torch.ones(4, 4), "key")
    wire.send_state(torch.ones(4, 4), "key")
    wire.send_state(torch.ones(2, 4), "other")
    for wrong in (torch.ones(2, 4), torch.ones(4, 4).double()):
        with pytest.raises(ValueError, match=r"the state sent to part 1.*\(4, 4\), torch.float32.*pad it"):
            wire.send_state(wrong, "key")
    assert len(sent) == 5


@pytest.mark.parametrize(
    ("output", "target", "dtype", "classes"),
    [
        ((4, 3), (4,), torch.long, 3),
        ((4, 5, 3), (4, 5), torch.long, 3),
        ((4, 10, 5), (4, 5), torch.long, 10),  # the class axis second, as in images
        ((4, 1), (4,), torch.long, 0),  # one score
        ((4,), (4,), torch.long, 0),
        ((4, 5), (4, 5), torch.long, 0),  # several labels
        ((4, 3), (4,), torch.bool, 0),
        ((4, 3), (4,), torch.float32, 0),
    ],
)
def test_classes_are_those_of_the_default_loss(output, target, dtype, classes):
    batch = None, torch.ones(target, dtype=dtype)
    found = classes_of(batch, torch.zeros(output))
    assert found == classes
    wanted = (*target, classes) if classes else (target if len(target) > 1 else (4, 1))
    assert known(batch, found, 4).shape == wanted
    if not classes:
        assert torch.equal(known(batch, found, 4).reshape(target), batch[1].double())


def test_a_binary_label_is_seen_whatever_its_type():
    errors = []
    for dtype in (torch.long, torch.bool, torch.float64):
        torch.manual_seed(1)
        model = DynamicalNet(3, 4, 1, 8).double()
        batches = [(x, (y > 0).to(dtype)) for x, y in data()]
        chain = hp.Chain.from_model(model, batches[0], loss=binary)
        method, optimizer = ParallelInTime(coarse_steps=0), trainable(model.parameters())
        for batch in batches:
            method.step(chain, batch, optimizer)
        errors.append([error.mse for error in method.errors])
    assert errors[0] == errors[1] == errors[2]


def binary(output, target):
    return F.binary_cross_entropy_with_logits(output.squeeze(-1), target.double())


@pytest.mark.parametrize("exact", [False, True])
def test_a_loss_that_is_a_sum_is_refused_where_co_states_are_predicted(exact):
    chain = hp.Chain.from_model(net(), data()[0], loss=lambda o, t: F.cross_entropy(o, t, reduction="sum"))
    method = ParallelInTime(coarse_steps=0, exact=exact)
    if exact:
        method.prepare(chain, data()[0])
        assert method.bounds == (0, 4, 8)
    else:
        with pytest.raises(ValueError, match=r"loss: .*sum.*reduction='mean'.*exact=True"):
            method.prepare(chain, data()[0])


class Normed(nn.Module):
    """A block with a normalisation that other blocks may have as well."""

    def __init__(self, norm):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), norm

    def forward(self, x):
        return x + torch.tanh(self.norm(self.linear(x)))


@pytest.mark.parametrize("parts", [1, 2])
def test_running_statistics_of_two_parts_are_refused(parts):
    norm = nn.BatchNorm1d(4, affine=False)
    model = nn.Sequential(nn.Linear(3, 4), *(Normed(norm) for _ in range(4)), nn.Linear(4, 3)).double()
    method = ParallelInTime(parts, coarse_steps=0)
    if parts == 1:
        assert len(trained(method, model, data())) == len(data())
    else:
        with pytest.raises(hp.ChainError, match=r"running statistics of '1.norm' are used in parts 0 and 1.*split="):
            trained(method, model, data())


def test_epsilon_p_takes_the_learning_rate_of_the_part_before_the_cut():
    found = []
    for order in (1, -1):
        model = net()
        groups = [
            {"params": model.head.parameters(), "lr": 1e-3},
            {"params": [*model.stem.parameters(), *model.blocks.parameters()], "lr": 0.5},
        ]
        method = ParallelInTime(coarse_steps=1)
        trained(method, model, data(), lambda _, groups=groups, order=order: torch.optim.SGD(groups[::order]))
        found.append([error.epsilon_p for error in method.errors])
    assert found[0] == found[1]


def test_an_error_in_the_loss_does_not_lose_the_pair_before():
    calls = []

    def loss(output, target):
        calls.append(None)
        if len(calls) == failing:
            raise KeyError("a bad batch")
        return F.cross_entropy(output, target)

    failing, model = 0, net()
    chain, optimizer = hp.Chain.from_model(model, data()[0], loss=loss), trainable(model.parameters())
    method = ParallelInTime(3, coarse_steps=0)
    for batch in data()[:4]:
        method.step(chain, batch, optimizer)
    failing = len(calls) + 1
    with pytest.raises(KeyError, match="a bad batch"):
        method.step(chain, data()[4], optimizer)
    for batch in data()[5:]:
        method.step(chain, batch, optimizer)
    method.gather(chain, optimizer)
    assert [error.step for error in method.errors] == [step for step in range(7) for _ in range(2)]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_penalty_on_all_weights_in_the_loss_is_refused_by_name(parts):
    model = net(4)

    def penalised(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + 0.1 * sum(p.square().sum() for p in model.parameters())

    chain = hp.Chain.from_model(model, data()[0], compute_loss=penalised)
    method = ParallelInTime(parts, exact=True)
    if parts == 1:
        method.prepare(chain, data()[0])
        assert method.bounds == (0, 4)
    else:
        with pytest.raises(hp.ChainError, match=r"penalty.*weight_decay"):
            method.prepare(chain, data()[0])
