"""``verify`` agrees with what the probes measure, and says so when a plan promised something else."""

import dataclasses
import gc
import math

import pytest
import torch
from families import ResidualMLP, classes
from test_probes import Interrupted, interrupt, unchanged

import horizonplan as hp
from horizonplan.probes import Sample
from horizonplan.verify import Check, Report, _at_least

DEPTH = 4


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    gc.freeze()
    yield
    gc.unfreeze()


def task():
    torch.manual_seed(3)
    model = ResidualMLP(DEPTH, width=12, p=0.0)
    truth = torch.randn(4, 3)
    inputs = [torch.randn(16, 4) for _ in range(5)]
    return model, [(x, (x @ truth).argmax(1)) for x in inputs]


def fast(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture(scope="module")
def plan():
    model, data = task()
    return hp.plan_horizon(
        model, data, objective=hp.AccuracyConstraint(0.5), rollout_steps=8, optimizer=fast, progress=False
    )


def test_a_plan_holds_on_what_it_was_made_from(plan):
    model, data = task()
    patient = dataclasses.replace(plan, row=dataclasses.replace(plan.row, step_seconds=60.0))
    report = hp.verify(patient, model, data, steps=8, optimizer=fast)
    assert report.memory == Check(plan.row.memory_bytes, plan.row.memory_bytes, True)
    assert report.rate == Check(plan.row.rate, plan.row.rate, True)
    assert (report.time.predicted, report.time.ok) == (60.0, True)
    assert 0 < report.time.measured < 60
    assert report.ok


@pytest.mark.parametrize(
    ("quantity", "row"),
    [("memory", {"memory_bytes": 1000}), ("time", {"step_seconds": 1e-9}), ("rate", {"rate": 7.0})],
)
def test_what_a_plan_promised_in_vain_is_not_ok(plan, quantity, row):
    model, data = task()
    boastful = dataclasses.replace(plan, row=dataclasses.replace(plan.row, **row))
    report = hp.verify(boastful, model, data, steps=8, optimizer=fast)
    assert getattr(report, quantity).ok is False
    assert not report.ok


def test_what_is_not_known_is_not_judged(plan):
    model, data = task()
    silent = dataclasses.replace(plan, row=dataclasses.replace(plan.row, rate=None, step_seconds=None))
    report = hp.verify(silent, model, data, steps=4, optimizer=fast)
    assert (report.rate.predicted, report.rate.ok) == (None, None)
    assert (report.time.predicted, report.time.ok) == (None, None)
    assert not report.ok


def test_a_recomputing_plan_is_verified_with_recompute(plan):
    model, data = task()
    row = next(row for row in plan.rows if row.recompute == 1)
    chosen = dataclasses.replace(plan, row=row)
    chain = hp.Chain.from_model(model, data[0])
    wanted = hp.probes.memory(chain, data, [DEPTH], optimizer=fast, recompute=1)[0].value
    assert hp.verify(chosen, model, data, steps=2, optimizer=fast).memory.measured == wanted


def test_noise_is_forgiven_and_a_shortfall_is_not():
    sample = Sample("rate", "1", 2, 1, 0.8, stderr=0.2)
    assert _at_least(1.15, sample).ok is True  # two standard errors
    assert _at_least(1.25, sample).ok is False
    assert _at_least(0.89, dataclasses.replace(sample, stderr=None)).ok is True
    assert _at_least(0.91, dataclasses.replace(sample, stderr=None)).ok is False
    assert _at_least(0.5, dataclasses.replace(sample, value=math.nan)) == Check(0.5, None, None)


def test_a_report_is_ok_only_if_all_three_hold():
    yes, no, open_ = Check(1, 1, True), Check(1, 2, False), Check(None, 1, None)
    assert Report(yes, yes, yes).ok
    assert not Report(yes, open_, yes).ok
    assert not Report(yes, no, open_).ok


def test_verifying_leaves_everything_bit_for_bit(plan, monkeypatch):
    model, _ = task()
    optimizer = torch.optim.Adam(model.parameters())
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    model.eval()
    dataset = torch.utils.data.TensorDataset(torch.randn(40, 4), classes(40))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    with unchanged(model, optimizer):
        hp.verify(plan, model, loader, steps=3, optimizer=optimizer)
    interrupt(monkeypatch, 40)
    with unchanged(model, optimizer), pytest.raises(Interrupted):
        hp.verify(plan, model, loader, steps=30, optimizer=optimizer)
