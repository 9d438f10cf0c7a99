"""The fold against the engine: what a schedule would need, and what its execution really needs.

Oracle: the tracker and the FLOP counter around a real ``execute()``.
"""

import gc
from dataclasses import replace
from functools import cache

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import schedules
from torch import nn

from horizonplan import probes
from horizonplan.chain import Chain
from horizonplan.gradient import execute
from horizonplan.models import CharacterGPT, ResidualCNN, ResidualMLP, SequenceClassifier
from horizonplan.predict import activation_bytes, memory_trace, step_bytes, step_flops, step_seconds
from horizonplan.probes import Flops, LiveBytes
from horizonplan.schedule import Drop, Schedule

DEPTH = 6
RECOMPUTED = 0.05  # relative error allowed with recompute; without it there is none
OWN_MASKS = 0.005  # where a model makes masks of its own, which this small are a part of its activations


def mlp(frozen=()):
    model = ResidualMLP(6, 16, 3, DEPTH)
    for t in frozen:
        model.blocks[t].requires_grad_(False)
    return model, (torch.randn(8, 6), torch.randint(0, 3, (8,)))


def cnn():
    model = ResidualCNN(1, (4, 6, 8), blocks_per_stage=2)
    return model, (torch.randn(4, 1, 12, 12), torch.randint(0, 10, (4,)))


def transformer():
    return SequenceClassifier(5, 8, 3, width=16, depth=DEPTH, heads=2), (
        torch.randn(4, 8, 5),
        torch.randint(0, 3, (4,)),
    )


def gpt():
    tokens = torch.randint(0, 40, (2, 9))
    return CharacterGPT(40, width=16, depth=DEPTH, heads=2, context=8), (tokens[:, :-1], tokens[:, 1:])


def frozen_below():
    model, batch = mlp(frozen=(0, 1))
    model.stem.requires_grad_(False)
    return model, batch


def frozen_between():
    return mlp(frozen=(2, 3))


def frozen_head():
    model, batch = transformer()
    model.head.requires_grad_(False)
    model.blocks[-1].requires_grad_(False)
    return model, batch


def between():
    case = families.between()
    return case.model, case.batch


def gpt2():
    case = families.gpt2(n_embd=32)
    return case.model, case.batch


def llama():
    case = families.llama(hidden_size=64, intermediate_size=128)
    return case.model, case.batch


EXACT = {f.__name__: f for f in (mlp, cnn, transformer, gpt, frozen_below, frozen_between, frozen_head, between)}
MASKED = {f.__name__: f for f in (gpt2, llama)}


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    """Every measurement of memory begins with a collection: spare it what was imported before."""
    gc.freeze()
    yield
    gc.unfreeze()


@cache
def profiled(name):
    """Chain, batch and profile of a family (each is profiled once)."""
    torch.manual_seed(0)
    model, batch = {**EXACT, **MASKED}[name]()
    chain = Chain.from_model(model.train(), batch)
    return chain, batch, probes.profile(chain, batch, repeats=1)


class Ledger:
    """Live bytes after every operation."""

    def __init__(self, tracker):
        self.tracker, self.live = tracker, []

    def begin(self, op, step):
        pass

    def arrive(self, op, step):
        pass

    def end(self, op, step):
        self.live.append(self.tracker.live)


def measured(name, schedule, observe=False):
    """Peak bytes, dispatched FLOPs and (if wanted) live bytes after every operation of one execution."""
    chain, batch, profile = profiled(name)
    for p in chain.parameters():
        p.grad = None
    with torch.random.fork_rng(), LiveBytes() as tracker, Flops() as flops:
        ledger = Ledger(tracker)
        execute(chain, batch, profile.ops(schedule), observer=ledger if observe else None)
    for p in chain.parameters():
        p.grad = None
    return tracker.peak, flops.total, ledger.live


def any_schedule(name, data, recompute):
    depth = profiled(name)[0].depth
    found = data.draw(schedules(max_depth=depth, min_depth=depth))
    return replace(found, recompute=max(1, found.recompute) if recompute else 0)


def buffer_bytes(name):
    """The profile prices some pulls on rebuilt graphs, which keep copies of the block's buffers."""
    return sum(buffer.nbytes for buffer in profiled(name)[0].model.buffers())


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=20)
@given(data=st.data())
def test_peak_bytes_of_any_windows_are_exact(name, data):
    schedule = any_schedule(name, data, recompute=False)
    profile = profiled(name)[2]
    peak = measured(name, schedule)[0]
    assert activation_bytes(profile.ops(schedule), profile) == pytest.approx(peak, abs=buffer_bytes(name))


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=20)
@given(data=st.data())
def test_peak_bytes_with_recompute_are_near(name, data):
    schedule = any_schedule(name, data, recompute=True)
    profile = profiled(name)[2]
    peak = measured(name, schedule)[0]
    assert activation_bytes(profile.ops(schedule), profile) == pytest.approx(peak, rel=RECOMPUTED)


@pytest.mark.parametrize("name", MASKED)
@settings(max_examples=6)
@given(data=st.data())
def test_peak_bytes_of_models_with_masks_of_their_own_are_near(name, data):
    schedule = any_schedule(name, data, recompute=data.draw(st.booleans()))
    profile = profiled(name)[2]
    peak = measured(name, schedule)[0]
    tolerance = RECOMPUTED if schedule.recompute else OWN_MASKS
    assert activation_bytes(profile.ops(schedule), profile) == pytest.approx(peak, rel=tolerance)


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
@settings(max_examples=15)
@given(data=st.data())
def test_the_trace_is_the_tracker_s_after_every_operation(name, data):
    schedule = any_schedule(name, data, recompute=False)
    profile = profiled(name)[2]
    trace = list(memory_trace(profile.ops(schedule), profile))
    live = measured(name, schedule, observe=True)[2]
    pairs = list(zip(profile.ops(schedule), live, strict=True))
    assert [(moment.op, moment.live_bytes) for moment in trace] == pairs


@pytest.mark.parametrize("name", [*EXACT, *MASKED])
@settings(max_examples=10)
@given(data=st.data())
def test_flops_are_those_dispatched(name, data):
    schedule = any_schedule(name, data, recompute=data.draw(st.booleans()))
    assert step_flops(schedule, profiled(name)[2]) == measured(name, schedule)[1]


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_step_bytes_of_every_horizon_and_stride_are_the_memory_probe_s(name):
    chain, batch, profile = profiled(name)
    every = range(1, chain.depth + 1)
    samples = [s for h in every for s in probes.memory(chain, [batch], [h], range(1, h + 1), torch.optim.SGD)]
    base = probes.profile(chain, batch, torch.optim.SGD, repeats=0)
    profile = replace(profile, base_bytes=base.base_bytes, update_bytes=base.update_bytes)
    predicted = [step_bytes(Schedule.horizon(chain.depth, s.horizon, s.stride), profile) for s in samples]
    assert len(samples) == chain.depth * (chain.depth + 1) // 2
    assert predicted == pytest.approx([s.value for s in samples], abs=buffer_bytes(name))


@pytest.mark.parametrize("make", [torch.optim.SGD, lambda p: torch.optim.Adam(p, foreach=True)])
def test_step_bytes_follow_the_optimiser(make):
    model, batch = mlp()
    chain = Chain.from_model(model, batch)
    profile = probes.profile(chain, batch, make, repeats=0)
    for sample in probes.memory(chain, [batch], [1, 3, DEPTH], (1, "horizon"), make):
        assert step_bytes(Schedule.horizon(DEPTH, sample.horizon, sample.stride), profile) == sample.value


@pytest.mark.parametrize("make", [mlp, cnn, transformer])
def test_one_window_needs_what_back_propagation_needs(make):
    """Within one state and 3 %: a pull holds the cotangent of its block until it is done."""
    model, (x, y) = make()
    batch = x.repeat(32, *[1] * (x.ndim - 1)), y.repeat(32)
    chain = Chain.from_model(model, batch)
    profile = probes.profile(chain, batch, repeats=0)
    with LiveBytes() as tracker:
        chain.loss(batch).backward()
    predicted = activation_bytes(profile.ops(Schedule.exact(chain.depth)), profile)
    assert 0.97 * tracker.peak <= predicted <= 1.03 * tracker.peak + max(profile.state)


def peaks(depth, horizon):
    """Peak of the activations and gradients of one execution, and the gradients' bytes."""
    model = ResidualMLP(6, 16, 3, depth)
    batch = torch.randn(64, 6), torch.randint(0, 3, (64,))
    chain = Chain.from_model(model, batch)
    with LiveBytes() as tracker:
        execute(chain, batch, Schedule.horizon(depth, horizon).ops(True))
    return tracker.peak, sum(tracker.bytes_of(p.grad) for p in model.parameters())


def test_no_prefix_graph_is_built_at_a_short_horizon():
    (short, grads), (deep, more_grads) = peaks(4, 1), peaks(16, 1)
    assert deep - short <= more_grads - grads
    (short, _), (deep, _) = peaks(4, 4), peaks(16, 16)  # the control: back-propagation does keep every graph
    assert deep - short > 12 * 64 * 16 * 4 + more_grads - grads


def test_what_is_frozen_has_no_gradient_and_no_graph_below_it():
    whole, below = profiled("mlp")[2], profiled("frozen_below")[2]
    schedule = Schedule.exact(DEPTH)
    assert activation_bytes(below.ops(schedule), below) < activation_bytes(whole.ops(schedule), whole)
    assert step_flops(schedule, below) < step_flops(schedule, whole)
    assert below.trainable == (False, False, *[True] * (DEPTH - 2))
    assert not below.stem_trains


def test_seconds_are_the_sum_of_what_was_timed_or_unknown():
    profile = profiled("mlp")[2]
    schedule = Schedule.exact(DEPTH)
    even = replace(profile, seconds=dict.fromkeys(profile.seconds, 1.0), update_seconds=0.5)
    timed = [op for op in profile.ops(schedule) if not isinstance(op, Drop)]
    assert step_seconds(schedule, even) == len(timed) + 0.5
    assert step_seconds(schedule, replace(profile, seconds={})) is None
    every = [Schedule.horizon(DEPTH, h, s, k) for h in range(1, DEPTH + 1) for s in (1, h) for k in (0, 1, 2)]
    assert all(step_seconds(s, profile) > 0 for s in every)


def test_a_profile_is_of_its_batch_s_size():
    model, (x, y) = mlp()
    chain = Chain.from_model(model, (x, y))
    small = probes.profile(chain, (x[:4], y[:4]), repeats=0)
    large = probes.profile(chain, (x, y), repeats=0)
    assert large.state == tuple(2 * size for size in small.state)
    assert step_flops(Schedule.exact(DEPTH), large) == 2 * step_flops(Schedule.exact(DEPTH), small)


def test_a_block_by_hand():
    """Depth 2, one linear layer of width 3 a block on 5 rows, no head: every byte by hand."""
    rows, width, size = 5, 3, 4
    chain = Chain(None, [nn.Linear(width, width, bias=False) for _ in range(2)], None, nn.MSELoss())
    batch = torch.randn(rows, width), torch.randn(rows, width)
    profile = probes.profile(chain, batch, torch.optim.SGD, repeats=0)
    state, weight = rows * width * size, width * width * size
    assert profile.state == (0, state, state)  # x(0) is the batch itself
    assert profile.cotangent[1:] == (state, state)
    assert profile.graph == (0, 0)  # a linear layer keeps its input, which is a state
    assert [[size for _, size in profile.gradients[t]] for t in range(2)] == [[weight], [weight]]
    assert profile.base_bytes == 2 * weight + 2 * state


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_frozen_bytes_and_flops_are_exact(seed):
    torch.manual_seed(seed)
    model, batch = mlp()
    for p in model.parameters():
        p.requires_grad_(bool(torch.rand(()) < 0.4))
    next(iter(model.parameters())).requires_grad_(seed % 2 == 0)
    list(model.parameters())[-1].requires_grad_()
    chain = Chain.from_model(model, batch)
    profile = probes.profile(chain, batch, repeats=0)
    for h in range(1, chain.depth + 1):
        for stride, recompute in ((1, 0), (h, 0), (h, 2)):
            schedule = Schedule.horizon(chain.depth, h, stride, recompute)
            with LiveBytes() as tracker, Flops() as counter:
                execute(chain, batch, profile.ops(schedule))
            model.zero_grad(set_to_none=True)
            assert step_flops(schedule, profile) == counter.total
            assert activation_bytes(profile.ops(schedule), profile) == pytest.approx(
                tracker.peak, rel=0.02 * (recompute > 0)
            )
