"""Which networks alternating minimisation takes, and what happens inside them: signs, running statistics, dropout."""

import pytest
import torch
from altmin_models import MODELS, Elman, Heaviside, LeNet, Sign, Threshold, images, perceptron, sign_network
from torch import nn
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.algorithms import AlternatingMinimization
from horizonplan.chain import ChainError
from horizonplan.datasets import digits
from horizonplan.models import ResidualMLP, SequenceClassifier


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def prepared(model, data, **options):
    chain = hp.Chain.from_model(model, data, blocks=[""])
    method = AlternatingMinimization(**options)
    method.prepare(chain, data)
    return chain, method


def fast(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_network_trains(name):
    """The loss on one batch, as offline, seen again and again, falls; every weight has moved."""
    make, data = MODELS[name]
    model, batch = make(), data()
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    result = hp.train(model, [batch], algorithm=AlternatingMinimization(), epochs=40, optimizer=fast)
    losses = [entry["loss"] for entry in result.history]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["perceptron", "dropout", "cnn", "elman", "sign"])
def test_every_kind_of_network_trains_with_memories(name):
    make, data = MODELS[name]
    model, batch = make(), data()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = hp.train(model, [batch], algorithm=AlternatingMinimization(memory=True), epochs=40, optimizer=fast)
    losses = [entry["loss"] for entry in result.history]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    still = {n for n, p in model.named_parameters() if torch.dist(p.detach(), before[n]) < 1e-3}
    assert still == ({"cell.bias_hh_l0"} if name == "elman" else set())  # the other bias takes the sum's moves


@pytest.mark.parametrize("step", [Sign, Threshold, Heaviside])
@pytest.mark.parametrize("memory", [False, True])
def test_layers_below_a_sign_move(step, memory):
    """Back-propagation does not move them, or fails."""
    data = torch.randn(20, 6), torch.randint(0, 3, (20,))
    model = sign_network(6, 9, 4, 3, step)
    before = model[0].weight.detach().clone()
    if step is not Heaviside:
        F.cross_entropy(model(data[0]), data[1]).backward()
        assert model[0].weight.grad is None or not model[0].weight.grad.any()
    hp.train(model, [data], algorithm=AlternatingMinimization(memory=memory), epochs=2)
    assert ((model[0].weight - before).abs() > 1e-4).any()


def test_the_code_before_a_sign_moves_as_descent_moves_the_activation():
    x, y = torch.randn(5, 6, dtype=torch.double), torch.randint(0, 3, (5,))
    model = sign_network(6, 9, 4, 3).double()
    _, method = prepared(model, (x, y), code_steps=3, code_lr=0.05, mu=0.5)
    sweep = method._sweep((x, y), 0.5)
    sweep.encode()
    with sweep.rest():
        sweep.move()
    forward = model[0](x).detach()
    a = start = torch.sign(forward)
    for _ in range(3):
        slope = 2 * (model[2](a) - sweep.codes[1]) @ model[2].weight + 2 * (a - start)
        a = (a - 0.05 * slope).detach()
    assert (a - start).abs().max() > 1e-3
    torch.testing.assert_close(sweep.codes[0], forward + a - start, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_sign_layer_that_learns_beats_the_frozen_one():
    """Eight units, so that random ones do not do; the accuracy on digits not trained on."""
    train, validation = digits()

    def accuracy(frozen, algorithm):
        torch.manual_seed(0)
        model = sign_network(64, 8, 32, 10)
        model[0].requires_grad_(not frozen)
        return hp.train(
            model, train, algorithm=algorithm, epochs=6, val_data=validation, optimizer=fast, watch_every=0
        ).val_metrics["accuracy"]

    frozen = max(accuracy(True, method) for method in (AlternatingMinimization(), hp.algorithms.BackPropagation()))
    assert accuracy(False, AlternatingMinimization()) > frozen + 0.1


@pytest.mark.parametrize("step", [Sign, nn.ReLU])
def test_codes_that_no_weight_could_follow_stay(step):
    """Those of frozen first layers; a frozen layer further up hands the move on."""
    data = torch.randn(20, 6), torch.randint(0, 3, (20,))
    for frozen, moved in (([0], [False, True]), ([2], [True, True]), ([0, 2], [False, False])):
        model = sign_network(6, 9, 4, 3, step)
        for k in frozen:
            model[k].requires_grad_(False)
        _, method = prepared(model, data)
        sweep = method._sweep(data, 1.0)
        sweep.encode()
        with sweep.rest():
            sweep.move()
        assert [not torch.equal(sweep.codes[i], sweep.forward[i]) for i in range(2)] == moved


def test_a_frozen_layer_stays():
    for memory in (False, True):
        model = sign_network(6, 9, 4, 3)
        model[0].requires_grad_(False)
        before = model[0].weight.clone()
        batch = torch.randn(6, 6), torch.randint(0, 3, (6,))
        hp.train(model, [batch], algorithm=AlternatingMinimization(memory=memory), epochs=2)
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("steps", [1, 3])
def test_running_statistics_move_once_a_batch_as_in_a_forward(steps):
    model, batch = LeNet(norm=True), images()
    twin = LeNet(norm=True)
    twin.load_state_dict(model.state_dict())
    chain, method = prepared(model, batch, code_steps=steps, weight_steps=2)
    assert model.n1.num_batches_tracked == 0
    method.step(chain, batch, torch.optim.AdamW(model.parameters()))
    twin(batch[0])
    assert model.n1.num_batches_tracked == 1
    for name, buffer in twin.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_draws_the_random_numbers_of_one_forward(steps):
    make, data = MODELS["dropout"]
    model, batch = make(), data()
    chain, method = prepared(model, batch, code_steps=steps, weight_steps=2)
    torch.manual_seed(3)
    method.step(chain, batch, torch.optim.AdamW(model.parameters()))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    model(batch[0])
    assert torch.equal(after, torch.get_rng_state())


class Late(nn.Module):
    """A ReLU that is flat for all usual inputs."""

    def forward(self, x):
        return torch.relu(x - 6)


class LateStep(nn.Module):
    def forward(self, x):
        return (x > 2).float()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("step", [nn.ReLU, Late, Sign, Threshold, Heaviside, LateStep])
def test_signs_and_flat_parts_are_told_apart_on_any_draw_of_codes(step, rows):
    for seed in range(15):
        torch.manual_seed(seed)
        data = torch.randn(rows, 6), torch.randint(0, 3, (rows,))
        model = sign_network(6, 2, 2, 3, step)
        _, method = prepared(model, data, code_lr=0.1)
        assert method._links_of(data).steps == (set() if step in (nn.ReLU, Late) else {0}), seed


def test_an_elman_network_of_relus_takes_a_last_batch_of_one():
    for seed in range(15):
        torch.manual_seed(seed)
        model = Elman(last=True)
        model.cell = nn.RNN(3, 5, batch_first=True, nonlinearity="relu")
        data = [(torch.randn(rows, 4, 3), torch.randint(0, 3, (rows,))) for rows in (6, 1)]
        assert len(hp.train(model, data, algorithm=AlternatingMinimization()).history) == 2


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("hook", [False, True])
def test_layers_with_random_numbers_of_their_own_draw_the_same_in_every_pass(hook):
    first = nn.Linear(6, 9) if hook else Noisy(6, 9)
    model = nn.Sequential(first, nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    if hook:
        first.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))
    data = torch.randn(8, 6).double(), torch.randint(0, 3, (8,))
    _, method = prepared(model, data, code_lr=1e-12)
    sweep = method._sweep(data, 1.0)
    sweep.encode()
    with sweep.rest():
        sweep.move()
        run, _ = sweep.again({1, 2})  # as in the weight part, in which the first layer is skipped
    torch.testing.assert_close(run.predictions[1], sweep.forward[1])


def test_hooks_of_a_recurrent_layer_are_refused():
    model = Elman()
    model.cell.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(ChainError, match="has forward hooks"):
        prepared(model, (torch.randn(6, 4, 3), torch.randint(0, 3, (6,))))


def test_memories_of_half_precision_layers_are_kept_in_single():
    model = perceptron().bfloat16()
    data = torch.randn(6, 6).bfloat16(), torch.randint(0, 3, (6,))
    chain, method = prepared(model, data, memory=True)
    before = model[0].weight.detach().clone()
    method.step(chain, data, torch.optim.AdamW(model.parameters()))
    assert {b.dtype for memory in method._memories.values() for b in memory.buffers()} == {torch.float32}
    assert model[0].weight.dtype == torch.bfloat16
    assert not torch.equal(model[0].weight, before)


class Multiplied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(6, 6), nn.Linear(6, 3), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.b(self.a(x) * self.scale)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h) + self.c(h)


class Around(nn.Module):
    """A connection around a layer; hidden from autograd if ``step``."""

    def __init__(self, step=False):
        super().__init__()
        self.a, self.b, self.c, self.step = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3), step

    def forward(self, x):
        h = self.a(x)
        h = (h > 0).float() if self.step else torch.tanh(h)
        return self.c(torch.tanh(self.b(h)) + h)


class PooledSign(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(F.max_pool1d(torch.sign(self.a(x)).unsqueeze(1), 2).flatten(1))


class Gated(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.c = kind, nn.Linear(5, 3)

    def forward(self, x):
        return self.c(self.cell(x.unflatten(1, (2, 3)))[0][:, -1])


class Slower(nn.RNN):
    def forward(self, x):
        states, last = super().forward(x)
        return states / 2, last


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


REFUSED = {
    "own parameter": (Multiplied, "Multiplied"),
    "two output layers": (TwoHeads, "one linear output layer"),
    "around": (Around, "reads 'a', 'b'"),
    "around, by values": (lambda: Around(step=True), "without a derivative"),
    "pooled sign": (PooledSign, "'a' goes through"),
    "lstm": (lambda: Gated(nn.LSTM(3, 5, batch_first=True)), "is a LSTM"),
    "gru": (lambda: Gated(nn.GRU(3, 5, batch_first=True)), "is a GRU"),
    "two layers in one": (lambda: Gated(nn.RNN(3, 5, 2, batch_first=True)), "num_layers=2"),
    "residual": (lambda: ResidualMLP(6, 8, 3, depth=2), "reads"),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 3)), "is a Embedding"),
    "a cell of its own": (lambda: Gated(Slower(3, 5, batch_first=True)), "in a way of its own"),
    "ends in a cell": (lambda: Last(), "one linear output layer"),
}


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.RNN(3, 3, batch_first=True)

    def forward(self, x):
        return self.cell(x.unflatten(1, (2, 3)))[0][:, -1]


@pytest.mark.parametrize("name", REFUSED)
def test_other_networks_are_refused(name):
    make, message = REFUSED[name]
    x = torch.randint(0, 9, (4, 6)) if name == "embedding" else torch.randn(4, 6)
    batch = x, torch.randint(0, 3, (4,))
    with pytest.raises(ChainError, match=message):
        hp.train(make(), [batch], algorithm=AlternatingMinimization())


def test_attention_is_refused():
    batch = torch.randn(4, 5, 6), torch.randint(0, 3, (4,))
    with pytest.raises(ChainError, match="no code for"):
        hp.train(SequenceClassifier(6, 5, 3, width=8, depth=2, heads=2), [batch], algorithm=AlternatingMinimization())


def ending(*modules, size):
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(size, 3))


NOT_REMEMBERED = {
    "batch norm": (ending(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), size=72), "BatchNorm2d"),
    "plain norm": (ending(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False), size=72), "normalised"),
    "a layer of its own": (nn.Sequential(nn.Flatten(), Doubled(64, 4), nn.Linear(4, 3)), "in a way of its own"),
    "groups": (ending(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, groups=2), size=32), "groups=2"),
    "conv3d": (ending(nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 2, (1, 3, 3)), size=72), "Conv3d"),
}


@pytest.mark.parametrize("name", NOT_REMEMBERED)
def test_what_no_memory_fits_is_refused_with_memories_only(name):
    model, message = NOT_REMEMBERED[name]
    batch = torch.randn(4, 1, 8, 8), torch.randint(0, 3, (4,))
    with pytest.raises(ChainError, match=message):
        hp.train(model, [batch], algorithm=AlternatingMinimization(memory=True))
    hp.train(model, [batch], algorithm=AlternatingMinimization())


def test_tied_weights_have_no_memory():
    model = perceptron(widths=(6, 6, 6, 3)).float()
    model[2].weight = model[0].weight
    batch = torch.randn(4, 6), torch.randint(0, 3, (4,))
    with pytest.raises(ChainError, match="'0' shares weights with '2'"):
        hp.train(model, [batch], algorithm=AlternatingMinimization(memory=True))
    hp.train(model, [batch], algorithm=AlternatingMinimization())


class Longer(nn.Module):
    """Calls one layer only for large batches."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(h)) if len(x) > 4 else h)


def test_a_layer_that_comes_without_a_memory_is_refused_before_anything_moves():
    small, large = ((torch.randn(rows, 6), torch.randint(0, 3, (rows,))) for rows in (4, 5))
    for memory in (False, True):
        model = Longer()
        chain, method = prepared(model, small, memory=memory)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.AdamW(model.parameters())
        if memory:
            with pytest.raises(ChainError, match="'b' has no memory"):
                method.step(chain, large, optimizer)
        else:
            method.step(chain, large, optimizer)
        assert memory == all(map(torch.equal, model.parameters(), before))


class Packed(Gated):
    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x.unflatten(1, (2, 3)), [2] * len(x), batch_first=True)
        return self.c(self.cell(packed)[1][0])


def test_a_recurrent_layer_needs_a_batch_of_sequences():
    batch = torch.randn(4, 6), torch.randint(0, 3, (4,))
    with pytest.raises(ChainError, match="not packed"):
        hp.train(Packed(nn.RNN(3, 5, batch_first=True)), [batch], algorithm=AlternatingMinimization())
