"""``verify`` agrees with what the probes measure, and says so when a plan promised something else."""

import copy
import dataclasses
import gc
import math

import pytest
import torch
from families import ResidualMLP, classes
from test_probes import Interrupted, interrupt, unchanged
from torch import nn

import horizonplan as hp
from horizonplan.candidates import with_measured_bytes
from horizonplan.probes import Sample
from horizonplan.probes.budget import Budget
from horizonplan.verify import Beside, Check, Report, _at_least, _in_time

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
    exact = hp.Row(horizon=DEPTH, memory_bytes=1, step_seconds=1.0)
    took = [Beside(exact, seconds, 0.01) for seconds in (0.02, 0.0249, 0.0251, 2.0)]
    assert [_in_time(slow, beside).ok for beside in took] == [True, True, False, False]
    unclocked = dataclasses.replace(exact, step_seconds=None)
    clockless = dataclasses.replace(slow, rows=[dataclasses.replace(row, step_seconds=None) for row in slow.rows])
    assert [_in_time(clockless, Beside(unclocked, seconds, 0.01)).ok for seconds in (2.4, 2.6)] == [True, False]


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


class Normed(ResidualMLP):
    """Micro-batches have other gradients: the norm couples the samples."""

    def __init__(self):
        super().__init__(DEPTH, width=12, p=0.0, norm=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return super().forward(self.norm(x))


@pytest.mark.parametrize(("parts", "precision"), [(1, "fp32"), (4, "fp32"), (1, "bf16")])
def test_the_rate_is_that_of_the_plan_s_own_steps(plan, parts, precision):
    """The oracle: two training loops written out."""
    _, data = task()
    torch.manual_seed(0)
    model = Normed()
    start = copy.deepcopy(model.state_dict())
    row = hp.Row(horizon=DEPTH, memory_bytes=10**6, micro_batches=parts, precision=precision)
    plain = dataclasses.replace(plan.rows[0], horizon=DEPTH, cosine=1.0, cosine_source="derived", step_seconds=1.0)
    rows = (plain, *([row] if row.micro_batches > 1 or precision != "fp32" else []))
    given = dataclasses.replace(plan, row=rows[-1], rows=rows, provenance={})
    report = hp.verify(given, model, data, steps=5, optimizer=fast)

    def losses(micro, bf16):
        model.load_state_dict(start)
        made, found = fast(model.parameters()), []
        for x, y in data:
            made.zero_grad()
            total = 0.0
            for piece, target in zip(x.chunk(micro), y.chunk(micro), strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = nn.functional.cross_entropy(model(piece), target) / micro
                loss.backward()
                total += loss.item()
            made.step()
            found.append(total)
        return found

    model.load_state_dict(start)
    with torch.no_grad():
        initial = nn.functional.cross_entropy(model(data[-1][0]), data[-1][1]).item()
    ours, exact = losses(parts, precision == "bf16")[-1], losses(1, False)[-1]
    assert report.rate.measured == pytest.approx(math.log(ours / initial) / math.log(exact / initial), rel=1e-4)
    assert (ours == exact) == (parts == 1 and precision == "fp32")


def test_where_back_propagation_does_not_fit_another_exact_step_runs_beside_the_plan(plan):
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()) for _ in range(6))
    model = nn.Sequential(*blocks, nn.Linear(32, 4))
    data = [(torch.randn(256, 32), torch.randint(0, 4, (256,))) for _ in range(3)]
    chain = hp.Chain.from_model(model, data[0])
    limit = round(0.75 * hp.probes.memory(chain, data, [6])[0].value)
    made = hp.plan_horizon(
        model, data, objective=hp.MemoryLimit(limit), rollout_steps=0, device=f"emulated:{limit}", progress=False
    )
    with Budget(limit) as budget:
        budget.hold(list(model.parameters()), list(model.buffers()))
        report = hp.verify(made, model, data, steps=4)
    assert made.horizon < 6
    assert report.memory.ok
    assert report.time.measured > 0
    assert math.isfinite(report.rate.measured)


def test_larger_batches_than_the_plan_s_are_refused(plan):
    model, data = task()
    with pytest.raises(ValueError, match="batches have 32 samples, and the plan was made for 16"):
        hp.verify(plan, model, [(torch.cat([x, x]), torch.cat([y, y])) for x, y in data])


def test_measured_bytes_count_against_a_limit_on_the_device_too():
    row = hp.Row(horizon=2, memory_bytes=100, device_bytes=130, nvml_bytes=120, fits=True, rate=0.5)
    seen = with_measured_bytes(row, 300)
    assert (seen.memory_bytes, seen.device_bytes, seen.nvml_bytes) == (300, 330, 320)
    assert hp.MemoryLimit(160).shortfall_of(seen, 1.0) > 0


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
