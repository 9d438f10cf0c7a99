"""Which layers LocoProp treats, with which transfer functions, and what happens to the others."""

from functools import partial

import pytest
import torch
from locoprop_oracle import Functional
from torch import nn
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.algorithms import Horizon, LocoProp
from horizonplan.chain import ChainError


def batch(rows=8, width=6):
    torch.manual_seed(1)
    return torch.randn(rows, width), torch.arange(rows) % 3


def found(model, variant="M", data=None, loss=None, **settings):
    data = batch() if data is None else data
    method = LocoProp(variant, **settings)
    method.prepare(hp.Chain.from_model(model, data, loss=loss), data)
    return method


FUNCTIONS = [
    (torch.tanh, "tanh"),
    (torch.relu, "relu"),
    (lambda a: a.relu_(), "relu"),
    (partial(F.leaky_relu, negative_slope=0.3), "leaky_relu(0.3)"),
    (torch.sigmoid, "sigmoid"),
    (torch.special.expit, "sigmoid"),
    (lambda a: a.softmax(-1), "softmax(-1)"),
    (partial(F.softmax, dim=1), "softmax(1)"),
    (torch.atan, "arctan"),
    (F.softplus, "softplus(1)"),
    (partial(F.softplus, beta=3), "softplus(3)"),
    (partial(F.elu, alpha=0.5), "elu(0.5)"),
    (lambda a: a * torch.sigmoid(a), "linear"),
    (lambda a: F.layer_norm(a, [6]), "linear"),
    (F.gelu, None),
    (F.silu, None),
    (partial(F.leaky_relu, negative_slope=-0.3), None),
    (F.hardtanh, None),
]


@pytest.mark.parametrize(("function", "name"), FUNCTIONS)
def test_transfer_functions_are_found(function, name):
    method = found(Functional(function))
    assert str(method.layers["head"]) == "softmax(-1)"
    layers = {f"blocks.{t}": method.layers.get(f"blocks.{t}") for t in range(3)}
    assert {None if f is None else str(f) for f in layers.values()} == {name}
    if name is None:
        assert set(method.left.values()) == {"the activation after it has no matching loss"}
        assert len(found(Functional(function), "S").layers) == 4


LOSSES = [
    (None, "softmax(-1)"),
    (nn.CrossEntropyLoss(label_smoothing=0.1), "softmax(-1)"),
    (nn.CrossEntropyLoss(reduction="sum", ignore_index=0), "softmax(-1)"),
    (lambda a, y: F.nll_loss(F.log_softmax(a, -1), y), "softmax(-1)"),
    (lambda a, y: F.binary_cross_entropy_with_logits(a, F.one_hot(y, 3).float()), "sigmoid"),
    (lambda a, y: F.binary_cross_entropy(a.sigmoid(), F.one_hot(y, 3).float()), "sigmoid"),
    (lambda a, y: F.mse_loss(a, F.one_hot(y, 3).float()), "linear"),
    (lambda a, y: F.mse_loss(a.tanh(), F.one_hot(y, 3).float()), "tanh"),
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0])), "linear"),
    (nn.MultiMarginLoss(), "linear"),
]


@pytest.mark.parametrize(("loss", "name"), LOSSES)
def test_the_losss_own_transfer_function_is_found_for_the_last_layer(loss, name):
    assert str(found(Functional(torch.tanh), loss=loss).layers["head"]) == name


def test_a_last_layer_that_the_loss_does_not_read_has_no_gradient_and_stays():
    class Aside(Functional):
        def forward(self, x):
            out = super().forward(x)
            self.seen = self.aside(x)
            return out

    model = Aside(torch.tanh)
    model.aside = nn.Linear(6, 2)
    with pytest.warns(UserWarning, match="no gradient in the layer called last"):
        method = found(model)
    assert str(method.layers["aside"]) == "linear"
    before = model.aside.weight.detach().clone()
    method.step(method._chain, batch(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(model.aside.weight, before)


def test_a_batch_whose_labels_are_all_ignored_cannot_tell():
    data = batch()[0], torch.full((8,), -100)
    with pytest.warns(UserWarning, match="prepare with another batch"):
        assert str(found(Functional(torch.tanh), data=data).layers["head"]) == "linear"


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_softmax_without_a_dimension_has_torchs():
    method = found(Functional(nn.Softmax()))
    assert str(method.layers["blocks.0"]) == "softmax(1)"
    method.step(method._chain, batch(), torch.optim.SGD(method._chain.model.parameters(), lr=0.1))
    data = torch.randn(2, 5, 6), torch.zeros(2, 5).long()
    assert str(found(Functional(nn.Softmax()), data=data).layers["blocks.0"]) == "softmax(0)"


def test_dense_predictions_match_along_the_channels():
    model = nn.Sequential(
        *[m for _ in range(3) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())], nn.Conv2d(4, 3, 1)
    )
    data = torch.randn(2, 4, 5, 5), torch.randint(0, 3, (2, 5, 5))
    assert str(found(model, data=data).layers["6"]) == "softmax(-3)"


class Odd(nn.Module):
    """Layers of all kinds that cannot be treated, and one that can."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.tied = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.other.weight = self.tied.weight
        self.twice = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.wide = nn.Conv1d(1, 1, 3, padding=1)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.twice(self.twice(self.other(self.tied(self.norm(x)))))
        return self.head(self.computed(self.wide(self.frozen(x).unsqueeze(1)).squeeze(1)))


def test_layers_that_cannot_be_treated_take_the_ordinary_gradient():
    torch.manual_seed(0)
    model, twin = Odd(), Odd()
    twin.load_state_dict(model.state_dict())
    data = batch()
    F.cross_entropy(twin(data[0]), data[1]).backward()
    torch.optim.Adam(twin.parameters(), lr=0.1).step()
    chain = hp.Chain.from_model(model, data)
    method = LocoProp("M")
    method.prepare(chain, data)
    method.step(chain, data, torch.optim.Adam(model.parameters(), lr=0.1))
    assert list(method.layers) == ["blocks.0.0", "blocks.1.0", "blocks.2.0", "head"]
    assert method.left == {
        "norm": "LayerNorm is no Linear or Conv2d",
        "tied": "its weights are another module's too",
        "other": "its weights are another module's too",
        "twice": "it is called 2 times in a forward",
        "never": "a trial forward did not call it",
        "wide": "Conv1d is no Linear or Conv2d",
        "computed": "its weight is computed from something else",
        "computed.parametrizations.weight": "ParametrizationList is no Linear or Conv2d",
    }
    for name, p in model.named_parameters():
        if not name.startswith(tuple(method.layers)):
            torch.testing.assert_close(p, twin.get_parameter(name), msg=name)
        else:
            assert not torch.equal(p, twin.get_parameter(name))


def test_a_shared_activation_module_serves_the_post_activation_variants():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.head, self.act = nn.Linear(6, 3), nn.ReLU(inplace=True)

        def forward(self, x):
            for block in self.blocks:
                x = self.act(block(x))
            return self.head(x)

    torch.manual_seed(0)
    model, data = Shared(), batch()
    old = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(data[0]), data[1]).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    chain = hp.Chain.from_model(model, data)
    method = LocoProp("PocoS", iterations=1, gamma=2.0, inner=partial(torch.optim.SGD, lr=0.1))
    method.prepare(chain, data)
    assert list(map(str, method.layers.values())) == ["relu", "relu", "relu", "linear"]
    method.step(chain, data, torch.optim.SGD(model.parameters(), lr=0.0))
    for p, before, gradient in zip(model.parameters(), old, gradients, strict=True):
        torch.testing.assert_close(p.detach(), before - 0.2 * gradient)
    left = found(Functional(torch.tanh), "PocoM").left
    assert set(left.values()) == {"tanh after it is not computed by a module of its own"}


def test_a_loss_between_a_layer_and_its_transfer_function_is_refused_after_it():
    """Blocks of one module each, horizon 1: there is no gradient after the transfer function."""
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(6, 6), nn.Tanh())], nn.Linear(6, 3))
    chain = hp.Chain(None, list(model), None)
    method = LocoProp("PocoS", source=Horizon(1))
    method.prepare(chain, batch())
    with pytest.raises(ChainError, match="take variant='S' or 'M'"):
        method.step(chain, batch(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(p.grad is None for p in model.parameters())
    assert all("forward" not in vars(m) for m in model.modules())


def test_a_transfer_function_that_overwrites_a_blocks_input_is_refused_after_it():
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(6, 6), nn.ReLU(inplace=True))], nn.Linear(6, 3))
    chain = hp.Chain(None, list(model), None)
    method = LocoProp("PocoM", source=Horizon(2, 2))
    method.prepare(chain, batch())
    with pytest.raises(ChainError, match="works in place on a block's input"):
        method.step(chain, batch(), torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_network_that_is_sure_of_its_predictions_matches_too():
    model = Functional(torch.tanh)
    with torch.no_grad():
        model.head.weight.mul_(1000)
    assert str(found(model).layers["head"]) == "softmax(-1)"


@pytest.mark.parametrize("between", [partial(nn.Unflatten, -1, (2, 3)), partial(nn.Dropout, 0.1)])
def test_a_given_transfer_functions_module_is_not_the_one_before_it(between):
    """The gradient after the flattening is not the one after tanh."""
    blocks = [m for _ in range(3) for m in (nn.Linear(6, 6), between(), nn.Tanh(), nn.Flatten())]
    model = nn.Sequential(nn.Sequential(*blocks), nn.Linear(6, 3))
    chain = hp.Chain(None, list(model), None)
    given = {"blocks.0.*": "tanh"}
    method = LocoProp("PocoS", transfers=given)
    method.prepare(chain, batch())
    assert list(method.layers) == ["blocks.1"]
    assert set(method.left.values()) == {"tanh after it is not computed by a module of its own"}
    method = LocoProp("M", transfers=given)
    method.prepare(chain, batch())
    assert {str(method.layers[f"blocks.0.{t}"]) for t in (0, 4, 8)} == {"tanh"}
