"""LocoProp against a slow transcription of the paper, and its properties."""

from functools import partial
from itertools import pairwise

import locoprop_oracle as oracle
import pytest
import torch
from scipy.integrate import quad
from torch import nn
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.algorithms import LocoProp, RMSProp, transfer
from horizonplan.algorithms.local_problem import Descent

VARIANTS = ["S", "M", "PocoS", "PocoM"]
MODULES = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
    "sigmoid": nn.Sigmoid,
    "softmax": partial(nn.Softmax, -1),
    "tanh": nn.Tanh,
    "softplus": partial(nn.Softplus, 2.0),
    "elu": partial(nn.ELU, 1.5),
}
TRANSFERS = [
    transfer.LINEAR,
    transfer.RELU,
    transfer.leaky_relu(0.2),
    transfer.SIGMOID,
    transfer.softmax(),
    transfer.TANH,
    transfer.ARCTAN,
    transfer.softplus(),
    transfer.softplus(2.0),
    transfer.elu(1.5),
]
SAMPLES = 7


def sgd(rate):
    return partial(torch.optim.SGD, lr=rate)


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (SAMPLES,), generator=generator)


def mlp(activation="tanh", width=4):
    torch.manual_seed(0)
    widths = [5, width, width, width]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), MODULES[activation]())]
    return nn.Sequential(*layers, nn.Linear(width, 3)).double()


def stepped(model, method, data):
    """A sequential model after one step; what has no local loss stays."""
    chain = hp.Chain(None, list(model), None)
    method.prepare(chain, data)
    method.step(chain, data, torch.optim.SGD(model.parameters(), lr=0.0))
    return model


def weights_of(model):
    """Weights with the bias as last column."""
    return [
        torch.cat([m.weight, m.bias[:, None]], 1).detach().clone() for m in model.modules() if isinstance(m, nn.Linear)
    ]


def functions_of(model):
    """Each layer's transfer function, samples as columns."""
    after = [m for m in model if not isinstance(m, nn.Linear)]
    return [lambda a, m=m: m(a.T).T for m in after] + [lambda a: a]


def cross_entropy(y):
    return lambda post: F.cross_entropy(post.T, y)


def moved(model, twin):
    return [p.detach() - q.detach() for p, q in zip(model.parameters(), twin.parameters(), strict=True)]


@pytest.mark.parametrize("activation", MODULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_first_iteration_is_a_step_of_back_propagation_times_gamma(variant, activation):
    data = batch()
    model, twin = mlp(activation), mlp(activation)
    F.cross_entropy(twin(data[0]), data[1]).backward()
    stepped(model, LocoProp(variant, iterations=1, gamma=3.0, inner=sgd(0.1)), data)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * 3.0 * q.grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_iteration_of_a_convolutional_network_too(variant):
    torch.manual_seed(0)
    images = torch.randn(4, 1, 8, 8), torch.arange(4)
    layers = [nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"), nn.ELU(), nn.Conv2d(4, 4, 3, 2, groups=2)]
    model = nn.Sequential(
        *layers, nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1, bias=False), nn.Flatten(), nn.Linear(36, 10)
    )
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(images[0]), images[1]).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    method = LocoProp(variant, iterations=1, gamma="batch", inner=sgd(0.1))
    stepped(model, method, images)
    assert list(method.layers) == ["blocks.0", "blocks.2", "blocks.4", "blocks.6"]
    for p, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * 4 * gradient)


CASES = [(variant, activation, False, 3) for variant in VARIANTS for activation in MODULES]
CASES += [(variant, "tanh", anchored, 12) for variant in VARIANTS for anchored in (False, True)]


@pytest.mark.parametrize(("variant", "activation", "anchored", "iterations"), CASES)
def test_all_iterations_equal_the_transcription(variant, activation, anchored, iterations):
    """Inputs and targets of all layers are those of the old weights, as there."""
    data = batch()
    model = mlp(activation)
    functions = functions_of(model)
    if variant == "M":
        functions[-1] = lambda a: a.softmax(0)  # the matching loss's: the network's own function is not asked
    weights = weights_of(model)

    def loss(post):
        return cross_entropy(data[1])(post if variant != "M" else post.log())  # log softmax again is log softmax

    expected = oracle.step(variant, weights, functions, data[0].T, loss, 0.02, 4.0, iterations, anchored)
    method = LocoProp(variant, iterations=iterations, gamma=4.0, inner=sgd(0.02), anchored=anchored)
    stepped(model, method, data)
    for w, new, old in zip(weights_of(model), expected, weights, strict=True):
        torch.testing.assert_close(w, new)
        assert (new - old).norm() > 1e-5


def test_transfer_functions_that_are_given_are_used():
    """The same network with arctan, which has no module, given by name; by a pattern; and for the last layer."""

    class Arctan(nn.Module):
        def forward(self, a):
            return torch.stack([a, a]).atan()[0]  # hidden from sight

    def made():
        model = mlp()
        return nn.Sequential(*[Arctan() if isinstance(m, nn.Tanh) else m for m in model])

    data = batch()
    model = made()
    weights = weights_of(model)
    functions = [torch.atan] * 3 + [torch.sigmoid]

    def loss(post):
        return cross_entropy(data[1])(torch.logit(post))

    expected = oracle.step("M", weights, functions, data[0].T, loss, 0.02, 4.0, 5)
    given = {"blocks.[0-4]": "arctan", "*.6": "sigmoid"}
    method = LocoProp("M", iterations=5, gamma=4.0, inner=sgd(0.02), transfers=given)
    stepped(model, method, data)
    assert {name: str(f) for name, f in method.layers.items()} == {
        "blocks.0": "arctan",
        "blocks.2": "arctan",
        "blocks.4": "arctan",
        "blocks.6": "sigmoid",
    }
    for w, new in zip(weights_of(model), expected, strict=True):
        torch.testing.assert_close(w, new)


def largest_rate(weights, functions, x):
    inputs, _, _ = oracle.forward(weights, functions, x)
    return min(1 / torch.linalg.eigvalsh(y @ y.T)[-1].item() for y in inputs)


def test_the_anchored_iterate_ends_at_the_closed_form():
    data = batch()
    model = mlp()
    weights, functions = weights_of(model), functions_of(model)
    rate = 0.9 * largest_rate(weights, functions, data[0].T)
    expected = oracle.closed_form(weights, functions, data[0].T, cross_entropy(data[1]), rate, 5.0)
    stepped(model, LocoProp("S", iterations=400, gamma=5.0, inner=sgd(rate), anchored=True), data)
    for w, new in zip(weights_of(model), expected, strict=True):
        torch.testing.assert_close(w, new)


def test_beyond_its_condition_the_anchored_iterate_does_not_converge():
    data = batch()
    model = mlp()
    weights, functions = weights_of(model), functions_of(model)
    rate = 1.2 * max(
        1 / torch.linalg.eigvalsh(y @ y.T)[-1].item() for y in oracle.forward(weights, functions, data[0].T)[0]
    )
    before = [w.norm() for w in weights]
    stepped(model, LocoProp("S", iterations=300, gamma=5.0, inner=sgd(rate), anchored=True), data)
    assert any(w.norm() > 1e3 * old for w, old in zip(weights_of(model), before, strict=True))


def test_without_anchor_s_heads_for_least_squares():
    """Algorithm 1: with more samples than inputs the first layer's fixed point is the regression on its target."""
    x, y = batch()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = x[:, :3]
    inputs, pre, _, in_pre, _ = oracle.gradients(weights_of(model), functions_of(model), x.T, cross_entropy(y))
    target = pre[0] - 2.0 * in_pre[0]
    expected = torch.linalg.lstsq(inputs[0].T, target.T).solution.T
    stepped(model, LocoProp("S", iterations=1500, gamma=2.0, inner=sgd(0.3)), (x, y))
    torch.testing.assert_close(weights_of(model)[0], expected)


def test_natural_targets_give_the_k_fac_update():
    """Proposition 1 and Eq. 15, with the Fisher matrix of the batch's own gradients."""
    data, damping = batch(), 0.1
    model = mlp()
    weights, functions = weights_of(model), functions_of(model)
    rate = 0.9 * largest_rate(weights, functions, data[0].T)
    in_pre = oracle.gradients(weights, functions, data[0].T, cross_entropy(data[1]))[3]
    inverses = []
    for g in in_pre:
        own = SAMPLES * g  # each sample's own gradient: the loss is a mean
        fisher = sum(torch.outer(column, column) for column in own.T) / SAMPLES
        inverses.append(torch.linalg.inv(fisher + damping * torch.eye(len(fisher))))
    expected = oracle.closed_form(weights, functions, data[0].T, cross_entropy(data[1]), rate, 0.5, inverses)
    method = LocoProp("S", iterations=400, gamma=0.5, inner=sgd(rate), anchored=True, damping=damping)
    stepped(model, method, data)
    for w, new in zip(weights_of(model), expected, strict=True):
        torch.testing.assert_close(w, new)


def test_s_recovers_proxprop():
    """Hidden layers: exact proximal steps, gamma = tau. Last layer: one iteration, rate * gamma = tau (Appendix C)."""
    data, tau = batch(), 0.7
    model, last = mlp(), mlp()
    weights, functions = weights_of(model), functions_of(model)
    rate = 0.9 * largest_rate(weights, functions, data[0].T)
    expected = oracle.proxprop(weights, functions, data[0].T, cross_entropy(data[1]), tau, rate)
    stepped(model, LocoProp("S", iterations=400, gamma=tau, inner=sgd(rate), anchored=True), data)
    stepped(last, LocoProp("S", iterations=1, gamma=tau, inner=sgd(1.0), anchored=True), data)
    for w, new in zip([*weights_of(model)[:-1], weights_of(last)[-1]], expected, strict=True):
        torch.testing.assert_close(w, new)


@pytest.mark.parametrize("function", TRANSFERS, ids=str)
def test_divergence_is_the_integral_under_the_transfer_function(function):
    """Eq. 1, along the straight line from the target to the prediction."""
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 4.0):
        at, of = scale * torch.randn(2, 3, dtype=torch.float64)

        def height(share, at=at, of=of):
            return ((function.function(of + share * (at - of)) - function.function(of)) @ (at - of)).item()

        expected, _ = quad(height, 0, 1, epsabs=1e-13, limit=200)
        found = function.divergence(at, of)
        assert found.item() == pytest.approx(expected, rel=1e-6)
        assert found >= 0


@pytest.mark.parametrize("function", TRANSFERS, ids=str)
def test_the_local_problem_of_m_is_convex(function):
    """Proposition 2 on random segments of weights, targets out of the function's range included."""
    torch.manual_seed(0)
    y, target = torch.randn(6, 4, dtype=torch.float64), 3 * torch.randn(6, 3, dtype=torch.float64)

    def objective(w):
        return function.integral(y @ w.T).sum() - (target * (y @ w.T)).sum()

    for _ in range(20):
        one, other = 2 * torch.randn(2, 3, 4, dtype=torch.float64)
        ends = objective(one), objective(other)
        for share in torch.linspace(0, 1, 11, dtype=torch.float64):
            inside = objective(share * one + (1 - share) * other)
            assert inside <= share * ends[0] + (1 - share) * ends[1] + 1e-9


@pytest.mark.parametrize("function", TRANSFERS, ids=str)
def test_the_steps_of_m_descend_that_problem(function):
    torch.manual_seed(0)
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y, target = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    a = y @ w.T
    (expected,) = torch.autograd.grad(function.integral(a).sum() - (target * a).sum(), a, retain_graph=True)
    torch.testing.assert_close(Descent("M", 1, 1.0).slope(function, a.detach(), target), expected)


@pytest.mark.parametrize("samples", [7, 32])
@pytest.mark.parametrize(
    ("kind", "function", "outputs"),
    [("classes", "softmax(-1)", 1), ("pixels", "sigmoid", 1), ("mean pixels", "sigmoid", 3), ("values", "linear", 1)],
)
def test_with_gamma_the_batch_size_a_matching_last_layer_lowers_the_loss(kind, function, outputs, samples):
    """Proposition 4: its local loss is then the network's own; the other layers are frozen here.

    A loss that is a mean over outputs too needs gamma as many times larger.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    x = torch.randn(samples, 5)
    data, loss = {
        "classes": ((x, torch.randint(0, 3, (samples,))), None),
        "pixels": ((x, torch.rand(samples, 3)), lambda a, y: F.binary_cross_entropy_with_logits(a, y) * 3),
        "mean pixels": ((x, torch.rand(samples, 3)), F.binary_cross_entropy_with_logits),
        "values": ((x, torch.randn(samples, 3)), lambda a, y: (a - y).square().sum(1).mean() / 2),
    }[kind]
    chain = hp.Chain(None, list(model), None, loss)
    method = LocoProp("M", iterations=20, gamma=float(samples * outputs), inner=sgd(0.5 / samples))
    method.prepare(chain, data)
    assert {name: str(f) for name, f in method.layers.items()} == {"blocks.2": function}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = [method.step(chain, data, optimizer).item() for _ in range(10)]
    assert all(later < earlier for earlier, later in pairwise(losses))
    a = model(x)
    (gradient,) = torch.autograd.grad(chain.loss_of(a, data), a)
    goal = method.layers["blocks.2"].function(a) - samples * outputs * gradient
    wanted = F.one_hot(data[1], 3).float() if kind == "classes" else data[1]
    torch.testing.assert_close(goal, wanted, rtol=1e-4, atol=1e-5)


def test_no_layer_sees_what_another_one_has_become():
    """All layers at once end where each alone ends, whatever their order."""
    data = batch()
    together = stepped(mlp(), LocoProp("M", inner=sgd(0.05)), data)
    for place in (0, 2, 4, 6):
        alone = mlp()
        others = {f"blocks.{other}": None for other in (0, 2, 4, 6) if other != place}
        stepped(alone, LocoProp("M", inner=sgd(0.05), transfers=others), data)
        for p, q in zip(alone[place].parameters(), together[place].parameters(), strict=True):
            assert torch.equal(p, q)


def test_tensorflows_rmsprop_number_by_number():
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 2), torch.randn(6, 3, 2)
    settings = {"decay": 0.9, "momentum": 0.999, "eps": 1e-5}
    w = nn.Parameter(start.clone())
    optimizer = RMSProp([w], lr=0.1, **settings)
    other = nn.Parameter(start.clone())
    torchs = torch.optim.RMSprop([other], lr=0.1, alpha=0.9, momentum=0.999, eps=1e-5)
    for gradient in gradients:
        w.grad = other.grad = gradient
        optimizer.step()
        torchs.step()
        if gradient is gradients[0]:
            assert (other - w).norm() > (w - start).norm()  # off by more than a whole update
    torch.testing.assert_close(w.detach(), oracle.rmsprop(start, gradients, rate=0.1, **settings))


def test_weight_decay_adds_to_the_gradient():
    torch.manual_seed(0)
    one, other = (nn.Parameter(torch.arange(1.0, 4.0)) for _ in range(2))
    decayed, plain = RMSProp([one], lr=0.1, weight_decay=0.3), RMSProp([other], lr=0.1)
    for gradient in torch.randn(4, 3):
        one.grad, other.grad = gradient.clone(), gradient + 0.3 * other.detach()
        decayed.step()
        plain.step()
        assert torch.equal(one.grad, gradient)
    torch.testing.assert_close(one, other)


def test_a_changed_learning_rate_does_not_act_on_past_gradients():
    w = nn.Parameter(torch.zeros(1))
    optimizer = RMSProp([w], lr=0.1, momentum=1 - 1e-9, eps=0.0)
    w.grad = torch.ones(1)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert w.item() == pytest.approx(-0.2)


def test_local_rates_fall_linearly_to_a_quarter():
    rates = []

    class Noted(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])

    model = nn.Sequential(nn.Linear(5, 3)).double()
    stepped(model, LocoProp("S", iterations=12, inner=partial(Noted, lr=2.0)), batch())
    assert rates == pytest.approx([2, 1.8, 1.6, 1.4, 1.2, 1, 0.8, 0.6, 0.5, 0.5, 0.5, 0.5])
