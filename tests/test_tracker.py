"""The tracker against an accountant that is told of every tensor, and FLOPs against formulas written out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from horizonplan.probes import Flops, LiveBytes
from horizonplan.probes.tracker import own_bytes

FLOAT = 4


@given(st.lists(st.tuples(st.sampled_from(["make", "view", "in place", "read outside", "free"]), st.integers(0, 9))))
def test_live_and_peak_are_those_of_an_accountant_told_of_every_tensor(program):
    outside = torch.zeros(10)
    kept, accounts, live, peak = {}, {}, 0, 0
    with LiveBytes() as tracker:
        for number, (what, n) in enumerate(program):
            if what == "make":
                kept[number], accounts[number] = [torch.zeros(n + 1)], (n + 1) * FLOAT
            elif what == "read outside":
                kept[number], accounts[number] = [outside[: n + 1] * 2], (n + 1) * FLOAT
            elif kept:
                name = list(kept)[n % len(kept)]
                if what == "view":
                    kept[name].append(kept[name][-1].view(1, -1).t())
                elif what == "in place":
                    kept[name].append(kept[name][-1].mul_(2))
                else:
                    del kept[name], accounts[name]
            live = sum(accounts.values())
            peak = max(peak, live)
            assert (tracker.live, tracker.peak) == (live, peak)


def test_storages_from_outside_count_nothing_however_they_come_back():
    weight, batch = nn.Parameter(torch.ones(4)), torch.ones(4)
    weight.grad = torch.zeros(4)
    with LiveBytes() as tracker:
        views = [weight.detach(), weight.view(2, 2), batch[1:], batch.t(), batch.reshape(2, 2), batch.to(torch.float32)]
        weight.grad.add_(batch)
        batch.mul_(2)
        torch.add(batch, batch, out=batch)
        assert (tracker.live, tracker.peak) == (0, 0)
        assert [tracker.bytes_of(view) for view in views] == [0] * len(views)


def test_a_gradient_made_here_counts_and_one_made_before_does_not():
    weight = nn.Parameter(torch.ones(5))
    with LiveBytes() as tracker:
        weight.sum().backward()
        assert tracker.bytes_of(weight.grad) == tracker.live == 5 * FLOAT
    with LiveBytes() as tracker:
        weight.sum().backward()
        assert tracker.live == 0


def test_a_storage_lives_until_its_last_view_and_graph_let_go():
    weight = nn.Parameter(torch.ones(5))
    with LiveBytes() as tracker:
        product = weight * 3
        out = product.exp()
        view = product[:1]
        del product
        assert tracker.live == 2 * 5 * FLOAT  # exp keeps its result, the view keeps the product
        del view
        assert tracker.live == 5 * FLOAT
        grad_fn = out.grad_fn
        del out
        assert tracker.live == 5 * FLOAT  # the graph holds it
        del grad_fn
        assert tracker.live == 0
        assert tracker.peak == 2 * 5 * FLOAT


def test_the_peak_can_start_anew_and_the_call_before_the_next_operator_comes_once():
    seen = []
    with LiveBytes() as tracker:
        kept = torch.zeros(6)
        torch.zeros(100)
        tracker.reset_peak()
        tracker.before_next = lambda: seen.append(tracker.live)
        assert (tracker.peak, seen) == (0, [])
        more = torch.zeros(2)
        torch.zeros(1)
        assert (tracker.peak, seen) == ((6 + 2 + 1) * FLOAT, [6 * FLOAT])
        key = tracker.key_of(more)
        assert tracker.alive(key)
        del more
        assert not tracker.alive(key)
        assert kept.sum() == 0


def test_own_bytes_counts_a_storage_once_wherever_it_lies():
    storage = torch.zeros(10)
    nested = {"state": {"step": torch.zeros(()), "moment": storage}}
    assert own_bytes([storage, storage[2:]], nested, "no tensor", None) == 11 * FLOAT


def flops(function):
    with Flops() as counter:
        function()
    return counter.total


@pytest.mark.parametrize("input_too", [False, True])
def test_flops_of_a_linear_layer(input_too):
    batch, wide, out = 3, 5, 7
    layer, x = nn.Linear(wide, out), torch.randn(batch, wide, requires_grad=input_too)
    product = 2 * batch * wide * out  # a multiplication and an addition are two
    assert flops(lambda: layer(x)) == product
    assert flops(lambda: layer(x).sum().backward()) == product * (3 if input_too else 2)


@pytest.mark.parametrize("input_too", [False, True])
def test_flops_of_a_convolution(input_too):
    batch, channels, wider, side, kernel = 2, 3, 4, 8, 3
    layer = nn.Conv2d(channels, wider, kernel, stride=2, padding=1)
    x = torch.randn(batch, channels, side, side, requires_grad=input_too)
    places = batch * (side // 2) ** 2
    product = 2 * places * wider * channels * kernel**2
    assert flops(lambda: layer(x)) == product
    assert flops(lambda: layer(x).sum().backward()) == product * (3 if input_too else 2)


def test_flops_of_attention():
    batch, heads, length, width = 2, 3, 8, 16
    q, k, v = (torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3))
    product = 2 * batch * heads * length * length * width
    assert flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product  # scores, mixing
    # backward: the scores once more, the gradients of v, of the scores, of q and of k
    backward = flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) - 2 * product
    assert backward == 5 * product
