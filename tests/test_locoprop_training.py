"""LocoProp on models as users write them, and in the trainer."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import horizonplan as hp
from horizonplan.algorithms import SGR, BackPropagation, Horizon, LocoProp, RMSProp, Transfer
from horizonplan.chain import ChainError
from horizonplan.datasets import digits


def mlp():
    layers = [m for width in (64, 64, 64) for m in (nn.Linear(64, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def prepared_digits(how, seed):
    pixels, labels = (torch.cat([part.tensors[i] for part in digits()]) for i in (0, 1))
    if how == "pixels / 16":
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    return [TensorDataset(pixels[part], labels[part]) for part in (order[:1500], order[1500:])]


def accuracy(how, rows, seed, **settings):
    train, validation = prepared_digits(how, seed)
    torch.manual_seed(seed)
    data = DataLoader(train, rows, shuffle=True)
    method = LocoProp(**{"variant": "M", **settings})
    result = hp.train(mlp(), data, algorithm=method, epochs=12, val_data=validation, seed=seed)
    return result.val_metrics["accuracy"]


def test_with_all_defaults_it_learns_the_digits():
    assert accuracy("standardised", 128, 0) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [32, 128])
@pytest.mark.parametrize("how", ["pixels / 16", "standardised"])
def test_with_all_defaults_it_learns_the_digits_however_they_are_prepared(how, rows, seed):
    assert accuracy(how, rows, seed) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["S", "PocoS", "PocoM"])
def test_the_other_variants_learn_them_too(variant):
    assert accuracy("standardised", 128, 0, variant=variant) > 0.85


class Functional(nn.Module):
    """Blocks without modules for their activations."""

    def __init__(self, function):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)
        self.function = function

    def forward(self, x):
        for block in self.blocks:
            x = self.function(block(x))
        return self.head(x)


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
    method = found(model)
    assert str(method.layers["aside"]) == "linear"
    before = model.aside.weight.detach().clone()
    method.step(method._chain, batch(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(model.aside.weight, before)


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
        "never": "it is not called",
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


def test_a_layer_that_the_optimizer_does_not_hold_is_not_trained():
    model, data = Functional(torch.tanh), batch()
    chain = hp.Chain.from_model(model, data)
    method = LocoProp()
    method.prepare(chain, data)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method.step(chain, data, torch.optim.SGD(model.blocks.parameters(), lr=0.1))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.startswith("blocks")}


def test_a_schedule_of_the_optimizer_scales_the_local_learning_rates():
    """Half the rate there is half the rate here, in a group of its own too; a rate of zero says nothing."""

    def moved(inner_rate, *outer_rates):
        torch.manual_seed(0)
        model, data = Functional(torch.tanh).double(), (batch()[0].double(), batch()[1])
        chain = hp.Chain.from_model(model, data)
        method = LocoProp("S", iterations=1, inner=partial(torch.optim.SGD, lr=inner_rate))
        method.prepare(chain, data)
        optimizer = torch.optim.SGD(model.parameters(), lr=outer_rates[0])
        for rate in outer_rates:
            before = model.head.weight.detach().clone()
            optimizer.param_groups[0]["lr"] = rate
            method.step(chain, data, optimizer)
        return model.head.weight.detach() - before

    torch.testing.assert_close(moved(0.01, 0.3), moved(0.01, 7.0))
    torch.testing.assert_close(moved(0.01, 0.0), moved(0.01, 7.0))
    torch.testing.assert_close(2 * moved(1e-2, 1.0, 0.5), moved(1e-2, 1.0, 1.0))


def test_another_optimizer_has_a_schedule_of_its_own():
    model, data = Functional(torch.tanh), batch()
    chain = hp.Chain.from_model(model, data)
    rates = []

    class Noted(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])

    method = LocoProp("S", iterations=1, inner=partial(Noted, lr=2.0))
    method.prepare(chain, data)
    for rate in (1e-3, 1e-1):
        method.step(chain, data, torch.optim.SGD(model.parameters(), lr=rate))
    assert rates == [2.0] * 8


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def train(model, epochs, **options):
    data = [batch(), tuple(-x if x.is_floating_point() else x for x in batch())]
    method = LocoProp("M", source=Horizon(2, 2), iterations=3, inner=partial(RMSProp, lr=1e-3))
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    options = {"scheduler": decay, "algorithm": method, **options}
    hp.train(model, data, epochs=epochs, progress=False, **options)
    return model


def fresh():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*blocks, nn.Linear(6, 3))


@pytest.mark.parametrize("scheduled", ["torch's", "the paper's"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, scheduled):
    options = {} if scheduled == "torch's" else {"scheduler": partial(hp.DecayOnGrowth, factor=0.5)}
    whole = train(fresh(), 4, run_dir=tmp_path / "whole", **options)
    train(fresh(), 2, run_dir=tmp_path / "cut", **options)
    resumed = train(fresh(), 4, run_dir=tmp_path / "cut", resume=True, **options)
    assert same(resumed, whole)
    assert not same(fresh(), whole)


def test_a_run_with_other_settings_is_not_resumed(tmp_path):
    train(fresh(), 1, run_dir=tmp_path)
    with pytest.raises(ValueError, match="algorithm"):
        train(fresh(), 2, run_dir=tmp_path, resume=True, algorithm=LocoProp("S"))
    method = found(fresh())
    state = method.state_dict()
    with pytest.raises(ValueError, match="the state is of layers"):
        found(Functional(torch.tanh)).load_state_dict(state)


def test_going_back_from_a_step_that_is_not_finite(tmp_path):
    bad = torch.full((8, 6), math.nan), batch()[1]
    model, good = fresh(), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hp.training.TrainingWarning)
        hp.train(model, [good, bad, good], algorithm=LocoProp(), epochs=2, run_dir=tmp_path, nonfinite="rollback")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(FloatingPointError, match="loss is nan"):
        hp.train(fresh(), [bad], algorithm=LocoProp())


REFUSED = [
    ({"accumulate": 2}, "accumulate=2: LocoProp owns its step"),
    ({"max_grad_norm": 1.0}, "max_grad_norm=1.0: LocoProp owns its step"),
    ({"fused": True}, "fused=True: LocoProp owns its step"),
    ({"precision": "bf16"}, "precision='bf16': LocoProp owns its step"),
    ({"nonfinite": "skip"}, "nonfinite='skip': LocoProp owns its step"),
    ({"compile": "eager"}, "compile: LocoProp takes over single layers' calls"),
    ({"warmup": 1, "epochs": 2}, "has no horizon to grow to"),
    ({"cosine_every": 1}, "has no horizon and stride"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hp.train(fresh(), [batch()], algorithm=LocoProp(), **options)


BAD = [
    ({"variant": "L"}, "variant='L': give 'S', 'M', 'PocoS', 'PocoM'"),
    ({"iterations": 0}, "iterations=0"),
    ({"iterations": True}, "iterations=True"),
    ({"gamma": 0.0}, "gamma=0.0: give a number > 0, or 'batch'"),
    ({"gamma": "rows"}, "gamma='rows'"),
    ({"gamma": math.nan}, "gamma=nan"),
    ({"inner": 0.1}, "inner=0.1: give callable"),
    ({"inner": torch.optim.SGD([nn.Parameter(torch.ones(1))])}, "each layer gets one"),
    ({"source": LocoProp()}, "give a GradientMethod"),
    ({"source": SGR(2)}, "set its weight=0"),
    ({"transfers": {"0": 3}}, r"transfers\['0'\]=3"),
    ({"damping": 0.1}, "natural targets belong to variant 'S'"),
    ({"variant": "S", "damping": -1.0}, "damping=-1.0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_arguments_are_refused_with_a_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        LocoProp(**settings)


BAD_FOR_THE_MODEL = [
    ({"transfers": {"3": "tanh"}}, "transfers: '3' names no layer"),
    ({"transfers": {"0.1": "tanh"}}, r"names no layer \(LayerNorm is no Linear or Conv2d\)"),
    ({"transfers": {"0.0": "tanhh"}}, "transfer='tanhh': give 'linear'"),
    ({"transfers": {"*": None}}, "LocoProp can treat none of its layers"),
    ({"inner": torch.optim.LBFGS}, "LBFGS.step needs a closure"),
    ({"inner": list}, "it made a list"),
    ({"inner": lambda p: torch.optim.SGD([nn.Parameter(torch.ones(1))])}, "holds other parameters"),
    ({"anchored": True}, "anchored=True: Eq. 4 is plain gradient descent"),
    ({"anchored": True, "inner": partial(torch.optim.SGD, momentum=0.9)}, "without momentum"),
    ({"source": Horizon(9)}, "horizon"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_FOR_THE_MODEL)
def test_what_does_not_fit_the_model_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        hp.train(fresh(), [batch()], algorithm=LocoProp(**settings))


def test_it_has_to_know_the_chain():
    model = fresh()
    chain = hp.Chain.from_model(model, batch())
    with pytest.raises(ValueError, match=r"prepare\(chain, batch\)"):
        LocoProp().step(chain, batch(), torch.optim.SGD(model.parameters()))
    data = torch.ones(()), torch.ones(())
    with pytest.raises(ValueError, match="gamma='batch'"):
        LocoProp()._gamma(data)


def test_its_words_are_the_same_in_every_process():
    made = LocoProp(
        inner=partial(torch.optim.SGD, lr=0.1),
        transfers={"a": Transfer("cube", lambda a: a**3, lambda a: a**4 / 4), "b": "tanh"},
    )
    assert "SGD(lr=0.1)" in repr(made)
    assert "{'a': cube, 'b': 'tanh'}" in repr(made)
    assert " at 0x" not in repr(made)


def test_its_memory_and_time_are_probed_and_leave_the_model_as_it_was():
    model, data = fresh(), batch()
    chain = hp.Chain.from_model(model, data)
    memory, seconds = hp.probes.method(chain, [data], LocoProp(source=BackPropagation()), repeats=1)
    assert memory.value > 0
    assert seconds.value > 0
    assert same(model, fresh())


def test_a_network_that_is_sure_of_its_predictions_matches_too():
    model = Functional(torch.tanh)
    with torch.no_grad():
        model.head.weight.mul_(1000)
    assert str(found(model).layers["head"]) == "softmax(-1)"
