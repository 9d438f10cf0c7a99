"""Alternating minimisation in the trainer and the probes."""

import pytest
import torch
from altmin_models import MODELS, LeNet, images, perceptron
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import horizonplan as hp
from horizonplan.algorithms import AlternatingMinimization, BackPropagation, Penalty
from horizonplan.datasets import digits
from horizonplan.training import TrainingWarning


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def batches(count=4, rows=6):
    return [(torch.randn(rows, 6), torch.randint(0, 3, (rows,))) for _ in range(count)]


def relu_network():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def accuracy(batch_size, seed, standard, algorithm=None, **options):
    """On digits not trained on, with all defaults; pixels as they come or standardised."""
    train, validation = (part.tensors for part in digits(seed=seed))
    if standard:
        mean, deviation = train[0].mean(0), train[0].std(0) + 1e-6
        train, validation = (((x - mean) / deviation, y) for x, y in (train, validation))
    else:  # pixels between 0 and 1
        low, high = train[0].min(), train[0].max()
        train, validation = (((x - low) / (high - low), y) for x, y in (train, validation))
    torch.manual_seed(seed)
    model = relu_network()
    data = DataLoader(TensorDataset(*train), batch_size, shuffle=True)
    algorithm = algorithm or hp.algorithms.AlternatingMinimization()
    result = hp.train(model, data, algorithm=algorithm, epochs=12, val_data=TensorDataset(*validation), **options)
    return result.val_metrics["accuracy"]


def test_with_all_defaults_it_learns_the_digits():
    assert accuracy(128, 0, standard=False) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("standard", [False, True])
def test_with_all_defaults_it_learns_the_digits_however_they_are_prepared(size, standard):
    found = [accuracy(size, seed, standard) for seed in range(5)]
    assert min(found) > 0.85, found


def eq4(sweep):
    """Eq. 4 after the move of c_L minus before, a sum over samples, divided by mu."""
    before = sweep.encode()
    with sweep.rest():
        sweep.move()
        _, after = sweep.again(sweep.links.outputs)
    top = max(sweep.links.coded)
    return (after.detach() - before) * sweep.samples / sweep.mu + torch.dist(sweep.codes[top], sweep.forward[top]) ** 2


LOSSES = {
    "mu=.1": (0.1, 0),
    "mu=.01": (0.01, 0),
    "squares": (1.0, 1.0),
    "squares, 10": (1.0, 10.0),
    "squares, 100": (1.0, 100.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_move_of_the_last_code_descends_whatever_the_losss_curvature(name):
    """On every batch of a run at the default rate; and the loss falls."""
    mu, scale = LOSSES[name]
    (x, y), _ = (part.tensors for part in digits())
    x, target = x / 4, torch.nn.functional.one_hot(y, 10) * scale if scale else y
    data = list(zip(x[:512].split(64), target[:512].split(64), strict=True))
    model = relu_network()
    chain = hp.Chain.from_model(model, data[0], loss=nn.MSELoss() if scale else nn.CrossEntropyLoss())
    method = AlternatingMinimization(mu=mu)
    method.prepare(chain, data[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch in data * 12:
        assert eq4(method._sweep(batch, mu)) < 0
        losses.append(method.step(chain, batch, optimizer).item())
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


CASES = {
    "adam": {},
    "growing": {"mu": Penalty(0.1, factor=1.5, every=4), "code_steps": 2},
    "memory": {"memory": True, "decay": 0.9},
}


def trained(model, data, folder, epochs, resume=False, **options):
    torch.manual_seed(1)
    model = model()
    method = AlternatingMinimization(**options)
    hp.train(model, data, algorithm=method, epochs=epochs, run_dir=folder, resume=resume)
    return [*model.parameters(), *model.buffers()], method


@pytest.mark.parametrize(("name", "kind"), [("adam", "norms"), ("growing", "dropout"), ("memory", "cnn")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, kind, tmp_path):
    make, data = MODELS[kind]
    data = [data() for _ in range(4)]
    whole, _ = trained(make, data, tmp_path / "whole", 3, **CASES[name])
    trained(make, data, tmp_path / "cut", 2, **CASES[name])
    resumed, method = trained(make, data, tmp_path / "cut", 3, resume=True, **CASES[name])
    assert all(map(torch.equal, resumed, whole))
    assert method.state_dict()["steps"] == 12


def test_checkpoints_hold_the_memories(tmp_path):
    from safetensors.torch import load_file

    _, method = trained(lambda: perceptron().float(), batches(), tmp_path, 1, memory=True)
    (found,) = (tmp_path / "checkpoints").glob("*/*.safetensors")
    stored = load_file(found)
    memories = list(method._memories.values())
    assert len(memories) == 2
    for number, memory in enumerate(memories):
        assert memory.a.any()
        assert torch.equal(stored[f"extra.0.{number}.a"], memory.a)
        assert torch.equal(stored[f"extra.0.{number}.b"], memory.b)


REFUSED = {
    "accumulate": {"accumulate": 2},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "fused": {"fused": True},
    "precision": {"precision": "bf16"},
    "compile": {"compile": "eager"},
    "warmup": {"warmup": 1, "epochs": 2},
    "cosine_every": {"cosine_every": 1},
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_cannot_be_honoured_are_refused(name):
    with pytest.raises(ValueError, match=name):
        hp.train(perceptron().float(), batches(), algorithm=AlternatingMinimization(), **REFUSED[name])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory", 1),
        ("proximal", None),
        ("mu", 0),
        ("mu", None),
        ("mu", True),
        ("code_steps", 0),
        ("code_lr", -1.0),
        ("weight_steps", 1.5),
        ("decay", 0.0),
        ("decay", 0.5),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        AlternatingMinimization(**{name: value})


def test_it_has_to_be_prepared_for_the_chain():
    batch = batches(1)[0]
    chain = hp.Chain.from_model(perceptron().float(), batch)
    method = AlternatingMinimization()
    with pytest.raises(ValueError, match="prepare"):
        method.step(chain, batch, torch.optim.AdamW(chain.parameters()))


def test_a_state_is_loaded_after_prepare_and_into_the_same_layers():
    batch = batches(1)[0]
    chain = hp.Chain.from_model(perceptron().float(), batch)
    method = AlternatingMinimization()
    assert method.state_dict() == {"steps": 0, "gains": {}}
    with pytest.raises(ValueError, match="call prepare"):
        method.load_state_dict({"steps": 1, "gains": {}})
    method.prepare(chain, batch)
    with pytest.raises(ValueError, match="same model"):
        method.load_state_dict({"steps": 1, "gains": {}})
    method.load_state_dict(method.state_dict() | {"steps": 3})
    assert method.state_dict()["steps"] == 3


def test_autocast_around_a_step_is_refused():
    batch = batches(1)[0]
    chain = hp.Chain.from_model(perceptron().float(), batch)
    method = AlternatingMinimization()
    method.prepare(chain, batch)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="precision"):
        method.step(chain, batch, torch.optim.AdamW(chain.parameters()))


@pytest.mark.parametrize("memory", [False, True])
def test_a_batch_that_is_not_finite_changes_nothing(memory):
    good, bad = batches(2)
    bad[0][0, 0] = float("inf")
    model, twin = perceptron().float(), perceptron().float()
    twin.load_state_dict(model.state_dict())
    method = AlternatingMinimization(memory=memory)
    with pytest.warns(TrainingWarning, match="skip"):
        hp.train(model, [good, bad], algorithm=method, epochs=1, nonfinite="skip")
    other = AlternatingMinimization(memory=memory)
    hp.train(twin, [good], algorithm=other, epochs=1)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    own, expected = method.state_dict(), other.state_dict()
    assert own["steps"] == expected["steps"] == 1
    assert all(torch.equal(own["gains"][n], expected["gains"][n]) for n in own["gains"])
    for one, same in zip(method._memories.values(), other._memories.values(), strict=True):
        assert torch.equal(one.a, same.a)


def everything(model, method):
    buffers = [b for memory in method._memories.values() for b in memory.buffers()]
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers(), *buffers, *method._gains.values())]


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_nothing_moves_where_a_loss_or_a_memory_overflows(value):
    """The second input's square is beyond single precision, its loss is not."""
    hidden = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)]
    for memory, model in ((False, nn.Sequential(*hidden)), (True, nn.Sequential(*hidden[:3], nn.Linear(4, 3)))):
        good, bad = batches(2)
        chain = hp.Chain.from_model(model, good, blocks=[""])
        method = AlternatingMinimization(memory=memory)
        method.prepare(chain, good)
        optimizer = torch.optim.AdamW(model.parameters())
        method.step(chain, good, optimizer)
        before = everything(model, method)
        bad[0][0] = value
        if memory or value != value:
            assert not torch.isfinite(method.step(chain, bad, optimizer))
            assert all(map(torch.equal, everything(model, method), before))
        assert torch.isfinite(method.step(chain, good, optimizer))
        assert not any(map(torch.equal, list(model.parameters()), before))


def test_batches_of_other_sizes_and_chains_of_blocks_are_taken():
    """The last batch of an epoch is smaller; the chain may have been cut into blocks for another method."""
    data = [*batches(2), *batches(1, rows=3)]
    model, twin = perceptron().float(), perceptron().float()
    twin.load_state_dict(model.state_dict())
    hp.train(model, data, algorithm=AlternatingMinimization())
    mixed = {0: AlternatingMinimization(), 1: BackPropagation()}
    after = []

    class Look(hp.Callback):
        def on_epoch_end(self, run, metrics):
            after.append([p.detach().clone() for p in twin.parameters()])

    hp.train(twin, data, algorithm=mixed, epochs=2, callbacks=[Look()])
    assert all(map(torch.equal, after[0], model.parameters()))


def test_several_steps_of_the_optimiser_fit_the_layers_better():
    """On one batch with its codes, the sum of the layers' terms is lower after ten steps than after one."""
    batch = batches(1)[0]
    found = []
    for steps in (1, 10):
        torch.manual_seed(0)
        model = perceptron().float()
        chain = hp.Chain.from_model(model, batch)
        method = AlternatingMinimization(weight_steps=steps, mu=0.1)
        method.prepare(chain, batch)
        sweep = method._sweep(batch, 0.1)
        sweep.encode()
        with sweep.rest():
            sweep.move()
        method.step(chain, batch, torch.optim.Adam(model.parameters(), lr=1e-2))
        run, loss = sweep.again(None)
        terms = [(run.predictions[i] - sweep.codes[i]).square().sum() * 0.1 / 6 for i in sweep.links.coded]
        found.append((loss + sum(terms)).item())
    assert found[1] < found[0]


@pytest.mark.parametrize("memory", [False, True])
def test_memory_and_time_are_probed(memory):
    model, batch = LeNet(), images()
    chain = hp.Chain.from_model(model, batch, blocks=[""])
    before = {n: v.clone() for n, v in model.state_dict().items()}
    method = AlternatingMinimization(memory=memory)
    peak, seconds = hp.probes.method(chain, [batch], method, repeats=2)
    assert (peak.quantity, seconds.quantity) == ("memory", "time")
    assert peak.value > 0 < seconds.value
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    kept = sum(b.nbytes for m in method._memories.values() for b in m.buffers())
    weights = sum(p.nbytes for p in model.parameters())
    state = sum(p.nbytes for p in (model.f2.parameters() if memory else model.parameters()))
    assert memory == (kept > 0)
    kept += sum(gain.nbytes for gain in method._gains.values())
    if memory:  # hidden layers have no state in the optimiser; whose step counters are 4 bytes each
        assert peak.detail["base_bytes"] == weights + kept + 2 * state + 2 * 4 + batch[0].nbytes + batch[1].nbytes
    assert peak.detail["extra_parameters"] == 0


def test_the_default_loss_and_a_given_one_are_the_same():
    data = batches()
    found = []
    for loss in (None, nn.CrossEntropyLoss()):
        torch.manual_seed(0)
        model = perceptron().float()
        hp.train(model, data, algorithm=AlternatingMinimization(), loss=loss)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


def test_a_loss_that_is_a_sum_is_refused():
    loss = nn.CrossEntropyLoss(reduction="sum")
    with pytest.raises(ValueError, match="give a mean"):
        hp.train(perceptron().float(), batches(), algorithm=AlternatingMinimization(), loss=loss)


def contrastive(out, y):
    out = nn.functional.normalize(out)
    return nn.functional.cross_entropy(out @ out.T * 20, torch.arange(len(out)))


MEANS = {
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([100.0, 1.0, 0.01])),
    "padded": nn.CrossEntropyLoss(ignore_index=2),
    "contrastive": contrastive,
}


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_of_any_kind_on_ordered_samples_is_taken(name):
    """Its first half has other classes than its second."""
    for rows in (8, 64):
        x, y = torch.randn(rows, 6), torch.arange(rows) * 3 // rows
        for data in ((x, y), (x.flip(0), y.flip(0))):
            hp.train(perceptron().float(), [data], algorithm=AlternatingMinimization(), loss=MEANS[name])


def test_samples_are_counted_where_the_batch_holds_other_tensors():
    def compute(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], batch[2])

    x, y = batches(1, rows=32)[0]
    chain = hp.Chain.from_model(perceptron().float(), (x, y, torch.ones(3)), blocks=[""], compute_loss=compute)
    method = AlternatingMinimization()
    method.prepare(chain, (x, y, torch.ones(3)))
    sweep = method._sweep((x, y, torch.ones(3)), 1.0)
    sweep.encode()
    assert sweep.samples == 32


@pytest.mark.parametrize("first", [True, False])
def test_samples_are_counted_in_sequences(first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.c = nn.RNN(3, 5, batch_first=first), nn.Linear(5, 3)

        def forward(self, x):
            return self.c(self.cell(x)[1][0])

    batch = torch.randn((6, 4, 3) if first else (4, 6, 3)), torch.randint(0, 3, (6,))
    chain = hp.Chain.from_model(Net(), batch, blocks=[""])
    method = AlternatingMinimization()
    method.prepare(chain, batch)
    sweep = method._sweep(batch, 1.0)
    sweep.encode()
    assert sweep.samples == 6


def test_small_batches_and_models_of_one_batch_size_are_taken():
    hp.train(LeNet(norm=True), [images(2)], algorithm=AlternatingMinimization())
    fixed = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Unflatten(0, (6, 1)), nn.Flatten(), nn.Linear(4, 3))
    hp.train(fixed, batches(1, rows=6), algorithm=AlternatingMinimization())


@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize("proximal", [True, False])
def test_memories_of_inputs_that_were_hardly_active_do_not_blow_up(seed, proximal):
    """Nearly dead ReLUs of the first batches: a whole step to their least squares is not finite after some more."""
    torch.manual_seed(seed)
    widths = [(64, 64), (64, 64), (64, 64)]
    model = nn.Sequential(*(part for pair in widths for part in (nn.Linear(*pair), nn.ReLU())), nn.Linear(64, 10))
    train, val = digits()
    data = DataLoader(train, batch_size=100, shuffle=True, generator=torch.Generator().manual_seed(seed))
    method = AlternatingMinimization(memory=True, code_steps=3, proximal=proximal)
    result = hp.train(model, data, val_data=val, algorithm=method, epochs=2, progress=False)
    assert result.val_metrics["accuracy"] > 0.5
