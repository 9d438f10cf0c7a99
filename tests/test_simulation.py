"""A simulated step counts what the real one counts, on CUDA's terms, and leaves the model alone."""

import copy

import families
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from horizonplan import Chain, Schedule, SimulationError
from horizonplan.batch import nbytes
from horizonplan.predict import step_bytes
from horizonplan.probes import LiveBytes, profile
from horizonplan.probes.simulation import simulated

# On fakes BatchNorm's backward makes the input's gradient even where nobody wants it, as cuDNN's does.
NORMED = {"cnn"}


def peaks(chain, batch, optimizer=None):
    costs = profile(chain, batch, optimizer, repeats=0)
    depth = chain.depth
    schedules = [Schedule.horizon(depth, h, s, k) for h in range(1, depth + 1) for s in {1, h} for k in (0, 1)]
    return [step_bytes(schedule, costs) for schedule in schedules], costs


@pytest.mark.parametrize("make", families.ALL, ids=lambda make: make.__name__)
def test_a_simulated_profile_is_the_real_one(make):
    case = make()
    real, costs = peaks(Chain.from_model(case.model, case.batch, **case.kwargs), case.batch)
    with simulated(case.model, cuda=False) as simulation:
        batch = simulation.batch(case.batch)
        fake, fake_costs = peaks(Chain.from_model(case.model, batch, **case.kwargs), batch)
    if make.__name__ in NORMED:
        assert all(r <= f <= 1.15 * r for f, r in zip(fake, real, strict=True))
    else:
        assert fake == real
    assert {key: cost.flops for key, cost in fake_costs.costs.items()} == {k: c.flops for k, c in costs.costs.items()}


LEFT = [families.gpt2, families.bert, families.resnet, families.mlp, families.tied, families.in_place]


@pytest.mark.parametrize("make", LEFT, ids=lambda make: make.__name__)
def test_a_simulation_leaves_the_model_as_it_was(make):
    case = make()
    before = copy.deepcopy(case.model.state_dict())
    tensors = [*case.model.parameters(), *case.model.buffers()]
    state = torch.get_rng_state()
    with simulated(case.model) as simulation:
        batch = simulation.batch(case.batch)
        profile(Chain.from_model(case.model, batch, **case.kwargs), batch, simulation.optimizer(None), repeats=0)
    assert all(a is b for a, b in zip([*case.model.parameters(), *case.model.buffers()], tensors, strict=True))
    assert all(torch.equal(before[name], value) for name, value in case.model.state_dict().items())
    assert all(p.grad is None for p in case.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_on_meta_is_simulated_as_if_it_had_values():
    case = families.residual_mlp()
    empty = copy.deepcopy(case.model).to("meta")
    found = []
    for model in (case.model, empty):
        with simulated(model) as simulation:
            batch = simulation.batch(case.batch)
            found.append(peaks(Chain.from_model(model, batch), batch)[0])
    assert found[0] == found[1]


def kept_bytes(function, *inputs):
    """Bytes alive after a forward besides its output: what is kept for the backward."""
    with LiveBytes() as tracker:
        output = function(*inputs)
        return tracker.live - nbytes(output)


def test_operators_keep_for_their_backward_what_cuda_keeps():
    model = nn.ModuleDict({"drop": nn.Dropout(0.1), "norm": nn.RMSNorm(64)})
    x = torch.zeros(8, 4, 16, 64, requires_grad=True)
    attention = lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)  # noqa: E731
    with simulated(model) as simulation:
        q = simulation.batch(x).requires_grad_()
        dropout, attended, normed = (kept_bytes(f, q) for f in (model["drop"], attention, model["norm"]))
    rows = 8 * 4 * 16
    assert dropout == x.numel()  # a byte an element
    assert attended == 4 * rows  # a logarithm of a sum a query, and no matrix of scores
    assert normed <= 2 * 4 * rows  # a number a row or two
    assert kept_bytes(model["drop"], x) == x.nbytes  # on CPU, in the input's type
    assert kept_bytes(attention, x) > 3 * 4 * rows * 16  # on CPU, several such matrices


def test_attention_inside_torch_s_own_modules_is_cuda_s_too():
    attention = nn.MultiheadAttention(64, 4, dropout=0.1, batch_first=True)
    x = torch.zeros(4, 256, 64)
    with simulated(attention) as simulation:
        q = simulation.batch(x).requires_grad_()
        fused = kept_bytes(lambda q: attention(q, q, q, need_weights=False)[0], q)
    scores = 4 * 4 * 256 * 256 * 4
    assert fused < scores  # not one matrix of them, where the CPU keeps several
    assert kept_bytes(lambda q: attention(q, q, q, need_weights=False)[0], x.requires_grad_()) > 2 * scores
    assert F.dropout.__module__ == "torch.nn.functional"  # put back


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_for_cuda_works_without_a_card(dtype):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    kept = {}
    with simulated(model) as simulation:
        x = simulation.batch(torch.zeros(512, 64))
        for kind in ("cuda", "cpu"):
            with torch.autocast(kind, dtype):
                kept[kind] = kept_bytes(model, x)
        plain = kept_bytes(model, x)
    assert kept["cuda"] == kept["cpu"] < plain
    assert torch.backends.mkldnn.enabled


def test_what_recurrent_layers_keep_is_counted():
    model, x = nn.LSTM(32, 32, batch_first=True), torch.zeros(8, 50, 32)
    with simulated(model) as simulation:
        kept = kept_bytes(lambda q: model(q)[0], simulation.batch(x))
    assert kept > 5 * 8 * 50 * 32 * 4  # four gates and a cell a step


def test_dropout_that_draws_nothing_keeps_nothing():
    with simulated(nn.Identity()) as simulation:
        q = simulation.batch(torch.zeros(64)).requires_grad_()
        assert kept_bytes(lambda q: F.dropout(q, 0.1, training=False), q) == -q.nbytes  # the input itself
        assert kept_bytes(lambda q: F.dropout(q, 0.0), q) <= 2 * q.nbytes


def test_optimisers_work_on_all_parameters_at_once_as_on_cuda():
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    given = torch.optim.Adam(model.parameters(), lr=0.1)
    whole = sum(p.nbytes for p in model.parameters())
    with simulated(model) as simulation:
        fakes = list(model.parameters())
        for optimizer in (None, torch.optim.AdamW, given):
            made = simulation.optimizer(optimizer)(fakes)
            assert [p for group in made.param_groups for p in group["params"]] == fakes
            for p in fakes:
                p.grad = torch.zeros_like(p)
            made.step()
            with LiveBytes() as tracker:
                made.step()
            assert tracker.peak >= whole  # one temporary for all of them
    assert given.param_groups[0]["foreach"] is None
    assert not given.state


def test_tensors_that_share_memory_have_fakes_that_do():
    model = nn.Module()
    base = torch.zeros(10)
    model.register_buffer("first", base[:4])
    model.register_buffer("second", base[4:])
    model.plain = base
    model.weight = nn.Parameter(torch.zeros(3))
    model.tied = model.weight
    with simulated(model):
        cells = {t.untyped_storage()._cdata for t in (model.first, model.second, model.plain)}
        assert len(cells) == 1
        assert model.tied is model.weight
        assert isinstance(model.weight, nn.Parameter)
        assert model.second.storage_offset() == 4
    assert model.plain is base


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        if x.sum().item() > 0:
            x = -x
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_model_that_reads_values_is_told_the_place():
    model, x = Reads(), torch.ones(2, 4)
    place = r"test_simulation\.py:\d+ \(if x.sum\(\).item\(\) > 0:\) needs values"
    with pytest.raises(SimulationError, match=place), simulated(model) as simulation:
        Chain.from_model(model, simulation.batch((x, x)))
    assert not any(p.is_meta for p in model.parameters())
    assert type(next(model.parameters()).data) is torch.Tensor


def test_other_errors_pass_and_the_model_is_restored():
    model = nn.Linear(2, 2)
    weight = model.weight
    with pytest.raises(ZeroDivisionError), simulated(model):
        raise ZeroDivisionError
    assert model.weight is weight
