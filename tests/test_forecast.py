"""Plans for cards that are not there: bytes predicted, cosines from elsewhere, nothing measured."""

import pytest
import torch
from test_planner import planned, task
from torch import nn

import horizonplan as hp
from horizonplan.devices import ASSUMED, Calibration
from horizonplan.models import ResidualMLP
from horizonplan.predict import step_bytes
from horizonplan.probes import LiveBytes, profile

CARD = {"device": "simulated:1GiB", "progress": False}


def model_and_data(depth=8, rows=512):
    data = [(torch.randn(rows, 16), torch.randint(0, 4, (rows,))) for _ in range(2)]
    return ResidualMLP(16, 32, 4, depth=depth), data


def test_a_memory_limit_needs_no_cosine_and_counts_the_margin():
    model, data = model_and_data()
    needed = {
        row.horizon: row.device_bytes
        for row in hp.plan_horizon(model, data, objective=hp.MemoryLimit("1GiB"), **CARD).rows
        if row.stride == 1 and not row.recompute
    }
    for horizon in (1, 3, 8):
        plan = hp.plan_horizon(model, data, objective=hp.MemoryLimit(needed[horizon]), strides=(1,), **CARD)
        assert plan.horizon == horizon
        assert plan.row.device_bytes == plan.row.memory_bytes + ASSUMED.margin_bytes(plan.row.memory_bytes)
        assert (plan.row.memory_source, plan.row.cosine, plan.row.nvml_bytes) == (
            "predicted",
            None if horizon < 8 else 1,
            None,
        )
    small = f"simulated:{needed[3]}"
    assert hp.plan_horizon(model, data, objective=hp.MemoryLimit("1GiB"), device=small, strides=(1,)).horizon == 3


def test_nothing_runs_and_the_plan_says_what_it_is():
    model, data = model_and_data()
    before = torch.get_rng_state()
    with LiveBytes() as tracker:
        plan = hp.plan_horizon(model, data, objective=hp.MemoryLimit("1GiB"), **CARD)
    assert tracker.peak < 1000
    assert torch.equal(torch.get_rng_state(), before)
    assert not plan.verified
    assert "Not verified: nothing was measured." in plan.explain()
    assert any("for a card of 1.0 GiB that was not there" in note for note in plan.notes)
    assert plan.provenance["margin"]["source"] == "assumed"
    assert all(row.step_seconds is None and row.flops > 0 for row in plan.rows)
    assert hp.Plan.from_dict(plan.to_dict()) == plan


def test_a_model_on_meta_gets_the_plan_of_one_with_values():
    model, data = model_and_data()
    with torch.device("meta"):
        empty = ResidualMLP(16, 32, 4, depth=8)
    shapes = [tuple(t.to("meta") for t in batch) for batch in data]
    plans = [
        hp.plan_horizon(m, d, objective=hp.MemoryLimit("1GiB"), **CARD) for m, d in ((model, data), (empty, shapes))
    ]
    assert plans[0].rows == plans[1].rows


def test_other_objectives_need_cosines_and_the_error_says_where_from():
    model, data = model_and_data()
    with pytest.raises(
        ValueError, match=r"cosine_from=None: .* give a measured plan or a reduced model, or .*MemoryLimit"
    ):
        hp.plan_horizon(model, data, **CARD)
    with pytest.raises(ValueError, match="cosine_from is for simulated devices"):
        planned(model, data, horizons=None, cosine_from=model)
    with pytest.raises(ValueError, match="cosine_from=3"):
        hp.plan_horizon(model, data, cosine_from=3, **CARD)
    with pytest.raises(ValueError, match="on 'meta' and has no values"):
        hp.plan_horizon(model, data, cosine_from=ResidualMLP(16, 32, 4, depth=4).to("meta"), **CARD)


def test_cosines_of_a_measured_plan_of_the_same_depth_are_its_fit():
    model, data = model_and_data()
    measured = planned(model, data, horizons=None)
    plan = hp.plan_horizon(model, data, cosine_from=measured, objective=hp.AccuracyConstraint(0.2), **CARD)
    for row in plan.rows:
        if row.stride == 1 and row.horizon < 8:
            assert row.cosine == pytest.approx(measured.curves["cosine"](row.horizon), abs=1e-9)
            assert (row.cosine_source, row.rate_source) == ("fitted", "derived")
    assert plan.row.rate >= 0.8


def test_cosines_of_a_reduced_model_go_by_the_part_of_the_depth():
    model, data = model_and_data(depth=12)
    small, _ = model_and_data(depth=6)
    plan = hp.plan_horizon(model, data, cosine_from=small, objective=hp.Weighted(0.5), **CARD)
    chain = hp.Chain.from_model(small, data[0])
    wanted = {s.horizon: s.value for s in hp.probes.cosine(chain, data, range(1, 6))}
    rows = {row.horizon: row for row in plan.rows if row.stride == 1 and not row.recompute}
    assert rows[1].cosine is None  # 1/12 is a smaller part than 1/6, the smallest measured
    for h, value in wanted.items():
        assert rows[2 * h].cosine == pytest.approx(value, abs=0.1)
    assert any("below h=2 are unknown" in note for note in plan.notes)
    pair = hp.plan_horizon(model, data, cosine_from=(small, data), objective=hp.Weighted(0.5), **CARD)
    assert pair.rows == plan.rows


def test_a_calibrated_card_s_margin_is_used():
    model, data = model_and_data()
    card = Calibration("a card", 2**30, 2**20, 2**10, 0.5, "measured")
    plan = hp.plan_horizon(model, data, objective=hp.MemoryLimit("1GiB"), calibration=card, **CARD)
    assert plan.row.device_bytes == plan.row.memory_bytes + 2**20 + 2**10 + -(-plan.row.memory_bytes // 2)
    assert "(a card) for context" in " ".join(plan.notes)
    seen = hp.plan_horizon(model, data, objective=hp.MemoryLimit("1GiB"), calibration=card, memory="nvml", **CARD)
    assert seen.row.memory_bytes == plan.row.device_bytes
    assert seen.cost.node_memory_bytes == 2**30


def test_every_row_is_what_the_fold_says_of_the_real_profile():
    model, data = model_and_data()
    single = lambda params: torch.optim.SGD(params, lr=0.1, foreach=False)  # noqa: E731
    plan = hp.plan_horizon(model, data, objective=hp.MemoryLimit("1GiB"), optimizer=single, **CARD)
    costs = profile(hp.Chain.from_model(model, data[0]), data[0], single, repeats=0)
    for row in plan.rows:
        schedule = hp.Schedule.horizon(8, row.horizon, row.stride, row.recompute)
        assert row.memory_bytes == pytest.approx(step_bytes(schedule, costs), abs=4)


def test_a_sequence_of_blocks_that_reads_values_cannot_be_simulated():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) if x.abs().max() > 0 else x
            return x

    with pytest.raises(hp.SimulationError, match="needs values"):
        hp.plan_horizon(Reads(), [(torch.ones(2, 4), torch.ones(2, 4))], objective=hp.MemoryLimit("1GiB"), **CARD)


def test_a_device_that_is_no_size_is_refused():
    with pytest.raises(ValueError, match="device='simulated:lots'"):
        planned(*task(), device="simulated:lots")
