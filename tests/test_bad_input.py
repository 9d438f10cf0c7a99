"""Bad input gets one clear error, which names the parameter, the value and the remedy, and leaves nothing behind."""

import json
import math

import pytest
import torch
from families import ResidualMLP, classes
from test_probes import unchanged
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import horizonplan as hp

DEPTH = 4


def good():
    model = ResidualMLP(DEPTH, p=0.1)
    model.zero_grad(set_to_none=True)
    model.blocks[0].linear.weight.grad = torch.ones(6, 6)  # a gradient of the user's own
    model.blocks[3].eval()
    return model, [(torch.randn(5, 4), classes(5)) for _ in range(2)]


def plan(model, data, **kwargs):
    return hp.plan_horizon(model, data, **{"rollout_steps": 0, "progress": False, **kwargs})


def train(model, data, **kwargs):
    return hp.train(model, data, progress=False, **kwargs)


def backward(model, data, **kwargs):
    chain = hp.Chain.from_model(model, data[0])
    return hp.horizon_backward(chain, data[0], **kwargs)


def refused(act, model, data, *messages, error=ValueError, **kwargs):
    """One error of one kind with all the messages in it, and everything as it was."""
    with unchanged(model), pytest.raises(error) as caught:
        act(model, data, **kwargs)
    text = str(caught.value)
    for message in messages:
        assert message in text
    assert len(text.splitlines()) < 20


EMPTY = {
    "list": [],
    "tuple": (),
    "dataset": TensorDataset(torch.zeros(0, 4)),
    "loader": DataLoader(TensorDataset(torch.zeros(0, 4))),
    "drops its last": DataLoader(TensorDataset(torch.zeros(3, 4)), batch_size=5, drop_last=True),
}


@pytest.mark.parametrize("act", [plan, train])
@pytest.mark.parametrize("kind", EMPTY)
def test_empty_data(act, kind):
    refused(act, good()[0], EMPTY[kind], "data", "give at least one")


@pytest.mark.parametrize("act", [plan, train])
@pytest.mark.parametrize("data", [iter([1]), torch.zeros(3), {"x": 1}, 3, None])
def test_data_of_another_kind(act, data):
    refused(act, good()[0], data, f"data is a {type(data).__name__}", "give a DataLoader, a list of batches")


@pytest.mark.parametrize("horizon", [0, -1, DEPTH + 1, 1.5, True, "2", None])
def test_a_horizon_that_the_chain_does_not_have(horizon):
    refused(backward, *good(), f"horizon={horizon!r}", horizon=horizon)
    refused(plan, *good(), "horizons=[1, ", f"{horizon!r}", "between 1 and 4", horizons=[1, horizon])


@pytest.mark.parametrize("horizons", [[], (), 3, "12"])
def test_no_horizons_to_measure(horizons):
    refused(plan, *good(), f"horizons={horizons!r}", "give whole numbers between 1 and 4", horizons=horizons)


@pytest.mark.parametrize("stride", [0, 3, -1, 1.0, "horizon"])
def test_a_stride_that_is_longer_than_the_horizon_or_none(stride):
    refused(backward, *good(), f"stride={stride!r}", horizon=2, stride=stride)


@pytest.mark.parametrize("strides", [(), [], "horizon", 1, None, {1}])
def test_strides_that_are_no_sequence(strides):
    refused(plan, *good(), f"strides={strides!r}", "such as (1, 'horizon')", strides=strides)


@pytest.mark.parametrize("stride", [0, -1, DEPTH + 1, 1.5, True, "blocks", None])
def test_a_stride_that_no_horizon_has(stride):
    refused(plan, *good(), f"stride={stride!r}", "between 1 and", "or 'horizon'", strides=(1, stride))


@pytest.mark.parametrize(
    ("name", "value"),
    [("batches", None), *((name, value) for name in ("batches", "rollout_steps") for value in (-1, 1.5, "4", True))],
)
def test_counts_that_are_none(name, value):
    refused(plan, *good(), f"{name}={value!r}", "give a whole number", **{name: value})


def test_no_batches():
    refused(plan, *good(), "batches=0", "give a whole number >= 1", batches=0)


@pytest.mark.parametrize("candidates", ["some", "", None, 3, ["all"]])
def test_unknown_candidates(candidates):
    refused(plan, *good(), f"candidates={candidates!r}", "'horizons' or 'all'", candidates=candidates)


@pytest.mark.parametrize("objective", ["accuracy", 0.1, hp.AccuracyConstraint])
def test_an_objective_that_is_none(objective):
    refused(plan, *good(), "objective=", "give AccuracyConstraint, Weighted, MemoryLimit", objective=objective)


def test_a_cost_that_is_none():
    refused(plan, *good(), "cost=3", cost=3)
    refused(plan, *good(), "finite", cost=lambda size: math.nan)


@pytest.mark.parametrize("act", [plan, train])
def test_a_loss_that_is_no_scalar(act):
    unreduced = nn.CrossEntropyLoss(reduction="none")
    refused(act, *good(), "loss", "(5,)", "scalar", loss=unreduced)
    refused(act, *good(), "scalar", compute_loss=lambda model, batch: model(batch[0]))
    refused(act, *good(), "loss", loss=lambda output, target: 1.0)


@pytest.mark.parametrize("act", [plan, train])
def test_two_losses(act):
    refused(act, *good(), "loss", "compute_loss", loss=F.cross_entropy, compute_loss=lambda m, b: m(b[0]).sum())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(value):
    model, data = good()
    data[1][0][0] = value
    refused(plan, model, data, "loss is nan", "batch 1", "check the data")
    data[0][0][0] = value
    refused(plan, model, data, "loss is nan", "check the data")


def test_a_batch_that_the_model_rejects():
    wide = [(torch.randn(5, 9), classes(5))]
    for act in (plan, train):
        refused(act, good()[0], wide, "batch: ResidualMLP rejected a tuple of tensors [(5, 9), (5,)]", "RuntimeError")
        refused(act, good()[0], [(torch.randn(5, 4),)], "batch", "compute_loss=")
        refused(act, good()[0], [(torch.randn(5, 4), torch.randn(5, 8))], "loss=None: no default loss for output")


def test_a_later_batch_that_the_model_rejects():
    model, data = good()
    data[1] = (torch.randn(5, 9), classes(5))
    with unchanged(model), pytest.raises(ValueError, match=r"batch: ResidualMLP rejected .*5x9"):
        plan(model, data)


def test_one_module_used_as_two_blocks():
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with pytest.raises(ValueError, match="one module is used as two blocks; give each block a module of its own"):
        hp.Chain(None, [block, block], None)
    model = nn.Sequential(block, nn.Sequential(nn.Linear(4, 4), nn.Tanh()), block, nn.Linear(4, 3))
    data = [(torch.randn(5, 4), classes(5))]
    for act in (plan, train):
        refused(act, model, data, "block", "Ways out: name other blocks", blocks=["0", "1"])
        refused(act, model, data, "one module cannot be two blocks", blocks=["0", "1", "2"])


@pytest.mark.parametrize("act", [plan, train])
@pytest.mark.parametrize("blocks", ["layers.*", "block", ["blocks.0", "blocks.9"], []])
def test_a_pattern_or_name_that_matches_nothing(act, blocks):
    refused(act, *good(), "blocks", blocks=blocks)


@pytest.mark.parametrize("act", [plan, train])
def test_a_model_that_is_none(act):
    with pytest.raises(ValueError, match=r"model is a function: give an nn\.Module"):
        act(lambda x: x, good()[1])


@pytest.mark.parametrize("act", [plan, train])
def test_nothing_to_train(act):
    model, data = good()
    model.requires_grad_(False)
    refused(act, model, data, "unfreeze one")


@pytest.mark.parametrize("optimizer", ["adam", 0.1, lambda p: None])
@pytest.mark.parametrize("act", [plan, train])
def test_an_optimiser_that_is_none(act, optimizer):
    refused(act, *good(), "optimizer=", "give callable(params)", optimizer=optimizer)


def test_a_plan_file_that_is_corrupt_or_newer(tmp_path):
    path = tmp_path / "plan.json"
    for text, message in (("{", "no JSON"), ("{}", "no schema_version"), ('{"schema_version": 99}', "upgrade")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message) as error:
            hp.Plan.load(path)
        assert str(path) in str(error.value)


def test_a_plan_that_cannot_be_met_leaves_nothing_behind():
    refused(plan, *good(), "no candidate is feasible", "10 B", error=hp.InfeasibleError, objective=hp.MemoryLimit(10))


def test_an_interrupted_training_leaves_a_readable_log_and_no_weights_file(tmp_path):
    model, data = good()
    poisoned = [*data, (torch.full((5, 4), math.nan), classes(5))]
    with pytest.raises(FloatingPointError):
        train(model, poisoned, run_dir=tmp_path)
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["step"] for event in events if event["event"] == "step"] == [0, 1]
    assert events[-1]["event"] == "nonfinite"
    assert not (tmp_path / "model.safetensors").exists()


def test_bad_arguments_of_a_training_make_no_folder(tmp_path):
    model, data = good()
    unreduced = nn.NLLLoss(reduction="none")
    for name, value in {"epochs": 0, "optimizer": 3, "blocks": "layers.*", "loss": unreduced}.items():
        with pytest.raises(ValueError, match=name):
            train(model, data, run_dir=tmp_path / "run", **{name: value})
        assert not (tmp_path / "run").exists()
