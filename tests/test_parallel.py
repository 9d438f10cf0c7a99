"""Parallel in time and layer-parallel windows, all parts in one process. Several: tests/test_parallel_processes.py."""

import copy
import math

import families as fm
import oracle
import parallel_oracle as slow
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.algorithms import BackPropagation, Horizon, ParallelInTime, ParallelWindows
from horizonplan.algorithms.coarse import Coarse
from horizonplan.algorithms.regression import Regression, kind_of, known
from horizonplan.models import DynamicalNet, Dynamics, EulerBlock, ResidualMLP, VerletBlock

SMALL = (fm.residual_mlp, fm.between, fm.resnet)


def families(*without):
    """All but some; those that take longer in the slow tests."""
    kept = [f for f in fm.ALL if f not in without]
    return [f if f in SMALL else pytest.param(f, marks=pytest.mark.slow) for f in kept]


def data(count=8, rows=6, features=3, classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(rows + (n % 2), features, dtype=dtype, generator=generator),
            torch.randint(0, classes, (rows + (n % 2),), generator=generator),
        )
        for n in range(count)
    ]


def net(depth=8, width=4, scheme="euler", **settings):
    torch.manual_seed(1)
    return DynamicalNet(3, width, 3, depth, scheme, **settings).double()


def trained(method, model, batches, optimizer=None):
    """A loop of one's own; returns the losses."""
    chain = hp.Chain.from_model(model, batches[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer(model.parameters())
    losses = [method.step(chain, batch, optimizer) for batch in batches]
    method.gather(chain, optimizer)
    return losses


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# Algorithm 4


@pytest.mark.parametrize("coarse", [0, 3])
@pytest.mark.parametrize(("targets", "decay"), [(False, 1.0), (True, 0.9)])
def test_training_equals_the_transcription_of_algorithm_4(coarse, targets, decay):
    batches, model = data(), net()
    losses, wanted, _ = slow.algorithm4(model, batches, 4, 0.1, 4.0 / 8, coarse, decay, 1e-3, targets)
    method = ParallelInTime(coarse_steps=coarse, targets=targets, decay=decay)
    torch.testing.assert_close(torch.stack(trained(method, model, batches)), torch.stack(losses))
    found = slow.weights_of(model)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-11)


def test_the_serial_transcription_is_back_propagation():
    batches, model = data(), net()
    weights = slow.weights_of(model)
    wanted = [slow.algorithm3(weights, batch, 0.5, 0.1, 4)[0] for batch in batches]
    found = trained(ParallelInTime(1, coarse_steps=0), model, batches)
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted))


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.AdamW])
def test_with_true_co_states_training_is_back_propagation_bit_for_bit(parts, optimizer):
    model = net()
    twin = copy.deepcopy(model)
    trained(ParallelInTime(parts, exact=True, coarse_steps=0), model, data(), optimizer)
    chain, made = hp.Chain.from_model(twin, data()[0]), optimizer(twin.parameters())
    for batch in data():
        BackPropagation().step(chain, batch, made)
    assert equal(model, twin)


@pytest.mark.parametrize("family", families(fm.tied))
def test_with_true_co_states_every_family_s_gradient_is_back_propagation_s(family):
    """In training mode: the loss, random numbers and running statistics as well."""
    untied = {fm.gpt2: {"tie_word_embeddings": False}, fm.gemma2: {"tie_word_embeddings": False}}
    case = family(**untied.get(family, {"shared": False} if family is fm.in_place else {}))
    chain = hp.Chain.from_model(case.model, case.batch)
    method = ParallelInTime(2, exact=True, coarse_steps=0)
    method.prepare(chain, case.batch)
    still = torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], lr=0.0)
    after = []

    def noting(function):
        def noted():
            loss = function()
            after.append([torch.get_rng_state(), *(b.clone() for b in case.model.buffers())])
            return loss

        return noted

    def own():
        loss = chain.loss(case.batch)
        loss.backward()
        return loss

    wanted_loss, wanted = oracle.step(noting(own), case.model)
    loss, found = oracle.step(noting(lambda: method.step(chain, case.batch, still)), case.model)
    assert torch.equal(loss, wanted_loss)
    oracle.assert_same_gradients(found, wanted, case.tolerance)
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


def test_what_the_loss_says_passes_one_cut_a_step():
    """Without a global prediction: part p of P has its first gradient in step P - 1 - p."""
    model = net(6)
    chain = hp.Chain.from_model(model, data()[0])
    method, still = ParallelInTime(3, coarse_steps=0), torch.optim.SGD(model.parameters(), lr=0.0)
    first = {}
    for step, batch in enumerate(data(4)):
        method.step(chain, batch, still)
        for part in range(3):
            if any(p.grad.abs().sum() > 0 for p in model.blocks[2 * part].parameters()):
                first.setdefault(part, step)
    assert first == {2: 0, 1: 1, 0: 2}


@pytest.mark.parametrize("split", ["blocks", "memory", [1], [7]])
def test_any_cut_trains_every_block(split):
    model = net()
    before = copy.deepcopy(model)
    trained(ParallelInTime(split=split, coarse_steps=1), model, data())
    for (name, p), was in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, was), name


def test_a_part_whose_weights_are_frozen_is_left_as_it_is():
    model = net()
    for p in [*model.stem.parameters(), *model.blocks[:4].parameters()]:
        p.requires_grad_(False)
    before = copy.deepcopy(model)
    trained(ParallelInTime(coarse_steps=1), model, data(), lambda p: torch.optim.SGD([q for q in p if q.requires_grad]))
    assert equal(model.blocks[:4], before.blocks[:4])
    assert not equal(model.blocks[4:], before.blocks[4:])


# The regression


def test_the_streaming_regression_is_the_one_on_all_pairs():
    generator = torch.Generator().manual_seed(3)
    pairs = [
        (
            torch.randn(n, 5, dtype=torch.float64, generator=generator),
            torch.randint(0, 3, (n,), generator=generator),
            torch.randn(n, 5, dtype=torch.float64, generator=generator),
        )
        for n in (4, 6, 5)
    ]
    for decay, targets in ((1.0, False), (0.5, True)):
        found = Regression(decay, 1e-2, 3 if targets else None)
        for x, y, p in pairs:
            found.add(x, found.targets((x, y), x), p)
        x, y, _ = pairs[0]
        wanted = slow.regress(pairs, x, y, 3, decay, 1e-2, targets)
        torch.testing.assert_close(found.predict(x, found.targets((x, y), x)), wanted)


def test_a_linear_law_is_learned_and_predicted_for_batches_of_any_size():
    torch.manual_seed(0)
    a, b = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    found = Regression(1.0, 1e-12, None)
    for n in (8, 3, 9):
        x = torch.randn(n, 6, dtype=torch.float64)
        found.add(x, None, (x @ a + b) / n)
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(found.predict(x, None), (x @ a + b) / 5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("shape", "kind", "numbers"),
    [
        ((64,), "full", 65 * 65 + 65 * 64),
        ((8, 16, 16), "channels", 17 * 17 + 17 * 8),
        ((7, 32), "channels", 65 * 65 + 65 * 32),
    ],
)
def test_memory_does_not_grow_with_pairs(shape, kind, numbers):
    found = Regression(0.9, 1e-3, None)
    for _ in range(3):
        found.add(torch.randn(4, *shape), None, torch.randn(4, *shape))
        assert found.products.numel() + found.mixed.numel() == numbers
    assert found.kind == kind
    assert found.predict(torch.randn(2, *shape), None).shape == (2, *shape)


@pytest.mark.parametrize("shape", [(512,), (6, 700), (512, 3, 4)])
def test_many_channels_are_regressed_on_few_combinations(shape):
    found = Regression(0.9, 1e-3, None)
    found.add(torch.randn(4, *shape), None, torch.randn(4, *shape))
    channels = shape[0] if len(shape) != 2 else shape[1]
    assert (kind_of(torch.zeros(1, *shape)), found.kind) == ("low-rank", "low-rank")
    assert (found.products.shape, found.mixed.shape) == ((129, 129), (129, channels))
    assert found.predict(torch.randn(2, *shape), None).shape == (2, *shape)


def test_targets_are_seen_where_they_can_be():
    classes = torch.tensor([0, 2, -100, 1])
    assert known((None, classes), 3, 4).tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert known((None, torch.ones(4, 5, dtype=torch.long)), 3, 4).shape == (4, 5, 3)
    assert known((None, torch.ones(4)), 0, 4).shape == (4, 1)
    assert known((None, torch.ones(4, 2, 3)), 0, 4).shape == (4, 6)
    assert known((None, classes), 0, 4).tolist() == [[0], [2], [-100], [1]]
    assert known((None, classes), 3, 8) is None  # of another number of samples
    assert known((None, classes), 1000, 4) is None
    assert known((None, torch.ones(4, 1000)), 0, 4) is None


@pytest.mark.parametrize("coarse", [0, 3])
def test_errors_are_what_figure_3_and_equation_7_ask_for(coarse):
    method = ParallelInTime(coarse_steps=coarse)
    _, _, wanted = slow.algorithm4(net(), data(), 4, 0.1, 0.5, coarse, 0.95, targets=True)
    trained(method, net(), data())
    assert [(error.step, error.cut) for error in method.errors] == [(step, 4) for step in range(coarse, 8)]
    found = [[error.mse, error.relative, error.epsilon_p] for error in method.errors]
    torch.testing.assert_close(torch.tensor(found).double(), torch.tensor(wanted).double(), rtol=1e-5, atol=0)


def test_the_global_prediction_makes_the_first_predictions_better():
    """Fig. 3; without it the first one is zero, whose error is the co-state itself."""
    errors = {}
    for coarse in (0, 5):
        method = ParallelInTime(coarse_steps=coarse)
        trained(method, net(), data(12))
        errors[coarse] = method.errors
    assert errors[0][0].relative == 1.0
    assert errors[0][0].epsilon_p == math.inf
    assert errors[5][0].relative < 0.5
    assert math.isfinite(errors[5][0].epsilon_p)


# The coarse model


def coarse_of(model, factor=2, bounds=(0, 4, 8)):
    batch = data()[0]
    chain = hp.Chain.from_model(model, batch)
    states = [torch.zeros(6, 4)] * (chain.depth + 1)
    return Coarse(chain, bounds, factor, states)


@pytest.mark.parametrize("scheme", ["euler", "verlet"])
@pytest.mark.parametrize("factor", [2, 4])
def test_the_coarse_model_is_the_network_of_fewer_blocks_and_longer_steps(scheme, factor):
    model = net(8, scheme=scheme)
    built = net(8 // factor, scheme=scheme)
    built.load_state_dict(
        {
            name: model.state_dict()[name if "blocks" not in name else _moved(name, factor)]
            for name in built.state_dict()
        }
    )
    batch = data()[0]
    found = coarse_of(model, factor).backward(batch)
    wanted = F.cross_entropy(built(batch[0]), batch[1])
    wanted.backward()
    torch.testing.assert_close(found, wanted.detach())
    for t, block in enumerate(built.blocks):
        torch.testing.assert_close(model.blocks[factor * t].linear.weight.grad, block.linear.weight.grad)
    assert model.blocks[1].linear.weight.grad is None
    assert [block.step for block in model.blocks] == [0.5] * 8


def _moved(name, factor):
    head, number, rest = name.split(".", 2)
    return f"{head}.{int(number) * factor}.{rest}"


def test_a_foreign_residual_block_takes_an_euler_step():
    torch.manual_seed(0)
    model = ResidualMLP(3, 4, 3, depth=4, activation=torch.tanh).double()
    dynamics = DynamicalNet(3, 4, 3, depth=4, time=4.0).double()
    dynamics.load_state_dict(model.state_dict())
    batch = data()[0]
    found, wanted = (coarse_of(m, bounds=(0, 2, 4)).backward(batch) for m in (model, dynamics))
    torch.testing.assert_close(found, wanted)


def test_prolongation_is_linear_and_leaves_the_coarse_weights():
    model = net()
    for t, block in enumerate(model.blocks):
        nn.init.constant_(block.linear.bias, [0.0, 9, 9, 9, 4, 9, 9, 9][t])
    model.blocks[2].linear.bias.requires_grad_(False)
    coarse_of(model, 4).prolong()
    assert [block.linear.bias[0].item() for block in model.blocks] == [0, 1, 9, 3, 4, 4, 4, 4]


def test_groups_end_at_cuts_and_where_blocks_differ():
    assert coarse_of(net(), 2, (0, 3, 8)).groups == {0: 2, 2: 1, 3: 2, 5: 2, 7: 1}
    assert coarse_of(net(), 3, (0, 4, 8)).groups == {0: 3, 3: 1, 4: 3, 7: 1}


def test_pairs_at_the_cut_are_state_and_gradient_of_the_coarse_model():
    model, batch = net(), data()[0]
    coarse = coarse_of(model)
    weights = slow.weights_of(model)
    loss, (state, _, costate) = slow.algorithm3(weights, batch, 0.5, 0.1, 4, step=2)
    torch.testing.assert_close(coarse.backward(batch), loss)
    torch.testing.assert_close(coarse.pairs[4], (state, costate))


def test_blocks_that_have_no_coarser_model_are_refused():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with pytest.raises(hp.ChainError, match=r"coarse_factor=2.*set coarse_steps=0"):
        trained(ParallelInTime(), model, data())
    trained(ParallelInTime(coarse_steps=0), model, data())


# Blocks


def test_an_euler_block_is_the_residual_block():
    torch.manual_seed(0)
    block, x = EulerBlock(4, step=0.3), torch.randn(5, 4)
    torch.testing.assert_close(block(x), x + 0.3 * torch.tanh(x @ block.linear.weight.T + block.linear.bias))


def test_a_verlet_block_can_be_run_backwards_and_keeps_volumes():
    torch.manual_seed(0)
    block, x = VerletBlock(6, step=0.7).double(), torch.randn(6, dtype=torch.float64)
    y, z = block(x).chunk(2, -1)
    z = z + 0.7 * block._force(y)
    y = y - 0.7 * block._force(z)
    torch.testing.assert_close(torch.cat([y, z]), x)
    assert torch.linalg.det(torch.autograd.functional.jacobian(block, x)).item() == pytest.approx(1.0)


@pytest.mark.parametrize(("kind", "ratio"), [(EulerBlock, 2), (VerletBlock, 2)])
def test_halving_the_step_halves_the_error_of_the_discretisation(kind, ratio):
    torch.manual_seed(0)
    block, x = kind(4).double(), torch.randn(3, 4, dtype=torch.float64)

    def run(steps):
        block.step, state = 1.0 / steps, x
        for _ in range(steps):
            state = block(state)
        return state

    exact = run(4096)
    errors = [(run(n) - exact).norm().item() for n in (16, 32)]
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.15)
    assert isinstance(block, Dynamics)


def test_blocks_say_what_they_need():
    with pytest.raises(ValueError, match=r"width=3.*even"):
        VerletBlock(3)
    with pytest.raises(ValueError, match=r"scheme='heun'.*'euler', 'verlet'"):
        DynamicalNet(2, 4, 2, 4, scheme="heun")


# Layer-parallel windows


def test_windows_train_by_the_delayed_schedule():
    """Transcribed: disjoint windows, but all windows except the last take their loss with the head of a step before."""
    torch.manual_seed(2)
    model = ResidualMLP(3, 5, 3, 6).double()
    reference, batches = copy.deepcopy(model), data()
    trained(ParallelWindows(3), model, batches, torch.optim.Adam)
    chain, optimizer = hp.Chain.from_model(reference, batches[0]), torch.optim.Adam(reference.parameters())
    delayed = copy.deepcopy(reference.head.state_dict())
    last = ("blocks.4", "blocks.5", "head")
    for batch in batches:
        now = copy.deepcopy(reference.head.state_dict())
        found = {}
        for head, wanted in ((delayed, False), (now, True)):
            reference.head.load_state_dict(head)
            reference.zero_grad()
            hp.horizon_backward(chain, batch, 2, 2)
            found |= {n: p.grad for n, p in reference.named_parameters() if n.startswith(last) is wanted}
        for name, p in reference.named_parameters():
            p.grad = found[name]
        optimizer.step()
        delayed = now
    assert equal(model, reference)


@pytest.mark.parametrize("family", families(fm.tied, fm.gpt2, fm.gemma2, fm.in_place))
def test_the_first_step_of_windows_is_that_of_disjoint_windows(family):
    case = family()
    chain = hp.Chain.from_model(case.model, case.batch)
    bounds = hp.Schedule.local(chain.depth, 2)
    method = ParallelWindows(2)
    method.prepare(chain, case.batch)
    still = torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], lr=0.0)
    loss, wanted = oracle.step(lambda: hp.horizon_backward(chain, case.batch, bounds), case.model)
    again, found = oracle.step(lambda: method.step(chain, case.batch, still), case.model)
    assert torch.equal(loss, again)
    oracle.assert_same_gradients(found, wanted, max(case.tolerance, 1e-6))


# In a trainer


def run(model, method, **options):
    return hp.train(model, data(), algorithm=method, loss=F.cross_entropy, progress=False, **options)


@pytest.mark.parametrize("method", [lambda: ParallelInTime(coarse_steps=3), lambda: ParallelWindows(2)])
@pytest.mark.parametrize("save_every", [2, 5, 11])
def test_a_resumed_run_is_the_same_run(method, save_every, tmp_path):
    whole, parted = net(), net()
    wanted = run(whole, method(), epochs=2)

    class Stop(hp.Callback):
        def on_step_end(self, run, entry):
            if run.step == save_every + 1:
                raise KeyboardInterrupt

    options = {"epochs": 2, "run_dir": tmp_path, "save_every": save_every}
    with pytest.raises(KeyboardInterrupt):
        run(parted, method(), callbacks=[Stop()], **options)
    state = copy.deepcopy(parted)
    second = method()
    found = run(state, second, resume=True, **options)
    assert equal(whole, state)
    assert [e["loss"] for e in found.history] == [e["loss"] for e in wanted.history]
    if isinstance(second, ParallelInTime):
        assert [e.step for e in second.errors] == list(range(3, 16))


@pytest.mark.parametrize("kind", [ParallelInTime, ParallelWindows])
@pytest.mark.parametrize(
    "option",
    [
        {"accumulate": 2},
        {"max_grad_norm": 1.0},
        {"precision": "bf16"},
        {"fused": True},
        {"nonfinite": "skip"},
        {"nonfinite": "rollback", "run_dir": "there"},
        {"warmup": 1, "epochs": 2},
        {"cosine_every": 1},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_cannot_be_honoured_is_refused(kind, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=next(iter(option))):
        run(net(), kind(), **option)


@pytest.mark.parametrize("kind", [lambda: ParallelInTime(coarse_steps=2), ParallelWindows])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
def test_compiled_blocks_and_schedules_are_honoured(kind):
    plain, compiled = net(), net()
    decay = {"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9), "scheduler_every": "step"}
    run(plain, kind(), **decay)
    result = run(compiled, kind(), compile="eager", **decay)
    assert equal(plain, compiled)
    assert math.isfinite(result.final_loss)


@pytest.mark.parametrize(
    "kind", [lambda: ParallelInTime(coarse_steps=2), lambda: ParallelInTime(coarse_steps=9), ParallelWindows]
)
def test_a_step_that_is_not_finite_leaves_the_weights(kind):
    batches, model, method = data(), net(), kind()
    chain = hp.Chain.from_model(model, batches[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches[:4]:
        method.step(chain, batch, optimizer)
    before = copy.deepcopy(model)
    with pytest.raises(FloatingPointError, match=r"loss is nan.*were not updated"):
        method.step(chain, (batches[4][0] * math.nan, batches[4][1]), optimizer)
    assert equal(model, before)
    assert all(p.grad is None for p in model.parameters())
    assert torch.isfinite(method.step(chain, batches[5], optimizer))


def test_a_method_may_give_way_to_another_in_one_process():
    result = run(net(), {0: ParallelInTime(coarse_steps=2), 1: Horizon(4, 4)}, epochs=2)
    assert len(result.history) == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": 0}, "parts=0"),
        ({"parts": True}, "parts=True"),
        ({"coarse_factor": 1}, "coarse_factor=1"),
        ({"coarse_steps": -1}, "coarse_steps=-1"),
        ({"split": "middle"}, "split='middle'.*'blocks', 'memory'"),
        ({"decay": 0}, "decay=0"),
        ({"decay": 1.5}, "decay=1.5"),
        ({"ridge": 0}, "ridge=0"),
        ({"time_limit": 0}, "time_limit=0"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ParallelInTime(**settings)


def test_cuts_that_cannot_be_are_named():
    with pytest.raises(ValueError, match=r"parts=9.*8 blocks"):
        trained(ParallelInTime(9), net(), data())
    with pytest.raises(ValueError, match=r"split=\(3, 5\)"):
        trained(ParallelInTime(2, split=[3, 5]), net(), data())
    case = fm.tied()
    with pytest.raises(hp.ChainError, match=r"used in parts 0 and 1.*split="):
        ParallelInTime(2).prepare(hp.Chain.from_model(case.model, case.batch), case.batch)
    with pytest.raises(ValueError, match="prepare"):
        ParallelInTime().state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [32, 128])
@pytest.mark.parametrize("scaled", [True, False])
def test_with_all_defaults_real_digits_are_learned(batch_size, scaled):
    """Residual network, AdamW, loss=None, as many steps for all batch sizes; within two points of back-propagation."""
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset

    pixels, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = (pixels / 16 if scaled else (pixels - pixels.mean(0)) / (pixels.std(0) + 1e-6)).float()
    train, val = TensorDataset(x[:1400], labels[:1400]), TensorDataset(x[1400:], labels[1400:])
    accuracy, epochs = {}, batch_size // 4
    for method in (BackPropagation(), ParallelInTime()):
        torch.manual_seed(0)
        model = ResidualMLP(64, 32, 10, depth=8)
        loader = DataLoader(train, batch_size, shuffle=True)
        result = hp.train(model, loader, algorithm=method, epochs=epochs, val_data=val, progress=False, watch_every=0)
        accuracy[type(method)] = result.val_metrics["accuracy"]
    assert accuracy[ParallelInTime] > accuracy[BackPropagation] - 0.02
