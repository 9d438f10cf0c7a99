"""``horizon_backward`` on chains built by hand: the definition's gradient, ``loss.backward()``'s side effects."""

import re
from collections import Counter
from itertools import pairwise

import oracle
import pytest
import torch
from families import ResidualMLP, classes, residual_mlp, tied
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import schedules
from torch import nn
from torch.nn import functional as F

from horizonplan.chain import Chain
from horizonplan.gradient import horizon_backward
from horizonplan.schedule import Pull, Schedule

EXACT = 1e-10


class Parts:
    """Stem, blocks, head and loss, with a batch: what both the library and the oracle are given."""

    def __init__(self, stem, blocks, head, batch, loss=F.cross_entropy):
        self.stem, self.blocks, self.head, self.batch, self.loss = stem, blocks, head, batch, loss
        self.chain = Chain(stem, blocks, head, loss)
        self.chain.model.double()

    def wanted(self, schedule, seed=7):
        def own():
            found = oracle.gradients(self.stem, self.blocks, self.head, self.loss, self.batch, schedule.windows)
            for p, grad in found.items():
                p.grad = grad
            return torch.zeros(())

        return oracle.step(own, self.chain.model, seed)[1]

    def found(self, *args, seed=7, **kwargs):
        return oracle.step(lambda: horizon_backward(self.chain, self.batch, *args, **kwargs), self.chain.model, seed)


def mlp(depth=5):
    widths = [6, 6, 8, 8, 5, 5, 7, 7, 4][: depth + 1]
    blocks = [nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Dropout(0.2)) for a, b in pairwise(widths)]
    batch = torch.randn(4, 3).double(), classes(4)
    return Parts(nn.Linear(3, 6), blocks, nn.Sequential(nn.Dropout(0.2), nn.Linear(widths[depth], 3)), batch)


def cnn():
    def block(wide, wider, *first, last=nn.ReLU):
        return nn.Sequential(
            *first, nn.Conv2d(wide, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider), last(True)
        )

    pooled = block(4, 6, nn.MaxPool2d(2), last=nn.Identity)  # the next block overwrites its input
    blocks = [block(3, 4), block(4, 4), pooled, block(6, 6, nn.ReLU(True)), block(6, 8, nn.AvgPool2d(2))]
    head = nn.Sequential(nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return Parts(None, blocks, head, (torch.randn(4, 3, 8, 8).double(), classes(4)))


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 8), nn.Parameter(torch.randn(6, 8))

    def forward(self, ids):
        return self.tokens(ids) + self.positions


def transformer():
    blocks = [nn.TransformerEncoderLayer(8, 2, 12, 0.1, batch_first=True) for _ in range(4)]
    head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 20))
    ids = torch.randint(0, 20, (3, 6))
    return Parts(Embedding(), blocks, head, (ids, ids), lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()))


def tied_mlp():
    parts = mlp(3)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)]
    for block in blocks[1:]:
        block[0].weight = blocks[0][0].weight
    head = nn.Linear(6, 6)
    head.weight = blocks[0][0].weight
    stem = nn.Linear(6, 6)
    stem.bias = head.bias
    return Parts(stem, blocks, head, (torch.randn(4, 6).double(), classes(4)), parts.loss)


MODELS = [mlp, cnn, transformer, tied_mlp]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_gradient_equals_the_definition_at_every_horizon(make, recompute):
    parts = make()
    depth = parts.chain.depth
    for h in range(1, depth + 1):
        for s in {1, min(2, h), h}:
            _, found = parts.found(h, s, recompute)
            oracle.assert_same_gradients(found, parts.wanted(Schedule.horizon(depth, h, s)), EXACT)


@pytest.mark.parametrize("make", MODELS)
def test_gradient_of_loco_and_local_schedules_equals_the_definition(make):
    parts = make()
    depth = parts.chain.depth
    for n in range(1, depth + 1):
        for schedule in (Schedule.local(depth, n), Schedule.loco(depth, n), Schedule.loco(depth, n, summed=True)):
            _, found = parts.found(schedule)
            oracle.assert_same_gradients(found, parts.wanted(schedule), EXACT)


@settings(max_examples=60)
@given(schedule=schedules(max_depth=6), seed=st.integers(0, 3))
def test_gradient_of_any_windows_equals_the_definition(schedule, seed):
    torch.manual_seed(seed)
    parts = mlp(schedule.depth)
    _, found = parts.found(schedule)
    oracle.assert_same_gradients(found, parts.wanted(schedule), EXACT)


@settings(max_examples=30)
@given(schedule=schedules(max_depth=4, min_depth=4))
def test_gradient_of_any_windows_equals_the_definition_with_tied_weights(schedule):
    parts = tied_mlp()
    _, found = parts.found(schedule)
    oracle.assert_same_gradients(found, parts.wanted(schedule), EXACT)


@settings(max_examples=30)
@given(schedule=schedules(max_depth=5), data=st.data())
def test_gradient_of_any_windows_equals_the_definition_with_frozen_blocks(schedule, data):
    parts = mlp(schedule.depth)
    modules = [parts.stem, *parts.blocks, parts.head]
    frozen = data.draw(
        st.lists(st.booleans(), min_size=len(modules), max_size=len(modules)).filter(lambda f: not all(f))
    )
    for module, freeze in zip(modules, frozen, strict=True):
        module.requires_grad_(not freeze)
    _, found = parts.found(schedule)
    oracle.assert_same_gradients(found, parts.wanted(schedule), EXACT)


def test_appendix_a_is_reproduced_by_hand():
    """f_t(x) = x + relu(W_t x + b_t), t = 0..4, L = MSE: g_h(u(t)) is the gradient of L(x(min(t + h, 5)))."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return x + torch.relu(self.linear(x))

    blocks = [Block() for _ in range(5)]
    x, y = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    parts = Parts(None, blocks, None, (x, y), F.mse_loss)
    for h in (1, 3, 5):
        with torch.no_grad():
            states = [x]
            for block in blocks:
                states.append(block(states[-1]))
        wanted = {}
        for t in range(5):
            end = min(t + h, 5)
            # forward from x(t), each step by its formula
            z, pre = [states[t]], []
            for block in blocks[t:end]:
                pre.append(z[-1] @ block.linear.weight.T.detach() + block.linear.bias.detach())
                z.append(z[-1] + pre[-1].clamp(min=0))
            # backward, each step by its formula
            cotangent = 2 * (z[-1] - y) / y.numel()
            for block, a in zip(reversed(blocks[t + 1 : end]), reversed(pre[1:]), strict=True):
                cotangent = cotangent + (cotangent * (a > 0)) @ block.linear.weight.detach()
            delta = cotangent * (pre[0] > 0)
            wanted[f"blocks.{t}.linear.weight"], wanted[f"blocks.{t}.linear.bias"] = delta.T @ z[0], delta.sum(0)
        loss, found = parts.found(h)
        oracle.assert_same_gradients(found, wanted, EXACT)
        torch.testing.assert_close(loss, F.mse_loss(states[5], y))


@pytest.mark.parametrize("make", MODELS)
def test_full_horizon_is_back_propagation_bit_for_bit(make):
    parts = make()
    loss, wanted = oracle.back_propagation(parts.chain, parts.batch)
    for recompute in (0, 1, 2):
        found_loss, found = parts.found(parts.chain.depth, recompute=recompute)
        assert torch.equal(found_loss, loss)
        oracle.assert_same_gradients(found, wanted)


@pytest.mark.parametrize("make", MODELS)
def test_every_horizon_returns_the_same_terminal_loss_and_moves_buffers_and_generator_alike(make):
    parts = make()
    model, depth = parts.chain.model, parts.chain.depth
    start = {n: b.clone() for n, b in model.named_buffers()}

    def outcome(function):
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(start[n])
        torch.manual_seed(7)
        loss = function()
        return [loss.detach(), torch.get_rng_state(), *(b.clone() for b in model.buffers())]

    wanted = outcome(lambda: parts.chain.loss(parts.batch))
    for h in range(1, depth + 1):
        for s in {1, h}:
            for recompute in (0, 1):
                found = outcome(lambda h=h, s=s, k=recompute: horizon_backward(parts.chain, parts.batch, h, s, k))
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_recomputing_starts_from_the_buffers_of_the_first_run(norm):
    """A spectral norm's vectors move in every training forward: a second one would see other weights."""
    blocks = [nn.Sequential(norm(nn.Linear(6, 6)), nn.Tanh()) for _ in range(4)]
    parts = Parts(None, blocks, nn.Linear(6, 3), (torch.randn(4, 6).double(), classes(4)))
    _, wanted = oracle.back_propagation(parts.chain, parts.batch)
    for recompute in (0, 1, 2):
        oracle.assert_same_gradients(parts.found(4, recompute=recompute)[1], wanted)
        oracle.assert_same_gradients(parts.found(2, recompute=recompute)[1], parts.found(2)[1])


@pytest.mark.parametrize("scale", [0.5, 8, torch.tensor(3.0)])
def test_scale_multiplies_the_gradient_and_not_the_loss(scale):
    parts = mlp()
    loss, plain = parts.found(2)
    scaled_loss, scaled = parts.found(2, scale=scale)
    assert torch.equal(loss, scaled_loss)
    oracle.assert_same_gradients(scaled, {n: g * scale for n, g in plain.items()}, 1e-12)


@pytest.mark.parametrize("make", [mlp, tied_mlp])
def test_two_calls_accumulate_the_sum(make):
    parts = make()
    chain, batch = parts.chain, parts.batch
    _, first = parts.found(2, seed=1)
    _, second = parts.found(3, 2, seed=2)

    def both():
        horizon_backward(chain, batch, 2)
        before = {n: p.grad for n, p in chain.model.named_parameters()}
        torch.manual_seed(2)
        loss = horizon_backward(chain, batch, 3, 2)
        assert all(p.grad is before[n] for n, p in chain.model.named_parameters()), "the gradient is added in place"
        return loss

    _, found = oracle.step(both, chain.model, seed=1)
    oracle.assert_same_gradients(found, {n: first[n] + second[n] for n in first}, 1e-12)


@pytest.mark.parametrize("make", [mlp, cnn])
def test_each_block_runs_once_and_once_more_for_each_window_that_recomputes_it(make):
    parts = make()
    depth = parts.chain.depth
    horizon_backward(parts.chain, parts.batch, 1)  # a batch signature's first step may look up shapes
    for h in range(1, depth + 1):
        for s in {1, h}:
            for recompute in (0, 1, 2):
                schedule = Schedule.horizon(depth, h, s, recompute)
                runs = count_forwards(
                    parts, lambda schedule=schedule: horizon_backward(parts.chain, parts.batch, schedule)
                )
                covers = Counter(t for w in schedule.windows for t in range(w.first, w.end)) if recompute else Counter()
                wanted = [1 + covers[t] for t in range(depth)]
                assert runs == {"hooks": wanted, "forwards": wanted}


def count_forwards(parts, function):
    """How often each block ran, seen by forward hooks and by its patched ``forward``."""
    runs = {"hooks": [0] * len(parts.blocks), "forwards": [0] * len(parts.blocks)}
    handles = []
    for t, block in enumerate(parts.blocks):

        def counted(*args, t=t, forward=block.forward, **kwargs):
            runs["forwards"][t] += 1
            return forward(*args, **kwargs)

        def hook(*_, t=t):
            runs["hooks"][t] += 1

        handles.append(block.register_forward_hook(hook))
        block.forward = counted
    try:
        function()
    finally:
        for block, handle in zip(parts.blocks, handles, strict=True):
            handle.remove()
            del block.forward
    return runs


@settings(max_examples=60)
@given(schedule=schedules(max_depth=8), stem_trains=st.booleans(), data=st.data())
def test_dispatched_flops_are_the_schedule_s_units(schedule, stem_trains, data):
    rows, width = 5, 4
    blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(schedule.depth)]
    stem = nn.LayerNorm(width) if stem_trains else None
    chain = Chain(stem, blocks, None, F.mse_loss)
    batch = torch.randn(rows, width), torch.randn(rows, width)
    frozen = data.draw(st.sets(st.integers(0, schedule.depth - 1), max_size=schedule.depth - (not stem_trains)))
    for t in frozen:
        blocks[t].requires_grad_(False)
    horizon_backward(chain, batch, 1)
    units = sum_units(schedule.ops(stem_trains, [t not in frozen for t in range(schedule.depth)]))
    assert oracle.flops(lambda: horizon_backward(chain, batch, schedule)) == units * 2 * rows * width * width
    if not frozen:
        assert units == schedule.units(stem_trains)


def sum_units(ops):
    return sum((op.weights + op.input) if isinstance(op, Pull) else type(op).__name__ in ("Run", "Rerun") for op in ops)


def test_frozen_early_blocks_get_no_gradient_and_cost_no_pulls():
    blocks = [nn.Linear(4, 4) for _ in range(6)]
    chain = Chain(nn.Linear(4, 4), blocks, None, F.mse_loss)
    batch = torch.randn(3, 4), torch.randn(3, 4)
    unit = 2 * 3 * 4 * 4
    assert oracle.flops(lambda: horizon_backward(chain, batch, 6)) == (7 + 6 * 2 + 1) * unit
    for module in (chain.model.stem, *blocks[:4]):
        module.requires_grad_(False)
    assert oracle.flops(lambda: horizon_backward(chain, batch, 6)) == (7 + 2 + 1) * unit
    chain.model.zero_grad()
    horizon_backward(chain, batch, 6)
    assert [p.grad is not None for b in blocks for p in b.parameters()] == [False] * 8 + [True] * 4


@pytest.mark.parametrize(
    "schedule", [Schedule.horizon(4, 1), Schedule.horizon(4, 2), Schedule.exact(4), Schedule.loco(4, 3, True)]
)
@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("make", [transformer, tied_mlp])
def test_hooks_fire_once_a_parameter_and_step(make, schedule, recompute):
    parts = make()
    parameters = dict(parts.chain.model.named_parameters())
    after, tensor = Counter(), {}
    for n, p in parameters.items():
        p.register_post_accumulate_grad_hook(lambda _, n=n: after.update([n]))
        p.register_hook(lambda grad, n=n: tensor.setdefault(n, []).append(grad.clone()))
    _, found = parts.found(Schedule(4, schedule.windows, recompute))
    assert after == Counter(dict.fromkeys(parameters, 1))
    assert {n: len(grads) for n, grads in tensor.items()} == dict.fromkeys(parameters, 1)
    oracle.assert_same_gradients(found, {n: grads[0] for n, grads in tensor.items()})


def test_a_tensor_hook_changes_the_gradient_as_in_backward():
    parts = tied_mlp()
    _, plain = parts.found(2)
    parts.chain.model.blocks[0][0].weight.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    _, found = parts.found(2)
    assert plain["blocks.0.0.weight"].abs().max() > 1e-3
    oracle.assert_same_gradients(found, plain | {"blocks.0.0.weight": plain["blocks.0.0.weight"].clamp(-1e-3, 1e-3)})


@pytest.mark.parametrize("make", [mlp, cnn, transformer, tied_mlp])
@pytest.mark.parametrize("h", [1, 2, 4])
def test_an_optimiser_fused_into_hooks_ends_at_the_same_weights(make, h):
    torch.manual_seed(5)
    plain = make()
    torch.manual_seed(5)
    fused = make()
    optimiser = torch.optim.Adam(plain.chain.parameters(), lr=0.01)
    each = {p: torch.optim.Adam([p], lr=0.01) for p in fused.chain.parameters()}

    def update(p):
        each[p].step()
        each[p].zero_grad()

    for p in each:
        p.register_post_accumulate_grad_hook(update)
    for seed in range(3):
        torch.manual_seed(seed)
        optimiser.zero_grad()
        horizon_backward(plain.chain, plain.batch, h)
        optimiser.step()
        torch.manual_seed(seed)
        horizon_backward(fused.chain, fused.batch, h)
    for a, b in zip(plain.chain.parameters(), fused.chain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in each)


def single(make):
    parts = make()
    parts.chain.model.float()
    parts.batch = tuple(x.float() if x.is_floating_point() else x for x in parts.batch)
    return parts


@pytest.mark.parametrize("make", [mlp, cnn, transformer])
def test_full_horizon_under_autocast_is_backward_after_an_autocast_forward(make):
    parts = single(make)

    def own():
        with torch.autocast("cpu", torch.bfloat16):
            loss = parts.chain.loss(parts.batch)
        loss.backward()
        return loss

    def horizon(**kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return horizon_backward(parts.chain, parts.batch, parts.chain.depth, **kwargs)

    loss, wanted = oracle.step(own, parts.chain.model)
    for kwargs in ({}, {"recompute": 1}, {"recompute": 2}):
        found_loss, found = oracle.step(lambda kwargs=kwargs: horizon(**kwargs), parts.chain.model)
        assert torch.equal(found_loss, loss)
        oracle.assert_same_gradients(found, wanted)


@pytest.mark.parametrize("make", [mlp, cnn, transformer])
@pytest.mark.parametrize(("h", "s"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_recomputing_changes_nothing_under_autocast(make, h, s):
    parts = single(make)
    with torch.autocast("cpu", torch.bfloat16):
        loss, plain = parts.found(h, s)
        for recompute in (1, 2):
            again, found = parts.found(h, s, recompute)
            assert torch.equal(loss, again)
            oracle.assert_same_gradients(found, plain)
    assert all(g.dtype == torch.float32 for g in plain.values())
    reference = parts.found(h, s)[1]
    here, there = (torch.cat([g[n].flatten() for n in sorted(g)]) for g in (plain, reference))
    assert 0.9 < torch.cosine_similarity(here, there, 0) < 1 - 1e-7, "autocast has an effect, and a small one"


def test_autocast_inside_compute_loss_is_autocast_around_the_step():
    torch.manual_seed(2)
    model = ResidualMLP()
    batch = torch.randn(6, 4), classes(6)

    def compute(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(batch[0]), batch[1])

    inside = Chain.from_model(model, batch, compute_loss=compute)
    outside = Chain.from_model(model, batch)
    for h, s, recompute in ((5, 1, 0), (5, 1, 1), (1, 1, 0), (2, 1, 1), (2, 2, 0)):
        loss, found = oracle.step(lambda: horizon_backward(inside, batch, h, s, recompute), model)  # noqa: B023
        with torch.autocast("cpu", torch.bfloat16):
            wanted_loss, wanted = oracle.step(lambda: horizon_backward(outside, batch, h, s, recompute), model)  # noqa: B023
        assert torch.equal(loss, wanted_loss)
        oracle.assert_same_gradients(found, wanted)


def test_gradients_are_taken_under_an_outer_no_grad_too():
    parts = mlp()
    _, wanted = parts.found(2)
    with torch.no_grad():
        loss, found = parts.found(2)
        assert not torch.is_grad_enabled()
    assert not loss.requires_grad
    oracle.assert_same_gradients(found, wanted)


def test_eval_mode_uses_running_statistics_and_no_dropout():
    parts = cnn()
    parts.chain.model.eval()
    before = [b.clone() for b in parts.chain.model.buffers()]
    oracle.assert_same_gradients(parts.found(2, seed=1)[1], parts.found(2, seed=2)[1])
    assert all(torch.equal(a, b) for a, b in zip(before, parts.chain.model.buffers(), strict=True))
    _, wanted = oracle.back_propagation(parts.chain, parts.batch)
    oracle.assert_same_gradients(parts.found(5)[1], wanted)
    assert not parts.chain.model.training


def test_a_projection_of_the_user_s_is_used():
    calls = []

    def mean(state, shape):
        calls.append((tuple(state.shape), shape))
        return state.mean((1, 2, 3), keepdim=True).expand(shape)

    parts = cnn()
    parts.chain = Chain(parts.stem, parts.blocks, parts.head, parts.loss, projection=mean)
    _, found = parts.found(1)
    assert calls == [((4, c, side, side), (4, 8, 2, 2)) for c, side in [(4, 8), (4, 8), (6, 4), (6, 4)]]

    def own():
        windows = Schedule.horizon(5, 1).windows
        for p, grad in oracle.gradients(None, parts.blocks, parts.head, parts.loss, parts.batch, windows, mean).items():
            p.grad = grad
        return torch.zeros(())

    oracle.assert_same_gradients(found, oracle.step(own, parts.chain.model)[1], EXACT)


def fingerprint(chain):
    """All that a step must leave as it was: dictionaries, identities, hooks, modes, flags."""
    model = chain.model
    modules = [(id(m), list(vars(m)), list(m._modules), m.training) for m in model.modules()]
    tensors = [(id(p), p.requires_grad, p.data_ptr()) for p in (*model.parameters(), *model.buffers())]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    state = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    grads = [None if p.grad is None else (id(p.grad), p.grad.clone().numpy().tobytes()) for p in model.parameters()]
    return {"modules": modules, "tensors": tensors, "hooks": hooks, "state": state, "grads": grads}


@pytest.mark.parametrize("make", MODELS)
def test_a_step_leaves_nothing_behind_but_gradients(make):
    parts = make()
    horizon_backward(parts.chain, parts.batch, 1)
    before = fingerprint(parts.chain)
    for h, recompute in ((1, 0), (2, 1), (3, 0)):
        horizon_backward(parts.chain, parts.batch, h, recompute=recompute)
        after = fingerprint(parts.chain)
        assert {k: v for k, v in after.items() if k != "grads"} == {k: v for k, v in before.items() if k != "grads"}
    assert not any("_compiled_call_impl" in vars(m) for m in parts.chain.model.modules())


class Fails(nn.Module):
    """Raises when it is told to."""

    def __init__(self):
        super().__init__()
        self.linear, self.on = nn.Linear(6, 6), False

    def forward(self, x):
        if self.on:
            raise RuntimeError("told to fail")
        return self.linear(x)


@pytest.mark.parametrize("h", [1, 2, 4])
@pytest.mark.parametrize("where", ["stem", 0, 2, 3, "head", "loss", "scalar"])
def test_a_failed_step_leaves_nothing_behind(h, where):
    modules = {name: Fails() for name in ("stem", 0, 1, 2, 3, "head")}
    bad = {}

    def loss(output, target):
        if bad.get("loss"):
            raise RuntimeError("told to fail")
        return F.cross_entropy(output, target, reduction="none" if bad.get("scalar") else "mean")

    parts = Parts(
        modules["stem"], [modules[t] for t in range(4)], modules["head"], (torch.randn(4, 6), classes(4)), loss
    )
    parts.batch = parts.batch[0].double(), parts.batch[1]
    before = fingerprint(parts.chain)
    if where in modules:
        modules[where].on = True
    else:
        bad[where] = True
    with pytest.raises((RuntimeError, ValueError), match=r"told to fail|expected one floating-point scalar"):
        horizon_backward(parts.chain, parts.batch, h)
    for module in modules.values():
        module.on = False
    bad.clear()
    assert fingerprint(parts.chain) == before
    loss_after, found = parts.found(h)
    assert torch.isfinite(loss_after)
    oracle.assert_same_gradients(found, parts.wanted(Schedule.horizon(4, h)), EXACT)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"horizon": 0}, ["horizon=0", "between 1 and 5"]),
        ({"horizon": 6}, ["horizon=6", "between 1 and 5"]),
        ({"horizon": 2, "stride": 3}, ["stride=3", "between 1 and 2"]),
        ({"horizon": 2, "recompute": -1}, ["recompute=-1", ">= 0"]),
        ({"horizon": Schedule.exact(4)}, ["depth 4", "5 blocks"]),
    ],
)
def test_a_wrong_argument_is_refused_by_name_and_value(kwargs, words):
    parts = mlp()
    before = fingerprint(parts.chain)
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        horizon_backward(parts.chain, parts.batch, **kwargs)
    assert all(word in str(error.value) for word in words)
    assert fingerprint(parts.chain) == before


def test_a_wholly_frozen_model_is_refused():
    parts = mlp()
    parts.chain.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient; unfreeze one"):
        horizon_backward(parts.chain, parts.batch, 2)


def test_a_loss_that_is_no_scalar_is_refused_at_every_horizon():
    parts = mlp()
    chain = Chain(parts.stem, parts.blocks, parts.head, lambda o, y: F.cross_entropy(o, y, reduction="none"))
    for h in (1, 3, 5):
        with pytest.raises(ValueError, match=r"loss: expected one floating-point scalar, got shape \(4,\)"):
            horizon_backward(chain, parts.batch, h)


def test_a_loss_that_is_not_finite_is_returned_as_backward_would_leave_it():
    parts = mlp()
    batch = torch.full_like(parts.batch[0], float("nan")), parts.batch[1]
    assert torch.isnan(horizon_backward(parts.chain, batch, 2))
    assert all(p.grad is not None for p in parts.chain.parameters())


@pytest.mark.parametrize("case", [residual_mlp, tied])
def test_no_graph_survives_a_step(case):
    """Memory is flat over steps: nothing of a step is reachable once it has returned."""
    import gc
    import weakref

    made = case()
    chain = Chain.from_model(made.model, made.batch)
    alive = weakref.WeakSet()
    handles = [b.register_forward_hook(lambda m, i, o: alive.add(o)) for b in chain.blocks]
    gc.disable()
    try:
        for h, recompute in ((1, 0), (3, 0), (5, 1)):
            horizon_backward(chain, made.batch, h, recompute=recompute)
            assert len(alive) == 0
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()


def test_a_callable_head_trains_the_parameters_that_it_reads():
    torch.manual_seed(0)
    table = nn.Embedding(7, 4)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    batch = torch.randint(0, 7, (5, 2)), torch.randint(0, 7, (5, 2))
    chain = Chain(table, blocks, lambda z: z @ table.weight.T)
    for _ in range(2):  # the first step finds out, the second one knows
        horizon_backward(chain, batch, 3)
        got, table.weight.grad = table.weight.grad, None
        chain.loss(batch).backward()
        wanted, table.weight.grad = table.weight.grad, None
        torch.testing.assert_close(got, wanted)


def test_a_callable_stem_with_parameters_is_refused():
    table = nn.Embedding(7, 4)
    chain = Chain(lambda i: table(i), [nn.Linear(4, 4), nn.Linear(4, 4)], None)
    with pytest.raises(ValueError, match=r"stem: .* give it as an nn.Module"):
        horizon_backward(chain, (torch.randint(0, 7, (5,)), torch.randint(0, 4, (5,))), 2)
