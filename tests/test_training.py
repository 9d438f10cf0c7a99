"""The trainer trains as a plain loop does, logs what it did, and stops before it does harm.

Oracles: a torch loop written out, the plan's measured memory, the probes.
"""

import gc
import json
import math
import statistics

import oracle
import pytest
import torch
from families import ResidualMLP
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import horizonplan as hp
from horizonplan import algorithms
from horizonplan.batch import resolve_loss
from horizonplan.gradient import engine
from horizonplan.training import evaluate

DEPTH = 4


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    gc.freeze()
    yield
    gc.unfreeze()


def task(p=0.1, count=4, rows=16):
    torch.manual_seed(4)
    model = ResidualMLP(DEPTH, width=12, p=p)
    truth = torch.randn(4, 3)
    inputs = [torch.randn(rows, 4) for _ in range(count)]
    return model, [(x, (x @ truth).argmax(1)) for x in inputs]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def trained(model, data, **kwargs):
    return hp.train(model, data, **{"optimizer": sgd, "progress": False, **kwargs})


def assert_same_weights(model, weights):
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.fixture(scope="module")
def plan():
    model, data = task()
    return hp.plan_horizon(
        model, data, objective=hp.AccuracyConstraint(0.6), rollout_steps=8, optimizer=sgd, progress=False
    )


def plain_loop(model, data, epochs, seed, optimizer=sgd):
    torch.manual_seed(seed)
    model.train()
    made, losses = optimizer(model.parameters()), []
    for _ in range(epochs):
        for x, y in data:
            made.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            made.step()
            losses.append(loss.item())
    return losses


def test_back_propagation_is_the_plain_loop_bit_for_bit():
    model, data = task(p=0.3)
    losses = plain_loop(model, data, epochs=3, seed=5)
    twin, _ = task(p=0.3)
    result = trained(twin, data, epochs=3, seed=5)
    assert [step["loss"] for step in result.history] == losses
    assert_same_weights(twin, model.state_dict())


METHODS = [
    algorithms.Horizon(1),
    algorithms.Horizon(2),
    algorithms.Horizon(3, stride=3),
    algorithms.Horizon(4, recompute=1),
    algorithms.LoCo(3),
    algorithms.LoCo(2, summed=True),
    algorithms.LocalLearning(2),
    algorithms.BackPropagation(recompute=2),
    None,
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_learns(method):
    model, data = task(p=0.0)
    result = trained(model, data, algorithm=method, epochs=12)
    first = statistics.fmean(step["loss"] for step in result.history[: len(data)])
    assert result.final_loss < 0.6 * first


@pytest.mark.parametrize("recompute", [1, 2])
def test_recomputation_changes_no_weight(recompute):
    model, data = task(p=0.3)
    trained(model, data, epochs=2)
    twin, _ = task(p=0.3)
    trained(twin, data, epochs=2, algorithm=algorithms.BackPropagation(recompute))
    assert_same_weights(twin, model.state_dict())


def test_a_plan_trains_as_its_schedule_does(plan):
    model, data = task()
    result = trained(model, data, plan=plan, epochs=2)
    twin, _ = task()
    own = trained(twin, data, algorithm=algorithms.Horizon(plan.horizon, plan.stride, plan.recompute), epochs=2)
    assert result.history == own.history
    assert_same_weights(twin, model.state_dict())


@pytest.mark.parametrize("optimizer", [sgd, None, lambda p: torch.optim.Adam(p, lr=1e-2)])
def test_the_peak_is_what_the_plan_measured(optimizer):
    model, data = task()
    plan = hp.plan_horizon(
        model, data, objective=hp.Weighted(1.0), rollout_steps=4, optimizer=optimizer, progress=False
    )
    assert plan.row.memory_source == "measured"
    peak = trained(model, data, plan=plan, optimizer=optimizer).peak_bytes
    if plan.horizon == plan.depth:  # trained by back-propagation itself, which holds a little less
        assert 0.9 * plan.row.memory_bytes < peak <= plan.row.memory_bytes
    else:
        assert peak == plan.row.memory_bytes


def test_the_peak_of_a_truncated_step_is_what_the_plan_measured():
    model, data = task()
    card = hp.probes.memory(hp.Chain.from_model(model, data[0]), data, [2])[0].value
    plan = hp.plan_horizon(model, data, objective=hp.MemoryLimit(card), rollout_steps=0, strides=(1,), progress=False)
    assert plan.horizon < plan.depth
    assert trained(model, data, plan=plan, optimizer=None).peak_bytes == plan.row.memory_bytes


def test_history_has_a_step_for_each_batch(plan):
    model, data = task()
    result = trained(model, data, plan=plan, epochs=3, val_data=data[:2])
    assert [(h["epoch"], h["step"]) for h in result.history] == [(i // 4, i) for i in range(12)]
    assert result.final_loss == statistics.fmean(h["loss"] for h in result.history[-4:])
    assert [v["epoch"] for v in result.validations] == [0, 1, 2]
    assert result.val_metrics == {k: v for k, v in result.validations[-1].items() if k != "epoch"}
    assert result.val_metrics == evaluate(model, data[:2], resolve_loss(), torch.device("cpu"))
    assert 0 < result.step_seconds < result.seconds


def test_evaluation_is_the_mean_over_samples_in_eval_mode():
    model, data = task(p=0.5)
    uneven = [data[0], (data[1][0][:5], data[1][1][:5])]
    model.train()
    model.blocks[0].eval()
    found = evaluate(model, uneven, resolve_loss(), torch.device("cpu"))
    assert [m.training for m in (model, model.blocks[0], model.blocks[1])] == [True, False, True]
    model.eval()
    x, y = (torch.cat(parts) for parts in zip(*uneven, strict=True))
    with torch.no_grad():
        scores = model(x)
    assert found["loss"] == pytest.approx(F.cross_entropy(scores, y).item())
    assert found["accuracy"] == (scores.argmax(1) == y).double().mean().item()


def test_regression_has_no_accuracy():
    blocks = [nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2)]
    model, batch = nn.Sequential(*blocks, nn.Linear(3, 2)), (torch.randn(4, 3), torch.randn(4, 2))
    assert set(trained(model, [batch], val_data=[batch]).val_metrics) == {"loss"}


def test_the_run_s_folder_holds_log_plan_and_weights(plan, tmp_path):
    model, data = task()
    folder = tmp_path / "runs" / "first"
    result = trained(model, data, plan=plan, epochs=2, val_data=data[:1], run_dir=folder)
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [e for e in events if e["event"] == "step"]
    assert [{k: e[k] for k in ("epoch", "step", "loss")} for e in steps] == list(result.history)
    assert all(e["seconds"] > 0 for e in steps)
    validations = [e for e in events if e["event"] == "validation"]
    assert [e["loss"] for e in validations] == [v["loss"] for v in result.validations]
    told = [e["event"] for e in events if e["event"] not in ("memory", "save")]
    assert told == ["begin", *["epoch_begin", *["step"] * 4, "validation", "epoch"] * 2]
    assert sorted(e["time"] for e in events) == [e["time"] for e in events]
    assert hp.Plan.load(folder / "plan.json") == plan
    twin, _ = task()
    twin.load_state_dict(load_file(folder / "model.safetensors"))
    assert_same_weights(twin, model.state_dict())


def test_an_optimiser_of_the_user_s_own_is_stepped():
    model, data = task()
    losses = plain_loop(model, data, epochs=1, seed=0)
    twin, _ = task()
    optimizer = sgd(twin.parameters())
    assert [h["loss"] for h in trained(twin, data, optimizer=optimizer).history] == losses
    assert all("momentum_buffer" in state for state in optimizer.state.values())
    assert all(p.grad is None for p in twin.parameters())


def test_no_optimiser_is_adamw():
    model, data = task()
    losses = plain_loop(model, data, 1, 0, lambda p: torch.optim.AdamW(p, lr=1e-3))
    twin, _ = task()
    assert [h["loss"] for h in trained(twin, data, optimizer=None).history] == losses


def test_frozen_parameters_stay_and_are_not_given_to_the_optimiser():
    model, data = task()
    model.blocks[1].requires_grad_(False)
    before = {n: v.clone() for n, v in model.blocks[1].named_parameters()}
    given = []
    trained(model, data, optimizer=lambda p: given.extend(p) or sgd(given))
    assert all(torch.equal(p, before[n]) for n, p in model.blocks[1].named_parameters())
    assert {id(p) for p in given} == {id(p) for p in model.parameters() if p.requires_grad}


def bad_batch(data, place, value):
    poisoned = [(x.clone(), y) for x, y in data]
    poisoned[place][0][0] = value
    return poisoned


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", [None, algorithms.Horizon(1), algorithms.LocalLearning(2)], ids=str)
def test_a_loss_that_is_not_finite_stops_before_it_does_harm(method, value):
    model, data = task(p=0.0)
    trained(model, data[:2], algorithm=method)
    healthy = {n: p.detach().clone() for n, p in model.named_parameters()}
    twin, _ = task(p=0.0)
    with pytest.raises(FloatingPointError, match="loss is nan: check the data, lower the learning rate or clip"):
        trained(twin, bad_batch(data, 2, value), algorithm=method)
    for name, p in twin.named_parameters():
        assert torch.equal(p, healthy[name]), name
        assert p.grad is None


def test_mode_generator_and_hooks_are_restored_even_when_it_fails(monkeypatch):
    model, data = task()
    model.eval()
    model.blocks[2].train()
    dataset = TensorDataset(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    modes, entries = [m.training for m in model.modules()], [set(vars(m)) for m in model.modules()]
    for source in (data, dataset, DataLoader(dataset, 8, shuffle=True)):
        torch.manual_seed(9)
        state = torch.get_rng_state()
        trained(model, source, val_data=data[:1])
        assert [m.training for m in model.modules()] == modes
        assert [set(vars(m)) for m in model.modules()] == entries
        assert torch.equal(torch.get_rng_state(), state)

    def fails(self, op):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.Step, "_pull", fails)
    with pytest.raises(KeyboardInterrupt):
        trained(model, data, algorithm=algorithms.Horizon(2))
    assert [m.training for m in model.modules()] == modes
    assert [set(vars(m)) for m in model.modules()] == entries
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_dataset_is_shuffled_by_the_seed():
    _, data = task(count=8)
    dataset = TensorDataset(*(torch.cat(parts) for parts in zip(*data, strict=True)))

    def losses(seed, noise):
        torch.manual_seed(noise)
        twin, _ = task(p=0.0)
        return [h["loss"] for h in trained(twin, dataset, epochs=2, seed=seed).history]

    assert losses(0, noise=1) == losses(0, noise=2)
    assert losses(1, noise=1) != losses(0, noise=1)
    assert len(losses(0, 1)) == 2 * 4  # 128 samples, 32 a batch
    assert losses(0, 1)[:4] != losses(0, 1)[4:]


def test_progress_tells_every_epoch():
    model, data = task()
    told = []
    trained(model, data, epochs=2, val_data=data[:1], progress=lambda *stage: told.append(stage))
    assert [done for _, done, _ in told] == [0, 1, 2]
    assert all("loss" in message and "validation accuracy" in message for message, *_ in told[:2])


def test_gradients_left_by_the_user_do_not_enter():
    model, data = task()
    losses = plain_loop(model, data, epochs=1, seed=0)
    twin, _ = task()
    oracle.back_propagation(hp.Chain.from_model(twin, data[0]), data[0])
    for p in twin.parameters():
        p.grad = torch.full_like(p, 7.0)
    twin.load_state_dict(task()[0].state_dict())
    assert [h["loss"] for h in trained(twin, data).history] == losses


BAD = [
    ({"epochs": 0}, "epochs=0: give a whole number >= 1"),
    ({"epochs": True}, "epochs=True"),
    ({"optimizer": 0.1}, "optimizer=0.1: give callable"),
    ({"optimizer": lambda p: None}, "optimizer=<function"),
    ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, "none of this model's trainable parameters"),
    ({"algorithm": algorithms.Horizon(9)}, "horizon=9"),
    ({"algorithm": algorithms.Horizon(2, stride=3)}, "stride=3"),
    ({"algorithm": algorithms.LoCo(9)}, "stages=9"),
    ({"algorithm": algorithms.LocalLearning(0)}, "parts=0"),
    ({"blocks": "layers.*"}, "blocks='layers.*' matches no submodule"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_named_and_the_weights_stay(arguments, message):
    model, data = task()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message.replace("*", r"\*").replace(".", r"\.")):
        trained(model, data, **arguments)
    assert_same_weights(model, before)
    assert all(p.grad is None for p in model.parameters())


def test_plan_and_algorithm_exclude_each_other(plan):
    model, data = task()
    with pytest.raises(ValueError, match="plan and algorithm are both given"):
        trained(model, data, plan=plan, algorithm=algorithms.Horizon(1))
