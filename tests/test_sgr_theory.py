"""What the paper of SGR claims: its propositions, its frames and their gradient, its diagnostic (Figure 3)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sgr_cases import MODELS, assert_close, built, own, prepared
from torch import nn
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.algorithms import SimplexETF, etf, heads, input_effects, reconcile
from horizonplan.models import ResidualMLP


def linear_chain(depth=4, width=5):
    """Linear blocks, and a head for each state such that all local losses are one function of the input."""
    torch.manual_seed(1)
    blocks = [nn.Linear(width, width, bias=False).double() for _ in range(depth)]
    head = nn.Linear(width, 3, bias=False).double()
    chain = hp.Chain(None, blocks, head, nn.CrossEntropyLoss())
    weights = [head.weight.detach()]
    for block in reversed(blocks[1:]):
        weights.insert(0, weights[0] @ block.weight.detach())

    def factory(place):
        made = nn.Linear(width, 3, bias=False).double()
        made.weight.data.copy_(weights[place.module])
        return made

    return chain, factory, (torch.randn(6, width, dtype=torch.float64), torch.arange(6) % 3)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_where_all_plain_regularisers_are_zero_the_gradient_is_back_propagations(weight):
    """Proposition 3.4."""
    chain, factory, batch = linear_chain()
    method, auxiliary = prepared(chain, batch, 4, weight=weight, normalize=False, heads=factory)
    found = own(method, chain, auxiliary, batch)
    assert all(term < 1e-28 for term in method.terms)
    exact = own(hp.algorithms.BackPropagation(), chain, None, batch)
    assert_close({p: g for p, g in found.items() if p in exact}, exact, 1e-12)


def test_where_only_the_normalised_regularisers_are_zero_it_is_another_gradient():
    chain, factory, batch = linear_chain()

    def loud(output, target):
        return 2 * F.cross_entropy(output, target)

    method, auxiliary = prepared(chain, batch, 4, weight=1.0, heads=factory, loss=loud)
    found = own(method, chain, auxiliary, batch)
    assert all(abs(term) < 1e-15 for term in method.terms)
    exact = own(hp.algorithms.BackPropagation(), chain, None, batch)
    torch.testing.assert_close(found[chain.blocks[0].weight], 2 * exact[chain.blocks[0].weight])


def two_linear_layers(seed, features=12, classes=4, rate=1e-2):
    """Proposition 3.5's model after one step, with the regulariser's part of it once as descent, once as Eq. 30 has it.

    The matrices carry one frame nearly onto itself, so that the regulariser is small.
    """
    torch.manual_seed(seed)
    frame = etf.simplex(features, classes, torch.float64)
    x0, y = torch.randn(features, dtype=torch.float64), torch.randint(0, classes, ())
    first = torch.randn(features, features, dtype=torch.float64) / features**0.5
    second = torch.eye(features, dtype=torch.float64) + 0.05 * torch.randn_like(first) / features**0.5

    def error(x):
        return frame.T @ ((frame @ x).softmax(0) - F.one_hot(y, classes))

    x1 = first @ x0
    x2 = second @ x1
    d1, d2 = error(x1), error(x2)
    gap = second.T @ d2 - d1
    new = (first - rate * d1.outer(x0)) @ x0
    plain = second - rate * d2.outer(x1)
    loss = [
        F.cross_entropy(frame @ w @ new, y) for w in (plain, plain - rate * d2.outer(gap), plain + rate * d2.outer(gap))
    ]
    assert 0.5 * gap.square().sum() < 0.02
    grown = (frame @ x2)[y] > (frame @ x1)[y]
    return grown, d1 @ x1 - d2 @ x2, -gap @ new, loss


def test_proposition_3_5_numerically():
    """One step's loss falls by the regulariser if, and only if, it moves x2 against the frame's gradient.

    The step of Eq. 30 adds ``-rate d2 (d1 - W2' d2)'``, which climbs the regulariser; with it the proposition holds
    where its proof's inequality does, ``d2 x2 <= d1 x1``. For a descent, which Eq. 35 and Algorithm 1 make, it holds
    where that inequality is reversed.
    """
    found = [two_linear_layers(seed) for seed in range(300)]
    for _, order, push, (plain, descent, printed) in found:
        assert (descent < plain) == (push < 0)
        assert (printed < plain) == (push > 0)
        if abs(order) > 0.05:  # otherwise the terms that the proof leaves out decide
            assert (descent < plain) == (order < 0)
    assert sum(abs(order) > 0.05 for _, order, _, _ in found) > 80
    grown = [losses for grown, _, _, losses in found if grown]
    assert sum(printed < plain for plain, _, printed in grown) > 0.7 * len(grown)
    assert sum(descent < plain for plain, descent, _ in grown) < 0.3 * len(grown)


@given(st.integers(2, 12), st.integers(0, 20), st.integers(0, 1000))
def test_the_frame_is_equiangular(classes, more, seed):
    """Eq. 7."""
    torch.manual_seed(seed)
    frame = etf.simplex(classes - 1 + more, classes, torch.float64)
    wanted = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(frame @ frame.T, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(frame.sum(0), torch.zeros(classes - 1 + more, dtype=torch.float64), rtol=0, atol=1e-12)


def test_too_few_features_for_a_frame_are_refused():
    with pytest.raises(ValueError, match="features=3: 10 classes need 2 classes and 9 features"):
        SimplexETF(3, 10)


class ThroughAutograd(nn.Module):
    """A frame whose gradient is not a formula."""

    def __init__(self, frame):
        super().__init__()
        self.frame = frame

    def forward(self, state):
        return self.frame(state)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_the_formulas_gradient_is_autograds(name, weight):
    chain, batch = built(name)
    if name == "gpt":
        batch[1][0, 2] = -100  # does not count
    torch.manual_seed(5)
    method, frames = prepared(chain, batch, 3, weight=weight, heads="etf", split="blocks")
    assert not list(frames.parameters())
    found = own(method, chain, frames, batch)
    torch.manual_seed(5)
    other, wrapped = prepared(
        chain, batch, 3, weight=weight, heads=lambda p: ThroughAutograd(heads.fixed(p)), split="blocks"
    )
    assert all(torch.equal(a.weight, b.frame.weight) for a, b in zip(frames, wrapped, strict=True))
    assert_close(found, own(other, chain, wrapped, batch))
    torch.testing.assert_close(torch.stack(method.local_losses), torch.stack(other.local_losses))


def test_a_frames_precision_is_the_models():
    chain, batch = built("mlp")
    _, (frame,) = prepared(chain, batch, 2, heads="etf")
    assert frame.weight.dtype == torch.float64
    wanted = (4 * torch.eye(4, dtype=torch.float64) - 1) / 3
    torch.testing.assert_close(frame.weight @ frame.weight.T, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("zero", [False, True])
def test_frames_are_refused_where_the_models_loss_is_another(zero):
    """At a final layer of zeros, smoothing of the labels does not show in the loss itself."""
    torch.manual_seed(0)
    model, batch = ResidualMLP(20, 16, 4, depth=4), (torch.randn(8, 20), torch.arange(8) % 4)
    if zero:
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
    chain = hp.Chain.from_model(model, batch, loss=nn.CrossEntropyLoss(label_smoothing=0.3))
    with pytest.raises(ValueError, match="heads='etf': a frame's loss is the cross-entropy"):
        prepared(chain, batch, 2, heads="etf")
    with pytest.raises(ValueError, match="loss: frames have a loss of their own"):
        prepared(chain, batch, 2, heads=heads.fixed, loss=F.cross_entropy)
    chain = hp.Chain.from_model(ResidualMLP(20, 16, 4, depth=4), (batch[0], torch.randn(8, 4)))
    with pytest.raises(ValueError, match=r"heads='etf': the frame classifies, and got targets \(8, 4\)"):
        prepared(chain, (batch[0], torch.randn(8, 4)), 2, heads="etf")


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_frames_loss_is_the_same_trained_and_measured(weight):
    chain, batch = built("mlp")
    method, _ = prepared(chain, batch, 3, heads="etf", weight=weight)
    method.backward(chain, batch)
    assert [loss.item() for loss in method.local_losses] == method.losses_on(chain, batch)


def test_a_gradient_of_zero_is_in_no_direction():
    now = torch.tensor([[0.0, 0, 0], [3.0, 0, 0], [0, 0, 0]], requires_grad=True)
    value = reconcile.distance(now, torch.tensor([[1.0, 2, 2], [0, 0, 0], [0, 0, 0]]), normalize=True)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(2 / 9))  # a unit vector in two of three samples of three features
    assert torch.equal(now.grad, torch.zeros_like(now))  # against zero, each row is as far in any direction


@pytest.mark.parametrize("size", [1e-12, 1e-20, 1e-30])
def test_the_size_of_a_gradient_does_not_matter_to_its_direction(size):
    now = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for other in (1.0, size):
        small = (now * size).float().requires_grad_()
        value = reconcile.distance(small, (before * other).float(), normalize=True)
        torch.testing.assert_close(value.double(), F.mse_loss(F.normalize(now), F.normalize(before)), rtol=1e-5, atol=0)
        value.backward()
        wanted = now.clone().requires_grad_()
        F.mse_loss(F.normalize(wanted), F.normalize(before)).backward()
        torch.testing.assert_close(small.grad.double() * size, wanted.grad, rtol=1e-4, atol=1e-6)


def test_the_distance_of_nearly_parallel_gradients_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(64, 512, dtype=torch.float64, generator=generator)
    now = before + 1e-4 * torch.randn(64, 512, dtype=torch.float64, generator=generator)
    wanted = F.mse_loss(F.normalize(now), F.normalize(before))
    found = reconcile.distance(now.float(), before.float(), normalize=True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=0)
    assert all(
        reconcile.distance(before.float(), times * before.float(), normalize=True) >= 0 for times in range(1, 20)
    )


@pytest.mark.parametrize("heads", ["light", "etf"])
def test_a_final_layer_that_starts_at_zero_gets_its_losss_gradient(heads):
    """Its first gradient is in no direction, so the regulariser adds nothing to it."""
    torch.manual_seed(0)
    model, batch = ResidualMLP(20, 16, 4, depth=4), (torch.randn(8, 20), torch.arange(8) % 4)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    chain = hp.Chain.from_model(model, batch)
    method, _ = prepared(chain, batch, 2, heads=heads)
    method.backward(chain, batch)
    wanted = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), [model.head.weight])
    torch.testing.assert_close(model.head.weight.grad, *wanted)


def test_the_effect_of_earlier_updates_on_each_module():
    """Figure 3's diagnostic, for updates whose effect is known."""
    chain, batch = built("mlp")
    method, auxiliary = prepared(chain, batch, 3, split="blocks")
    first, last = chain.blocks[0].linear.weight, chain.blocks[5].linear.weight
    buffers = {n: v.clone() for n, v in chain.model.state_dict().items()}

    def moved(*parameters):
        def update():
            with torch.no_grad():
                for p in parameters:
                    p.add_(0.1)

        return update

    assert input_effects(method, chain, batch, lambda: None) == [0, 0]
    assert input_effects(method, chain, batch, moved(last, *auxiliary.parameters())) == [0, 0]
    before = method.losses_on(chain, batch)
    found = input_effects(method, chain, batch, moved(first))
    after = method.losses_on(chain, batch)
    assert found == [after[1] - before[1], after[2] - before[2]]
    assert all(abs(effect) > 1e-6 for effect in found)
    wanted = {n: v + 0.1 * (n in ("blocks.0.linear.weight", "blocks.5.linear.weight")) for n, v in buffers.items()}
    assert all(torch.equal(v, wanted[n]) for n, v in chain.model.state_dict().items())


def test_running_statistics_of_a_module_are_no_effect_of_those_before_it():
    """Module 1 of a network in evaluation sees other statistics; its input is the same."""
    chain, batch = built("cnn")
    method, _ = prepared(chain, batch, 2, split=[3])
    chain.model.eval()

    def update():
        for block in list(chain.blocks)[3:]:
            for buffer in block.buffers():
                buffer.add_(1)

    before = method.losses_on(chain, batch)
    assert input_effects(method, chain, batch, update) == [0]
    assert method.losses_on(chain, batch)[1] != before[1]


def test_the_effect_on_modules_that_share_a_weight_is_refused():
    chain, batch = built("mlp")
    chain.blocks[5].linear.weight = chain.blocks[0].linear.weight
    chain = hp.Chain.from_model(chain.model, batch)
    method, _ = prepared(chain, batch, 2, split="blocks")
    with pytest.raises(ValueError, match="modules share parameters"):
        input_effects(method, chain, batch, lambda: None)
