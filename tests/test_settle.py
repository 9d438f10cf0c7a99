"""Where to measure next: wherever the choice is least certain, each horizon predicted before it is measured."""

import logging
import math

import pytest
import torch
from test_planner import DEPTH, planned, task

import horizonplan as hp
from horizonplan.choice import choose_horizon
from horizonplan.curves import fit_cosine
from horizonplan.horizons import HeldOut, doubts, first_horizons, next_horizon
from horizonplan.probes import Flops


def table(depth, cosine, known):
    """A table at stride 1: measured where known, fitted elsewhere."""
    return [
        hp.Row(
            horizon=h,
            memory_bytes=100 * h,
            memory_source="predicted",
            cosine=cosine(h),
            cosine_source="measured" if h in known else "fitted",
            rate=cosine(h) ** 2,
            rate_source="derived",
        )
        for h in range(1, depth + 1)
    ]


def chooser(objective):
    def choose(rows):
        try:
            return choose_horizon(rows, objective, hp.LinearCost(node_memory=1000))
        except hp.InfeasibleError:
            return None

    return choose


def noisy_curve(depth, places, noise):
    cosine = lambda h: 1 - (1 - h / depth) ** 2 / 2  # noqa: E731
    torch.manual_seed(0)
    points = [(h, cosine(h) + (noise * float(torch.randn(())) if h < depth else 0)) for h in places for _ in range(4)]
    return fit_cosine([h for h, _ in points], [max(-1.0, min(1.0, c)) for _, c in points], depth)


def test_only_horizons_near_the_constraint_are_doubted():
    curve = noisy_curve(20, [1, 7, 14, 20], 0.005)
    rows = table(20, curve, {1, 7, 14, 20})
    choose = chooser(hp.AccuracyConstraint(0.2))
    found = doubts(rows, curve, choose, {1, 7, 14, 20})
    border = next(h for h in range(1, 21) if curve(h) ** 2 >= 0.8)
    assert choose(rows).horizon == border
    assert found
    assert all(abs(h - border) <= 3 and 0 < part <= 1 for h, part in found.items())
    assert not set(found) & {1, 7, 14, 20}


@pytest.mark.parametrize("objective", [hp.MemoryLimit(950), hp.Weighted(1000.0), hp.AccuracyConstraint(0.99)])
def test_a_choice_that_no_cosine_can_change_is_settled(objective):
    curve = noisy_curve(20, [1, 7, 14, 20], 0.02)
    rows = table(20, curve, {1, 7, 14, 20})
    assert doubts(rows, curve, chooser(objective), {1, 7, 14, 20}) == {}


def test_every_doubt_is_a_horizon_whose_interval_changes_the_choice():
    curve = noisy_curve(12, [1, 5, 9, 12], 0.02)
    rows = table(12, curve, {1, 5, 9, 12})
    for objective in (hp.AccuracyConstraint(0.1), hp.AccuracyConstraint(0.3), hp.Weighted(0.3), hp.Weighted(1.0)):
        choose = chooser(objective)
        found = doubts(rows, curve, choose, {1, 5, 9, 12})
        for row in rows:
            if row.horizon in (1, 5, 9, 12):
                continue
            low, high = curve.interval(row.horizon)
            changes = False
            for i in range(9):
                value = low + (high - low) * i / 8
                other = [hp.Row(**{**r.to_dict(), "cosine": value, "rate": value**2}) if r is row else r for r in rows]
                changes |= choose(other).horizon != choose(rows).horizon
            assert changes == (row.horizon in found)


def test_the_most_doubtful_is_next_then_the_choice_then_the_widest_interval():
    curve = noisy_curve(12, [1, 5, 9, 12], 0.02)
    rows = table(12, curve, {1, 5, 9, 12})
    chosen = rows[7]
    assert next_horizon(rows, curve, chosen, {3: 0.2, 6: 0.7, 7: 0.1}, {1, 5, 9, 12}) == 6
    assert next_horizon(rows, curve, chosen, {}, {1, 5, 9, 12}) == 8
    widest = max(
        (h for h in range(1, 13) if h not in (1, 5, 9, 12)), key=lambda h: -math.dist(curve.interval(h), (0, 0))
    )
    assert next_horizon(rows, curve, rows[0], {}, {1, 5, 9, 12}) in range(2, 12)
    assert widest
    assert next_horizon(rows, curve, chosen, {}, set(range(1, 13))) is None


def test_first_horizons_span_the_chain_and_bad_ones_are_refused():
    assert first_horizons(None, 13) == [1, 5, 9, 13]
    assert first_horizons(None, 2) == [1, 2]
    assert first_horizons([4, 2, 4], 5) == [2, 4]
    for bad in ([], [0], [6], [1.5], [True], 3):
        with pytest.raises(ValueError, match="horizons="):
            first_horizons(bad, 5)


def test_one_horizon_more_than_the_fits_use_is_measured():
    plan = planned(*task(depth=12), horizons=None)
    (memory, cosine) = plan.held_out
    assert memory.horizon == cosine.horizon not in plan.curves["cosine"].horizons + plan.curves["memory"].horizons
    row = next(r for r in plan.rows if (r.horizon, r.stride) == (memory.horizon, 1))
    assert (memory.measured, cosine.measured) == (row.memory_bytes, row.cosine)
    assert (row.memory_source, row.cosine_source) == ("measured", "measured")
    assert (cosine.low, cosine.high) == plan.curves["cosine"].interval(cosine.horizon)
    assert plan.verified == (memory.ok and cosine.ok)
    assert ("Verified: h=" in plan.explain()) == plan.verified
    assert hp.Plan.from_dict(plan.to_dict()).held_out == plan.held_out


def test_a_plan_that_misses_its_interval_is_not_verified(monkeypatch):
    real = hp.probes.memory

    def inflated(chain, batches, horizons, *args, **kwargs):
        samples = real(chain, batches, horizons, *args, **kwargs)
        return [hp.probes.Sample(**{**vars(s), "value": 2 * s.value}) if len(horizons) == 1 else s for s in samples]

    monkeypatch.setattr(hp.probes, "memory", inflated)
    plan = planned(*task(depth=12), horizons=None)
    assert not plan.verified
    assert [test.ok for test in plan.held_out if test.quantity == "memory"] == [False]
    assert "Not verified: h=" in plan.explain()
    assert plan.to_dict()["verified"] is False


def test_where_every_horizon_was_measured_nothing_is_left_to_test():
    plan = planned()  # horizons 1..DEPTH
    assert plan.provenance["measured_horizons"] == list(range(1, DEPTH + 1))
    assert (plan.held_out, plan.verified) == ((), True)
    assert "Verified: every horizon was measured." in plan.explain()


def test_a_held_out_test_is_closed_at_its_ends():
    assert [HeldOut("cosine", 2, 0.5, 0.6, m).ok for m in (0.49, 0.5, 0.6, 0.61)] == [False, True, True, False]


@pytest.mark.parametrize("objective", [hp.AccuracyConstraint(0.1), hp.Weighted(0.5), hp.MemoryLimit("1GiB")])
def test_the_price_that_a_plan_tells_is_what_was_dispatched(objective, caplog):
    model, data = task(depth=12)
    with Flops() as counter, caplog.at_level(logging.INFO, "horizonplan"):
        plan = planned(model, data, horizons=None, objective=objective)
    exact = next(row.flops for row in plan.rows if row.horizon == 12 and not row.recompute)
    told = plan.provenance["probing_steps"]
    assert sum(told.values()) == pytest.approx(counter.total / exact, abs=0.05)
    assert set(told) == {"profile", "memory", "cosine"}
    assert f"cosine {told['cosine']:.0f}" in plan.explain()
    assert "in steps of back-propagation" in caplog.text


def test_short_runs_have_a_price_of_their_own():
    model, data = task()
    quiet = planned(model, data, objective=hp.Weighted(1.0)).provenance["probing_steps"]
    told = planned(model, data, objective=hp.Weighted(1.0), rollout_steps=6).provenance["probing_steps"]
    assert {stage: told[stage] for stage in quiet} == quiet
    assert told["short runs"] >= 12  # back-propagation and two strides, h < T dearer than half a step each


def test_one_horizon_to_begin_with_is_not_enough_for_a_fit():
    model, data = task(depth=12)
    plan = planned(model, data, horizons=[3], objective=hp.Weighted(0.5), probe_steps=60)
    assert len(plan.provenance["measured_horizons"]) >= 3
    assert "cosine" in plan.curves
    assert all(row.rate is not None for row in plan.rows if row.stride == 1)


def test_what_cannot_miss_is_no_test():
    model, data = task(depth=12)
    plan = planned(model, data[:1], horizons=None, objective=hp.MemoryLimit("1GiB"), batches=1)
    assert [test.quantity for test in plan.held_out] == ["memory"]  # three points, three coefficients: no interval


def test_the_budget_is_kept_and_a_larger_one_settles_more():
    model, data = task(depth=24)
    spent = {}
    for budget in (0, 60, 400):
        plan = planned(model, data, horizons=None, probe_steps=budget, objective=hp.AccuracyConstraint(0.08))
        spent[budget] = len(plan.provenance["measured_horizons"]), sum(plan.provenance["probing_steps"].values())
        assert plan.held_out  # one horizon is tested whatever it costs
    assert spent[0][0] == 5
    assert spent[0][0] <= spent[60][0] <= spent[400][0]
    assert spent[60][1] <= 60 or spent[60][0] == 5
    assert spent[400][1] <= 400
    for bad in (-1, math.nan, "many"):
        with pytest.raises(ValueError, match="probe_steps="):
            planned(model, data, probe_steps=bad)


def test_batches_of_other_shapes_are_warned_of():
    class Pool(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x.mean(1)

    data = [(torch.randn(8, n, 6), torch.randn(8, 6)) for n in (3, 5, 4)]
    with pytest.warns(UserWarning, match="samples of 3 different shapes"):
        plan = planned(Pool(), data, horizons=None)
    assert plan.provenance["batch"][0][0] == [8, 5, 6]  # the largest
    assert any("different shapes" in note for note in plan.notes)
    even = [(torch.randn(n, 3, 6), torch.randn(n, 6)) for n in (8, 8, 5)]  # a smaller last batch is none of that
    assert not any("different shapes" in note for note in planned(Pool(), even, horizons=None).notes)
