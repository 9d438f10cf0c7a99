"""Probes measure what they say and leave nothing behind.

Oracles: gradients of the definition (``oracle.gradients``), a minimisation for Eq. 13, a training
loop written out for the rollout, and a fingerprint of everything a probe could disturb.
"""

import gc
import math
import random
import statistics
from contextlib import contextmanager

import oracle
import pytest
import torch
from families import ResidualMLP, residual_mlp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from horizonplan import plan_horizon, probes
from horizonplan.chain import Chain
from horizonplan.gradient import engine, horizon_backward
from horizonplan.rates import relative_rate
from horizonplan.schedule import Schedule


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    gc.freeze()
    yield
    gc.unfreeze()


def raw(tensor):
    return None if tensor is None else (tensor.dtype, tuple(tensor.shape), tensor.detach().numpy().tobytes())


def shallow(value):
    """Identity of an attribute, and of what a container of hooks or flags holds."""
    return (id(value), [(k, id(v)) for k, v in value.items()]) if isinstance(value, dict) else id(value)


def fingerprint(model, optimizer=None):
    """Everything of a model, an optimiser and the generators that a probe could disturb, bit for bit."""
    state = {
        "parameters": {n: (id(p), p.requires_grad, raw(p)) for n, p in model.named_parameters()},
        "gradients": {n: (id(p.grad), raw(p.grad)) for n, p in model.named_parameters()},
        "buffers": {n: (id(b), raw(b)) for n, b in model.named_buffers()},
        "hooks": {n: dict(p._post_accumulate_grad_hooks or {}) for n, p in model.named_parameters()},
        "attributes": {n: {k: shallow(v) for k, v in vars(m).items()} for n, m in model.named_modules()},
        "training": {n: m.training for n, m in model.named_modules()},
        "generators": (raw(torch.get_rng_state()), random.getstate()),
        "grad mode": torch.is_grad_enabled(),
    }
    if optimizer is not None:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        moments = [{k: raw(v) for k, v in values.items()} for values in optimizer.state.values()]
        state["optimizer"] = (groups, [[id(p) for p in g["params"]] for g in optimizer.param_groups], moments)
    return state


@contextmanager
def unchanged(model, optimizer=None):
    """Whatever happens inside, model, optimiser and generators are bit for bit the same after it."""
    before = fingerprint(model, optimizer)
    try:
        yield
    finally:
        after = fingerprint(model, optimizer)
        for what, value in before.items():
            assert after[what] == value, f"{what} changed"


def lived_in(p=0.2):
    """A model in use: gradients, an optimiser with state, a hook, a part in eval mode; and its batches."""
    model = ResidualMLP(depth=5, p=p)
    batches = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(4)]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.8, 0.9))
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    model.blocks[1].eval()
    model.blocks[2].linear.weight.grad = None
    next(model.parameters()).register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    model.head.register_forward_hook(lambda module, args, output: None)
    return model, batches, optimizer


PROBES = {
    "profile": lambda chain, batches, optimizer: probes.profile(chain, batches[0], optimizer, repeats=1),
    "memory": lambda chain, batches, optimizer: probes.memory(chain, batches, [1, 3, 5], (1, "horizon"), optimizer),
    "cosine": lambda chain, batches, optimizer: probes.cosine(chain, batches, [1, 3, 5], (1, "horizon")),
    "time": lambda chain, batches, optimizer: probes.time(chain, batches, [1, 5], optimizer=optimizer, repeats=1),
    "rollout": lambda chain, batches, optimizer: probes.rollout(chain, batches, [(2, 1), (2, 2)], 6, optimizer),
}


@pytest.mark.parametrize("own_optimizer", [True, False])
@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_leaves_everything_bit_for_bit(probe, own_optimizer):
    model, batches, optimizer = lived_in()
    with unchanged(model, optimizer):
        chain = Chain.from_model(model, batches[0])
        PROBES[probe](chain, batches, optimizer if own_optimizer else None)


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, call):
    """Let the engine's ``call``-th pull fail."""
    pull, left = engine.Step._pull, iter(range(call))

    def fails(self, op):
        if next(left, None) is None:
            raise Interrupted
        pull(self, op)

    monkeypatch.setattr(engine.Step, "_pull", fails)


@pytest.mark.parametrize("call", [0, 3, 13])
@pytest.mark.parametrize("probe", PROBES)
def test_an_interrupted_probe_leaves_everything_bit_for_bit(probe, call, monkeypatch):
    model, batches, optimizer = lived_in()
    chain = Chain.from_model(model, batches[0])
    interrupt(monkeypatch, call)
    with unchanged(model, optimizer), pytest.raises(Interrupted):
        PROBES[probe](chain, batches, optimizer)


@pytest.mark.filterwarnings("ignore::horizonplan.PoorFitWarning")
def test_planning_leaves_everything_bit_for_bit():
    model, batches, optimizer = lived_in()
    with unchanged(model, optimizer):
        plan_horizon(model, batches, optimizer=optimizer, rollout_steps=4, horizons=[1, 2, 3, 4, 5], progress=False)


@pytest.mark.filterwarnings("ignore::horizonplan.PoorFitWarning")
@pytest.mark.parametrize("call", [0, 50, 300])
def test_interrupted_planning_leaves_everything_bit_for_bit(call, monkeypatch):
    model, batches, optimizer = lived_in()
    interrupt(monkeypatch, call)
    with unchanged(model, optimizer), pytest.raises(Interrupted):
        plan_horizon(model, batches, optimizer=optimizer, rollout_steps=8, horizons=[1, 2, 3, 5], progress=False)


@pytest.mark.filterwarnings("ignore::horizonplan.PoorFitWarning")
def test_a_shuffling_loader_draws_from_a_generator_of_its_own_time():
    model, batches, _ = lived_in()
    data = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    loader = torch.utils.data.DataLoader(data, batch_size=6, shuffle=True)
    with unchanged(model):
        plan_horizon(model, loader, rollout_steps=2, progress=False)


def parts(p=0.0, depth=4):
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(p)) for _ in range(depth)]
    chain = Chain(nn.Linear(4, 6), blocks, nn.Linear(6, 3), F.cross_entropy)
    chain.model.double()
    batches = [(torch.randn(5, 4).double(), torch.randint(0, 3, (5,))) for _ in range(3)]
    return chain, batches


def gradient(chain, batch, schedule, t=None):
    """The definition's gradient of the block parameters, concatenated (of block ``t`` only)."""
    model = chain.model
    found = oracle.gradients(model.stem, model.blocks, model.head, F.cross_entropy, batch, schedule.windows)
    return torch.cat([found[p].flatten() for p in (model.blocks if t is None else model.blocks[t]).parameters()])


@pytest.mark.parametrize(("horizon", "stride"), [(1, 1), (2, 1), (3, 1), (2, 2), (3, 3), (4, 1)])
def test_the_cosine_is_the_definition_s(horizon, stride):
    chain, batches = parts()
    sample = probes.cosine(chain, batches, [horizon], [stride])[0]
    ours, exact = Schedule.horizon(4, horizon, stride), Schedule.exact(4)
    pairs = [(gradient(chain, b, ours), gradient(chain, b, exact)) for b in batches]
    per_batch = [F.cosine_similarity(g, e, 0).item() for g, e in pairs]
    assert sample.detail["per_batch"] == pytest.approx(per_batch)
    assert sample.value == pytest.approx(statistics.fmean(per_batch))
    assert sample.stderr == pytest.approx(statistics.stdev(per_batch) / math.sqrt(3), abs=1e-12)
    for t in range(4):
        own = [
            F.cosine_similarity(gradient(chain, b, ours, t), gradient(chain, b, exact, t), 0).item() for b in batches
        ]
        assert sample.detail["per_block"][t] == pytest.approx(statistics.fmean(own))


@pytest.mark.parametrize("horizon", [1, 2, 3, 4])
def test_the_scale_brings_the_gradient_nearest_to_the_exact_one(horizon):
    """Eq. 13: no other c has a smaller |c g_h - g_T|."""
    chain, batches = parts()
    scale = probes.cosine(chain, batches[:1], [horizon])[0].detail["scale"]
    ours, exact = (gradient(chain, batches[0], s) for s in (Schedule.horizon(4, horizon), Schedule.exact(4)))
    distance = (scale * ours - exact).norm()
    assert all((c * ours - exact).norm() > distance for c in (scale - 1e-3, scale + 1e-3, 0.9 * scale, 1.1 * scale))


def test_cosines_of_one_window_are_exactly_one_and_one_batch_has_no_stderr():
    chain, batches = parts(p=0.5)
    sample = probes.cosine(chain, batches[:1], [4])[0]
    assert (sample.value, sample.stderr, sample.detail["scale"]) == (1.0, None, 1.0)
    assert sample.detail["per_block"] == (1.0,) * 4


def test_all_horizons_see_the_same_dropout_masks():
    """A last block's gradient at h is back-propagation's, if its input and masks are."""
    chain, batches = parts(p=0.5)
    chain.model.train()
    samples = probes.cosine(chain, batches, [1, 2, 3], (1, "horizon"))
    for sample in samples:
        last = range(4 - sample.horizon if sample.stride == 1 else (4 // sample.horizon) * sample.horizon, 4)
        assert all(sample.detail["per_block"][t] == pytest.approx(1) for t in last if t < 4)
    assert probes.cosine(chain, batches, [1, 2, 3], (1, "horizon")) == samples


def test_frozen_blocks_have_no_cosine_of_their_own():
    chain, batches = parts()
    chain.model.blocks[1].requires_grad_(False)
    sample = probes.cosine(chain, batches, [2])[0]
    assert sample.detail["per_block"][1] is None
    assert all(-1 <= sample.detail["per_block"][t] <= 1 for t in (0, 2, 3))


def test_every_sample_carries_unit_and_source():
    chain, batches = parts()
    samples = [
        *probes.memory(chain, batches, [1, 4]),
        *probes.cosine(chain, batches, [1, 4]),
        *probes.time(chain, batches, [1, 4], repeats=2),
        *probes.rollout(chain, batches, [(1, 1), (4, 1)], 4),
    ]
    units = {"memory": "bytes", "cosine": "1", "time": "seconds", "rate": "1"}
    assert [(s.quantity, s.horizon) for s in samples] == [(q, h) for q in units for h in (1, 4)]
    assert all((s.unit, s.source, s.stride) == (units[s.quantity], "measured", 1) for s in samples)
    assert all(s.detail for s in samples)


def test_memory_is_of_the_largest_batch_and_repeats_exactly():
    chain, batches = parts()
    small = (batches[0][0][:2], batches[0][1][:2])
    first = probes.memory(chain, [small, batches[0], small], [1, 2, 4], (1, "horizon"))
    assert first == probes.memory(chain, batches[:1], [1, 2, 4], (1, "horizon"))
    assert [(s.horizon, s.stride) for s in first] == [(1, 1), (2, 1), (2, 2), (4, 1), (4, 4)]
    assert first[0].value > probes.memory(chain, [small], [1])[0].value
    own = sum(p.nbytes for p in chain.parameters())
    steps = 4 * len(list(chain.parameters()))  # Adam keeps two moments and a step count for each
    batch = sum(t.nbytes for t in batches[0])
    assert first[0].detail["base_bytes"] == 3 * own + steps + batch


def test_recomputing_needs_less_memory():
    blocks = [nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(8)]
    chain = Chain(None, blocks, None)
    batch = torch.randn(64, 8), torch.randn(64, 8)
    kept, rebuilt = (probes.memory(chain, [batch], [8], recompute=k)[0].value for k in (0, 1))
    assert rebuilt < 0.75 * kept


def test_times_are_medians_of_their_rounds():
    chain, batches = parts()
    for sample in probes.time(chain, batches, [1, 4], repeats=3):
        rounds = sample.detail["rounds"]
        assert len(rounds) == 3
        assert min(rounds) > 0
        assert sample.value == statistics.median(rounds)


def test_a_rollout_is_the_training_it_stands_for():
    """Eq. 14 from a loop written out: the same weights, data order and generator for each run."""
    model, batches, _ = lived_in()
    model.train()
    next(model.parameters())._post_accumulate_grad_hooks.clear()
    chain, steps, seed = Chain.from_model(model, batches[0]), 10, 3
    weights = {n: v.clone() for n, v in model.state_dict().items()}
    order = [batches[i % 4] for i in range(steps)]

    def losses(schedule):
        model.load_state_dict(weights)
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        for batch in order:
            optimizer.zero_grad()
            found.append(horizon_backward(chain, batch, schedule).item())
            optimizer.step()
        model.load_state_dict(weights)
        return statistics.fmean(found[-2:])

    torch.manual_seed(seed)
    with torch.no_grad():
        start = statistics.fmean(chain.loss(batch).item() for batch in order[-2:])
    model.load_state_dict(weights)
    wanted = {pair: losses(Schedule.horizon(5, *pair)) for pair in [(5, 1), (2, 1), (2, 2)]}
    samples = probes.rollout(chain, batches, list(wanted), steps, lambda p: torch.optim.SGD(p, lr=0.1), seed)
    for sample, (pair, end) in zip(samples, wanted.items(), strict=True):
        assert (sample.horizon, sample.stride) == pair
        assert sample.detail["loss"] == end
        assert (sample.detail["loss_start"], sample.detail["loss_exact"]) == (start, wanted[5, 1])
        assert sample.value == pytest.approx(math.log(end / start) / math.log(wanted[5, 1] / start))


def test_the_rate_of_back_propagation_is_one():
    chain, batches = parts()
    sample = probes.rollout(chain, batches, [(4, 1)], 12)[0]
    assert (sample.value, sample.stderr) == (1.0, 0.0)


losses = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)


@given(losses, losses, losses)
def test_relative_rate_is_eq_14(end, exact, start):
    j, j_exact, j_start = map(statistics.fmean, (end, exact, start))
    rate = relative_rate(end, exact, start)
    if j_exact >= j_start:
        assert math.isnan(rate)
    else:
        assert rate == pytest.approx(math.log(j / j_start) / math.log(j_exact / j_start))


def test_relative_rate_of_losses_that_are_not_positive_is_the_ratio_of_decreases():
    assert relative_rate([-1.0], [-3.0], [1.0]) == pytest.approx(0.5)
    assert relative_rate([2.0], [-3.0], [1.0]) == pytest.approx(-0.25)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_diverges_has_no_rate(loss):
    assert math.isnan(relative_rate([loss], [0.5], [1.0]))
    assert math.isnan(relative_rate([0.7], [loss], [1.0]))


def test_a_rollout_without_a_rate_says_why():
    chain, batches = parts()
    up = probes.rollout(chain, batches, [(1, 1)], 4, lambda p: torch.optim.SGD(p, lr=0.1, maximize=True))[0]
    assert math.isnan(up.value)
    assert up.stderr is None
    assert up.detail["why"] == "back-propagation did not lower the loss in 4 steps"

    def diverges(chain, batch, schedule, optimizer, *more, real=probes.runs.step):
        loss = real(chain, batch, schedule, optimizer, *more)
        return loss if schedule == Schedule.exact(4) else loss * math.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes.runs, "step", diverges)
        lost = probes.rollout(chain, batches, [(1, 1)], 12, lambda p: torch.optim.SGD(p, lr=0.1))[0]
    assert math.isnan(lost.value)
    assert lost.detail["why"] == "the run diverged"


def test_a_user_s_optimiser_lends_its_settings_and_keeps_its_state():
    chain, batches = parts()
    stem, blocks = list(chain.model.stem.parameters()), list(chain.model.blocks.parameters())
    groups = [{"params": stem, "lr": 0.0}, {"params": blocks, "lr": 0.05}]
    mine = torch.optim.SGD(groups, momentum=0.9)
    made = probes.steady.optimizer_for([*stem, *blocks], mine)
    assert made is not mine
    assert [g["lr"] for g in made.param_groups] == [0.0, 0.05]
    assert all(g["momentum"] == 0.9 for g in made.param_groups)
    with unchanged(chain.model, mine):
        slow, fast = (
            probes.rollout(chain, batches, [(2, 1)], 4, optimizer)[0].detail["loss"]
            for optimizer in (mine, lambda p: torch.optim.SGD(p, lr=0.5))
        )
    assert slow != fast


BAD = [
    (lambda c, b: probes.memory(c, [], [1]), "batches is empty"),
    (lambda c, b: probes.time(c, [], [1]), "batches is empty"),
    (lambda c, b: probes.cosine(c, [], [1]), "batches is empty"),
    (lambda c, b: probes.rollout(c, [], [(1, 1)]), "batches is empty"),
    (lambda c, b: probes.rollout(c, b, [(1, 1)], 0), "steps=0"),
    (lambda c, b: probes.rollout(c, b, [(9, 1)], 2), "horizon=9"),
    (lambda c, b: probes.memory(c, b, [0]), "horizon=0"),
    (lambda c, b: probes.cosine(c, b, [9]), "horizon=9"),
    (lambda c, b: probes.time(c, b, [5]), "horizon=5"),
    (lambda c, b: probes.cosine(c, b, [2], [3]), "stride=3"),
    (lambda c, b: probes.memory(c, b, [2], ["blocks"]), "stride='blocks'"),
    (lambda c, b: probes.memory(c, b, [2], optimizer=0.1), "optimizer=0.1"),
    (lambda c, b: probes.memory(c, b, [2], optimizer=lambda p: None), "optimizer=<function"),
]


@pytest.mark.parametrize(("probe", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_named_and_leave_nothing_behind(probe, message):
    chain, batches = parts()
    with unchanged(chain.model), pytest.raises(ValueError, match=message):
        probe(chain, batches)


def test_a_loss_that_is_not_finite_is_named_with_its_batch():
    chain, batches = parts()
    batches[1][0][0] = math.nan
    with unchanged(chain.model), pytest.raises(ValueError, match=r"loss is nan on batch 1: check the data"):
        probes.cosine(chain, batches, [1])


def test_a_gradient_that_vanishes_has_no_angle():
    case = residual_mlp()
    nn.init.zeros_(case.model.head[1].weight)
    chain = Chain.from_model(case.model, case.batch)
    with unchanged(case.model), pytest.raises(ValueError, match="has no angle; check the initial weights"):
        probes.cosine(chain, [case.batch], [1])


def test_nothing_to_train_in_the_blocks_is_named():
    chain, batches = parts()
    chain.model.blocks.requires_grad_(False)
    with unchanged(chain.model), pytest.raises(ValueError, match="no block has a trainable parameter"):
        probes.cosine(chain, batches, [1])
