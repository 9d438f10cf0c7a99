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
from horizonplan.verify import Check, Report, _at_least, _in_time

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
    report = hp.verify(boastful(plan, **row), model, data, steps=8, optimizer=fast)
    assert getattr(report, quantity).ok is False
    assert not report.ok


def test_a_plan_that_holds_is_given_back_as_it_is(plan):
    model, data = task()
    patient = dataclasses.replace(plan, row=dataclasses.replace(plan.row, step_seconds=60.0))
    assert hp.verify(patient, model, data, steps=8, optimizer=fast).plan is patient


def boastful(plan, **row):
    """The plan with a promise in its table."""
    place = plan.rows.index(plan.row)
    told = dataclasses.replace(plan.row, **row)
    return dataclasses.replace(plan, row=told, rows=(*plan.rows[:place], told, *plan.rows[place + 1 :]))


def test_a_plan_that_misses_is_chosen_again_with_what_was_measured(plan):
    model, data = task()
    wanted = hp.AccuracyConstraint(0.01)
    vain = dataclasses.replace(boastful(plan, rate=3.0), objective=wanted)
    report = hp.verify(vain, model, data, steps=8, optimizer=fast)
    assert "rate" in report.missed
    again = report.plan
    old = next(row for row in again.rows if (row.horizon, row.stride) == (plan.horizon, plan.stride))
    assert (old.rate, old.rate_source, old.feasible) == (report.rate.measured, "measured", False)
    assert (old.step_seconds, old.step_seconds_source) == (report.time.measured, "measured")
    assert again.row == hp.select([row for row in again.rows if row.rate is not None], wanted, plan.cost)
    assert again.horizon != plan.horizon
    assert again.schedule.depth == DEPTH
    assert "missed its" in again.explain()
    assert "was not verified" in again.notes[-1]
    assert hp.Plan.from_dict(again.to_dict()).row == again.row


def test_a_miss_that_changes_nothing_is_told(plan):
    model, data = task()
    again = hp.verify(boastful(plan, memory_bytes=1000), model, data, steps=8, optimizer=fast).plan
    assert (again.horizon, again.stride) == (plan.horizon, plan.stride)
    assert again.row.memory_bytes == plan.row.memory_bytes
    assert "still the choice" in again.notes[-1]


def test_what_nothing_meets_stays_and_says_so(plan):
    model, data = task()
    strict = dataclasses.replace(boastful(plan, memory_bytes=1000), objective=hp.MemoryLimit(1500))
    again = hp.verify(strict, model, data, steps=4, optimizer=fast).plan
    assert (again.horizon, again.row.feasible) == (plan.horizon, False)


def test_time_is_compared_with_back_propagation_s_in_the_same_run(plan):
    slow = dataclasses.replace(
        plan,
        row=dataclasses.replace(plan.row, step_seconds=2.0),
        rows=[dataclasses.replace(row, step_seconds=1.0) for row in plan.rows],
    )
    assert [_in_time(slow, seconds, 0.01).ok for seconds in (0.02, 0.0249, 0.0251, 2.0)] == [True, True, False, False]
    clockless = dataclasses.replace(slow, rows=[dataclasses.replace(row, step_seconds=None) for row in slow.rows])
    assert [_in_time(clockless, seconds, 0.01).ok for seconds in (2.4, 2.6)] == [True, False]


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
