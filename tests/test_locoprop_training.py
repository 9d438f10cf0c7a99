"""LocoProp on models as users write them, and in the trainer."""

import math
import warnings
from functools import partial

import pytest
import torch
from locoprop_oracle import Functional
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import horizonplan as hp
from horizonplan.algorithms import SGR, BackPropagation, Horizon, LocoProp, RMSProp, Transfer
from horizonplan.batch import nbytes
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


def batch():
    torch.manual_seed(1)
    return torch.randn(8, 6), torch.arange(8) % 3


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
    one, other = LocoProp(), LocoProp()
    for method, model in ((one, fresh()), (other, Functional(torch.tanh))):
        method.prepare(hp.Chain.from_model(model, batch()), batch())
    with pytest.raises(ValueError, match="the state is of layers"):
        other.load_state_dict(one.state_dict())


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
    ({"transfers": None}, "transfers=None: give a mapping"),
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
        LocoProp().prepare(chain, data)


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


def test_the_states_of_the_inner_optimisers_count():
    """In a probe and in training: a step begins with them alive."""
    model, data = fresh(), batch()
    method = LocoProp(source=BackPropagation())
    memory, _ = hp.probes.method(hp.Chain.from_model(model, data), [data], method, optimizer=torch.optim.SGD, repeats=1)
    result = hp.train(model, [data] * 3, algorithm=method, epochs=1, optimizer=torch.optim.SGD, progress=False)
    own = nbytes(method.state_dict())
    assert own >= sum(p.nbytes for p in model.parameters() if p.dim() > 1)  # a mean square for every weight, at least
    standing = sum(p.nbytes for p in model.parameters()) + nbytes(data)
    assert memory.detail["base_bytes"] == standing + own
    assert result.peak_bytes == memory.value
