"""Runs that are left and gone on with, and a plan by rollouts end to end, on small models."""

import json
import math

import pytest
import torch
from families import ResidualMLP
from test_planner import DEPTH, planned, task
from test_probes import Interrupted, interrupt, lived_in, unchanged
from torch import nn

import horizonplan as hp
from horizonplan.contest import Rollouts
from horizonplan.frugal import Frugal
from horizonplan.probes import Flops, runs
from horizonplan.probes.runs import Runs, Stream
from horizonplan.probing import Probing

pytestmark = pytest.mark.filterwarnings("ignore::horizonplan.PoorFitWarning")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


OPTIMIZERS = {
    "SGD": sgd,
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("room_bytes", [0, None])
def test_a_run_that_is_left_and_gone_on_with_is_the_run_that_is_not(optimizer, room_bytes):
    model, batches, _ = lived_in()  # dropout, BatchNorm
    model.train()
    chain = hp.Chain.from_model(model, batches[0])
    made = OPTIMIZERS[optimizer]
    broken, whole = (Runs(chain, Stream(batches), made, 7, room_bytes=room_bytes) for _ in range(2))
    for steps in (1, 3, 8):
        for pair in ((2, 2), (5, 1)):
            for order in (0, 1):
                broken.advance(pair, steps, order)
    for pair in ((2, 2), (5, 1)):
        for order in (0, 1):
            assert broken.advance(pair, 12, order) == whole.advance(pair, 12, order)
    per_run = 12 if room_bytes is None else 1 + 3 + 8 + 12  # begun anew where there is no room to wait in
    assert broken.stepped == dict.fromkeys(((2, 2), (5, 1)), 2 * per_run)


def test_rates_are_those_of_probes_rollout():
    model, data = task()
    chain = hp.Chain.from_model(model, data[0])
    both = Runs(chain, Stream(data), sgd, 3)
    for steps in (4, 16):
        wanted = hp.probes.rollout(chain, data, [(2, 2)], steps, sgd, 3)[0]
        tail = range(steps - max(1, steps // 4), steps)
        found = runs_sample(both, chain, steps, tail)
        assert found == wanted


def runs_sample(both, chain, steps, tail):
    exact, losses = both.advance((chain.depth, 1), steps), both.advance((2, 2), steps)
    return hp.probes.rate.rate_sample((2, 2), losses, exact, both.start(tail))


def test_everything_is_restored_between_steps_and_after_an_interruption(monkeypatch):
    model, batches, optimizer = lived_in()
    chain = hp.Chain.from_model(model, batches[0])
    here = Runs(chain, Stream(batches), optimizer)
    for steps in (2, 5):
        with unchanged(model, optimizer):
            here.advance((2, 1), steps)
            here.start(range(steps))
    interrupt(monkeypatch, 9)
    with unchanged(model, optimizer), pytest.raises(Interrupted):
        here.advance((3, 1), 30)


def test_batches_are_drawn_as_they_are_needed_and_repeat():
    drawn = []

    def draw():
        for i in range(5):
            drawn.append(i)
            yield torch.tensor(i)

    stream = Stream(draw())
    assert [stream.place(i) for i in range(3)] == [0, 1, 2]
    assert drawn == [0, 1, 2]
    assert [stream.place(i) for i in range(3, 12)] == [3, 4, 0, 1, 2, 3, 4, 0, 1]
    shuffled = [stream.place(i, order=1) for i in range(60)]
    assert shuffled != [stream.place(i) for i in range(60)]
    assert sorted(stream.place(i, 1) for i in range(64)) == sorted(stream.place(i) for i in range(64))
    with pytest.raises(ValueError, match="batches is empty"):
        Stream([]).place(0)


@pytest.mark.parametrize("few", [1, 6])
@pytest.mark.parametrize(
    "objective", [hp.AccuracyConstraint(0.3), hp.Weighted(0.5), hp.MemoryLimit("20KiB")], ids=lambda o: type(o).__name__
)
def test_a_plan_by_rollouts(objective, few):
    model, data = task()
    with unchanged(model):
        plan = planned(
            model,
            data[:few],
            objective=objective,
            accuracy="rollout",
            rollout_steps=16,
            optimizer=sgd,
            rollout_budget=150,
        )
    assert plan.row.feasible
    assert 0 < plan.provenance["probing_steps"]["rollouts"] <= 150
    measured = [row for row in plan.rows if row.rate_source == "measured"]
    assert plan.row in measured or plan.horizon == plan.depth
    assert {row.rate_source for row in plan.rows if row.horizon < plan.depth} <= {"measured", "predicted", "unmeasured"}
    best = hp.select([row for row in plan.rows if row.rate is not None], objective, plan.cost)
    assert plan.row.objective == best.objective
    raw = plan.provenance["rollouts"]
    assert {(h, s) for h, s, _ in raw} >= {(row.horizon, row.stride) for row in measured}
    json.dumps(plan.to_dict(), allow_nan=False)
    assert hp.Plan.from_dict(plan.to_dict()).row == plan.row
    assert "Rates were measured by rollouts" in plan.explain()


@pytest.mark.slow
def test_among_all_candidates_no_other_dominates_the_raced_choice():
    model, data = task()
    kwargs = {"accuracy": "rollout", "rollout_steps": 8, "rollout_budget": 60, "candidates": "all"}
    plan = planned(model, data, objective=hp.AccuracyConstraint(0.3), optimizer=sgd, **kwargs)
    mine = plan.row
    for row in plan.frontier:
        better = (row.memory_bytes < mine.memory_bytes, row.step_seconds < mine.step_seconds, row.rate > mine.rate)
        no_worse = (row.memory_bytes <= mine.memory_bytes, row.step_seconds <= mine.step_seconds, row.rate >= mine.rate)
        assert not (any(better) and all(no_worse))
    recomputed = {(row.horizon, row.stride): row.rate for row in plan.rows if row.recompute and row.horizon < DEPTH}
    plain = {(row.horizon, row.stride): row.rate for row in plan.rows if row.plain}
    assert recomputed == {pair: plain[pair] for pair in recomputed}


def test_measured_rates_in_a_plan_are_those_of_a_rollout():
    model, data = task()
    plan = planned(
        model, data, objective=hp.AccuracyConstraint(0.3), accuracy="rollout", rollout_steps=12, optimizer=sgd
    )
    chain = hp.Chain.from_model(model, data[0])
    alone = [entry for entry in plan.provenance["rollouts"] if entry[2]["orders"] == 1]
    assert alone
    for h, s, detail in alone:
        assert hp.probes.rollout(chain, data, [(h, s)], detail["steps"], sgd)[0].value == detail["rate"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_plan_and_the_price_is_what_was_dispatched():
    plans = []
    for _ in range(2):
        model, data = task()
        with Flops() as counter:
            plans.append(planned(model, data, accuracy="rollout", rollout_steps=8, rollout_budget=60, optimizer=sgd))
    exact = next(row.flops for row in plans[0].rows if row.horizon == plans[0].depth and not row.recompute)
    assert plans[0].rows == plans[1].rows or [r.rate for r in plans[0].rows] == [r.rate for r in plans[1].rows]
    told = plans[0].provenance["probing_steps"]
    assert sum(told.values()) >= counter.total / exact - 0.1  # forwards are counted with their heads' backward
    assert sum(told.values()) <= 1.1 * counter.total / exact


def test_the_track_s_price_is_paid_once():
    model, data = task()
    chain = hp.Chain.from_model(model, data[0])
    probing = Probing(chain, data, sgd, None)
    track = Rollouts(probing, Runs(chain, Stream(data), sgd), Frugal(probing.profile))
    for who, steps in ((None, 8), ((2, 2), 8), (None, 16), ((2, 2), 16)):
        price, before = track.price(who, steps, 0), track.spent
        track.advance(who, steps, 0)
        assert track.spent - before == pytest.approx(price)
        assert track.price(who, steps, 0) == 0
        track.start(steps, 0)
        assert track.spent - before == pytest.approx(price)


def test_candidates_that_diverge_are_out(monkeypatch):
    real = runs.step

    def step(chain, batch, schedule, optimizer, *more):
        loss = real(chain, batch, schedule, optimizer, *more)
        return loss if len(schedule.windows) < 3 else loss * math.nan

    monkeypatch.setattr(runs, "step", step)
    plan = planned(objective=hp.AccuracyConstraint(0.9), accuracy="rollout", rollout_steps=8, optimizer=sgd)
    lost = [row for row in plan.rows if row.horizon < 3 and row.stride == 1]
    assert all(row.rate is None and not row.feasible for row in lost)
    assert plan.horizon >= 3
    assert "the run diverged" in {detail["why"] for _, _, detail in plan.provenance["rollouts"]}


def test_one_block_has_nothing_to_race():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 3))
    data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    plan = hp.plan_horizon(model, data, blocks=["0"], accuracy="rollout", rollout_steps=4, progress=False)
    assert (plan.horizon, plan.row.rate) == (1, 1.0)
    assert plan.provenance["probing_steps"]["rollouts"] == 0
    assert any("No rollout was needed" in note for note in plan.notes)


def test_without_rates_the_cosine_chooses_and_the_plan_says_so():
    frozen = planned(accuracy="rollout", rollout_steps=4, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    assert any("did not lower the loss" in note for note in frozen.notes)
    poor = planned(accuracy="rollout", rollout_steps=4, rollout_budget=0.5, optimizer=sgd)
    assert any("could be run within rollout_budget=0.5" in note for note in poor.notes)
    assert poor.horizon == frozen.horizon == planned().horizon


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"accuracy": "guess"}, "accuracy='guess'"),
        ({"accuracy": "rollout", "rollout_steps": 0}, "rollout_steps=0"),
        ({"rollout_budget": -1}, "rollout_budget=-1"),
        ({"rollout_budget": math.nan}, "rollout_budget=nan"),
        ({"accuracy": "rollout", "device": "simulated:1GiB"}, "nothing can be run"),
    ],
)
def test_bad_arguments_are_refused(bad, match):
    model = ResidualMLP(3, width=8, p=0.0)
    with pytest.raises(ValueError, match=match):
        hp.plan_horizon(model, [(torch.randn(4, 4), torch.randint(3, (4,)))], progress=False, **bad)
