"""``plan_horizon`` end to end: the table, the choice, and the paper's Algorithm 1 to the letter.

Oracles: brute force over the plan's own rows, written out here; the probes; the engine.
"""

import gc
import math
from dataclasses import dataclass, replace

import pytest
import torch
from families import ResidualMLP
from test_probes import unchanged
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import horizonplan as hp
from horizonplan.probes import Sample

pytestmark = pytest.mark.filterwarnings("ignore::horizonplan.PoorFitWarning")

DEPTH = 5


@pytest.fixture(autouse=True, scope="module")
def _quick_collections():
    gc.freeze()
    yield
    gc.unfreeze()


def task(depth=DEPTH, rows=32, count=6):
    """A model with room between its horizons and a task that it can learn: wide states, a small head."""
    torch.manual_seed(1)
    model = ResidualMLP(depth, width=12, p=0.0, norm=False)
    truth = torch.randn(4, 3)
    inputs = [torch.randn(rows, 4) for _ in range(count)]
    return model, [(x, (x @ truth).argmax(1)) for x in inputs]


def planned(model=None, data=None, **kwargs):
    own_model, own_data = task()
    kwargs = {"progress": False, "rollout_steps": 0, "horizons": [1, 2, 3, 4, 5], **kwargs}
    return hp.plan_horizon(own_model if model is None else model, own_data if data is None else data, **kwargs)


def algorithm_1(plan, value, feasible):
    """Lines 17 and 18: the h in 1..T of least objective with r = cos^2, over the rows of the paper's family."""
    family = [row for row in plan.rows if row.stride == 1 and not row.recompute]
    assert [row.horizon for row in family] == list(range(1, plan.depth + 1))
    candidates = [(row, row.cosine**2) for row in family]
    return min((value(row, rate), row.flops, row.horizon) for row, rate in candidates if feasible(row, rate))[-1]


OBJECTIVES = {
    "accuracy .05": (hp.AccuracyConstraint(0.05), lambda row, r: row.cost, lambda row, r: r >= 0.95),
    "accuracy .3": (hp.AccuracyConstraint(0.3), lambda row, r: row.cost, lambda row, r: r >= 0.7),
    "accuracy .9": (hp.AccuracyConstraint(0.9), lambda row, r: row.cost, lambda row, r: r >= 0.1),
    "weighted 0": (hp.Weighted(0.0), lambda row, r: -r, lambda row, r: True),
    "weighted 3": (hp.Weighted(3.0), lambda row, r: -r + 3 * row.cost, lambda row, r: True),
    "weighted 1000": (hp.Weighted(1000.0), lambda row, r: -r + 1000 * row.cost, lambda row, r: True),
}
COSTS = {
    "linear": None,
    "dear": hp.LinearCost(unit_cost=7.0, node_memory="10KB"),
    "ladder": hp.LadderCost(unit_cost=2.0, node_memory=3000),
    "callable": lambda size: math.sqrt(size),
}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_stride_1_without_rollouts_is_the_paper_s_algorithm(objective, cost):
    asked, value, feasible = OBJECTIVES[objective]
    plan = planned(objective=asked, cost=COSTS[cost], strides=(1,))
    assert plan.horizon == algorithm_1(plan, value, feasible)
    assert (plan.stride, plan.recompute, plan.row.rate_source) == (1, 0, "derived")
    assert plan.row.rate == (1.0 if plan.horizon == DEPTH else plan.row.cosine**2)
    assert plan.row.feasible


@pytest.mark.parametrize("horizon", range(1, DEPTH + 1))
def test_a_memory_limit_takes_the_largest_horizon_that_fits(horizon):
    rows = {row.horizon: row for row in planned().rows if row.stride == 1 and not row.recompute}
    exactly = planned(objective=hp.MemoryLimit(rows[horizon].memory_bytes), strides=(1,))
    assert exactly.horizon == horizon
    between = rows[horizon].memory_bytes + (1 if horizon == DEPTH else 5)
    assert planned(objective=hp.MemoryLimit(between), strides=(1,)).horizon == horizon


def test_nothing_fits_and_the_nearest_is_named():
    with pytest.raises(hp.InfeasibleError, match=r"largest horizon within 100 B.*raise limit") as error:
        planned(objective=hp.MemoryLimit(100))
    assert error.value.nearest.horizon == 1
    assert error.value.nearest.memory_bytes == min(row.memory_bytes for row in planned().rows if not row.reference)


def test_costs_are_the_cost_function_s_of_the_row_s_memory():
    price = COSTS["ladder"]
    for row in planned(cost=price).rows:
        assert row.cost == price(row.memory_bytes)
    plan = planned(cost=hp.LadderCost(unit_cost=2.0))  # a node left open is the model's own need: M(T)
    exact = next(row for row in plan.rows if row.horizon == DEPTH and not row.recompute)
    assert plan.cost.node_memory_bytes == exact.memory_bytes
    assert exact.cost == 2.0


def test_the_table_has_every_row_of_the_contract():
    plan = planned(horizons=[1, 2, 4, 5])
    rows, h = plan.rows, plan.horizon
    keys = [(row.horizon, row.stride, row.recompute) for row in rows]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {
        *((h, 1, 0) for h in range(1, DEPTH + 1)),
        *((h, h, 0) for h in range(2, DEPTH)),
        (DEPTH, 1, 1),
        (DEPTH, 1, 2),  # round(sqrt(5))
    }
    assert {(r.horizon, r.recompute) for r in rows if r.reference} == {(DEPTH, 1), (DEPTH, 2)}
    for row in rows:
        assert row.memory_bytes > 0
        assert row.memory_source == ("measured" if row.stride == 1 and not row.recompute else "predicted")
        assert row.step_seconds > 0
        assert row.step_seconds_source == "predicted"
        assert row.flops > 0
    by_key = dict(zip(keys, rows, strict=True))
    assert [by_key[h, 1, 0].cosine_source for h in range(1, 6)] == [*["measured"] * 4, "derived"]
    assert (plan.held_out[0].horizon, plan.curves["cosine"].horizons) == (3, (*[1] * 4, *[2] * 4, *[4] * 4, *[5] * 4))
    assert all(by_key[DEPTH, 1, k].cosine == by_key[DEPTH, 1, k].rate == 1 for k in (0, 1, 2))
    assert all(by_key[h, 1, 0].rate == by_key[h, 1, 0].cosine ** 2 for h in range(1, 5))
    for other in set(range(2, DEPTH)) - {h}:
        assert (by_key[other, other, 0].cosine_source, by_key[other, other, 0].rate) == ("unmeasured", None)


def test_measured_numbers_are_the_probes_own():
    model, data = task()
    plan = planned(model, data, strides=("horizon", 1))
    chain = hp.Chain.from_model(model, data[0])
    memory = hp.probes.memory(chain, data[:4], range(1, 6))
    cosine = hp.probes.cosine(chain, data[:4], range(1, 5))
    if plan.horizon < DEPTH:  # at the choice, that of disjoint windows too
        cosine += hp.probes.cosine(chain, data[:4], [plan.horizon], ["horizon"])
    rows = {(row.horizon, row.stride): row for row in plan.rows if not row.recompute}
    assert [rows[s.horizon, s.stride].memory_bytes for s in memory] == [s.value for s in memory]
    assert [rows[s.horizon, s.stride].cosine for s in cosine] == [s.value for s in cosine]
    assert [rows[s.horizon, s.stride].cosine_stderr for s in cosine] == [s.stderr for s in cosine]


def test_where_to_measure_by_default():
    assert [r.horizon for r in planned(horizons=None).rows if r.cosine_source in ("measured", "derived")][:5] == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip
    deep = planned(*task(depth=13), horizons=None)
    assert {1, 5, 9, 13} < set(deep.provenance["measured_horizons"])
    assert deep.held_out[0].horizon in set(deep.provenance["measured_horizons"]) - {1, 5, 9, 13}


def test_the_same_seed_gives_the_same_plan():
    def fingerprint(seed, noise):
        torch.manual_seed(noise)  # the generator's own state must not matter
        model, data = task()
        dataset = TensorDataset(*(torch.cat(parts) for parts in zip(*data, strict=True)))
        for block in model.blocks:
            block.drop.p = 0.3
        plan = planned(model, dataset, seed=seed, rollout_steps=4, objective=hp.AccuracyConstraint(0.5))
        timed = {"step_seconds": None}
        return plan.row.horizon, plan.stride, [replace(row, **timed) for row in plan.rows]

    first = fingerprint(0, noise=1)
    assert fingerprint(0, noise=2) == first
    assert fingerprint(5, noise=1) != first


def rollouts(rates):
    """Rollouts that find given rates at each stride."""

    def rollout(chain, batches, pairs, steps, optimizer, seed):
        return [
            Sample("rate", "1", h, s, rates["horizon" if s == h else s], detail={"why": "told", "exact_fell": True})
            for h, s in pairs
        ]

    return rollout


WEIGHTED = hp.Weighted(lam=1.0)  # takes h = 4 here


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({1: 0.9, "horizon": 0.5}, 1),
        ({1: 0.5, "horizon": 0.9}, "horizon"),
        ({1: math.nan, "horizon": 0.1}, "horizon"),
        ({1: 0.1, "horizon": math.nan}, 1),
    ],
)
def test_the_better_rate_decides_between_strides(rates, expected, monkeypatch):
    monkeypatch.setattr(hp.probes, "rollout", rollouts(rates))
    plan = planned(objective=WEIGHTED, rollout_steps=5)
    assert 1 < plan.horizon < DEPTH
    assert plan.stride == (plan.horizon if expected == "horizon" else 1)
    assert (plan.row.rate, plan.row.rate_source, plan.row.memory_source) == (rates[expected], "measured", "measured")


@pytest.mark.parametrize("lost", [1, "horizon"])
def test_a_stride_that_diverged_is_never_taken(lost, monkeypatch):
    rates = {1: 0.5, "horizon": 0.5, lost: math.nan}
    monkeypatch.setattr(hp.probes, "rollout", rollouts(rates))
    limit = next(row.memory_bytes for row in planned().rows if row.horizon == 3)
    plan = planned(objective=hp.MemoryLimit(limit), rollout_steps=5)
    assert (plan.horizon, plan.stride) == (3, 3 if lost == 1 else 1)


def test_no_rate_at_all_is_noted_and_the_first_stride_taken(monkeypatch):
    monkeypatch.setattr(hp.probes, "rollout", rollouts({1: math.nan, "horizon": math.nan}))
    for strides in ((1, "horizon"), ("horizon", 1)):
        plan = planned(objective=WEIGHTED, rollout_steps=5, strides=strides)
        assert plan.stride == (1 if strides[0] == 1 else plan.horizon)
        assert plan.row.rate is None
        assert any("all of them diverged" in note for note in plan.notes)


def test_runs_in_which_back_propagation_does_not_learn_say_nothing_about_strides():
    plan = planned(objective=WEIGHTED, rollout_steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    assert (plan.stride, plan.row.rate_source, plan.row.rate) == (1, "derived", plan.row.cosine**2)
    assert plan.row.feasible
    assert any("more rollout_steps or another optimizer" in note for note in plan.notes)


def test_a_measured_rate_below_what_was_asked_is_said_with_the_next_best(monkeypatch):
    monkeypatch.setattr(hp.probes, "rollout", rollouts({1: 0.2, "horizon": 0.3}))
    plan = planned(objective=hp.AccuracyConstraint(0.6), rollout_steps=5)
    assert (plan.horizon < DEPTH, plan.row.feasible, plan.row.rate) == (True, False, 0.3)
    (note,) = (note for note in plan.notes if "misses the objective" in note)
    assert "rate is 0.300 (measured)" in note
    assert "The next best candidate is h=" in note or "is BP" in note
    assert note in plan.explain()


def test_strides_of_disjoint_windows_only_without_rollouts_derive_their_rate():
    plan = planned(objective=WEIGHTED, strides=("horizon",))
    assert plan.stride == plan.horizon > 1
    assert plan.row.rate == plan.row.cosine**2
    assert (plan.row.rate_source, plan.row.cosine_source) == ("derived", "measured")
    assert planned(objective=WEIGHTED, strides=(1,)).horizon == plan.horizon  # h is chosen at stride 1


def test_strides_left_out_are_references_and_numbers_are_candidates():
    references = {(r.horizon, r.stride) for r in planned(strides=(1,)).rows if r.reference and not r.recompute}
    assert references == {(h, h) for h in range(2, DEPTH)}
    rows = planned(strides=(2,)).rows
    assert {(r.horizon, r.stride) for r in rows if r.stride == 2} == {(2, 2), (3, 2), (4, 2)}
    assert {(r.horizon, r.stride) for r in rows if r.reference and not r.recompute} == {(3, 3), (4, 4)}


def test_no_stride_that_fits_is_noted():
    plan = planned(objective=hp.Weighted(1000.0), strides=(3,))
    assert (plan.horizon, plan.stride) == (1, 1)
    assert any(note.startswith("None of strides=(3,) fits h=1") for note in plan.notes)


def test_real_rollouts_mark_what_they_measured():
    model, data = task()
    plan = planned(model, data, objective=WEIGHTED, rollout_steps=6, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    chain = hp.Chain.from_model(model, data[0])
    pairs = [(plan.horizon, 1), (plan.horizon, plan.horizon)]
    wanted = hp.probes.rollout(chain, data, pairs, 6, lambda p: torch.optim.SGD(p, lr=0.1), seed=0)
    rows = {(row.horizon, row.stride): row for row in plan.rows}
    assert [(rows[s.horizon, s.stride].rate, rows[s.horizon, s.stride].rate_stderr) for s in wanted] == [
        (s.value, s.stderr) for s in wanted
    ]
    assert {k for k, row in rows.items() if row.rate_source == "measured"} == set(pairs)
    assert plan.row in (rows[pair] for pair in pairs)


def test_checkpointing_wins_where_it_may_and_trains_below_the_memory_of_back_propagation():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8), nn.Tanh()) for _ in range(6)]
    model = nn.Sequential(*blocks, nn.Linear(8, 3))
    data = [(torch.randn(64, 8), torch.randint(0, 3, (64,))) for _ in range(3)]
    summed = nn.CrossEntropyLoss(reduction="sum")  # so micro-batches have another gradient
    kwargs = {"blocks": [str(t) for t in range(6)], "horizons": [1, 2, 4, 6], "loss": summed}
    exact = next(r for r in planned(model, data, **kwargs).rows if r.horizon == 6 and not r.recompute)
    limit = hp.MemoryLimit(exact.memory_bytes - 1)
    assert planned(model, data, objective=limit, **kwargs).horizon < 6
    plan = planned(model, data, objective=limit, candidates="all", **kwargs)
    assert (plan.horizon, plan.stride, plan.row.rate) == (6, 1, 1.0)
    assert plan.recompute > 0
    assert plan.row.memory_source == "measured"
    assert not any(row.reference for row in plan.rows)
    assert "BP, checkpoint every" in plan.explain()
    result = hp.train(model, data, plan=plan, epochs=1, loss=summed, progress=False)
    assert result.peak_bytes == plan.row.memory_bytes < exact.memory_bytes
    assert math.isfinite(result.final_loss)


def test_the_explanation_says_when_a_reference_beats_the_choice():
    plan = planned(objective=hp.AccuracyConstraint(0.0))
    assert plan.horizon == DEPTH
    beaten = "A reference beats this choice: BP, checkpoint every"
    cheaper = [r for r in plan.rows if r.reference and r.rate == 1 and r.memory_bytes <= plan.row.memory_bytes]
    assert (beaten in plan.explain()) == bool(cheaper)
    assert cheaper
    winning = planned(objective=hp.AccuracyConstraint(0.0), candidates="all")
    assert winning.recompute > 0
    assert beaten not in winning.explain()


@pytest.mark.parametrize("depth", [1, 2])
def test_shallow_chains_can_be_planned_and_trained(depth, tmp_path):
    model, data = task(depth=max(depth, 2))
    kwargs = {"blocks": ["blocks.0"]} if depth == 1 else {}
    plan = planned(model, data, horizons=None, rollout_steps=3, **kwargs)
    assert plan.depth == depth
    assert [(r.horizon, r.stride) for r in plan.rows if not r.recompute] == [(h, 1) for h in range(1, depth + 1)]
    plan.explain()
    plan.plot(tmp_path / "plan.png")
    assert hp.train(model, data, plan=plan, progress=False).history


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


def test_every_kind_of_data_gives_the_same_plan():
    model, data = task()
    whole = TensorDataset(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    expected = planned(model, data)
    same = {
        "lists": [list(batch) for batch in data],
        "dicts": [{"x": x, "target": y} for x, y in data],
        "loader": DataLoader(whole, batch_size=32),
    }
    for name, other in same.items():
        rows = planned(model, other).rows
        assert [r.cosine for r in rows] == [r.cosine for r in expected.rows], name
        assert [r.memory_bytes for r in rows] == [r.memory_bytes for r in expected.rows], name
    assert planned(model, whole).provenance["batch"][0][0] == [32, 4]


def test_losses_of_the_user_s_own():
    model, data = task()
    expected = planned(model, data)

    def compute(model, batch):
        return F.cross_entropy(model(batch.x), batch.y)

    ways = [
        planned(model, data, loss=F.cross_entropy),
        planned(model, [Pair(x, y) for x, y in data], compute_loss=compute),
    ]
    for plan in ways:
        assert [row.cosine for row in plan.rows] == [row.cosine for row in expected.rows]
    smooth = planned(model, data, loss=nn.CrossEntropyLoss(label_smoothing=0.5))
    assert [row.cosine for row in smooth.rows] != [row.cosine for row in expected.rows]


def test_blocks_by_pattern_and_by_list_agree_and_a_part_is_less_deep():
    assert planned(blocks="blocks.*").rows[0].cosine == planned(blocks=[f"blocks.{t}" for t in range(5)]).rows[0].cosine
    part = planned(blocks=["blocks.1", "blocks.2", "blocks.3"], horizons=[1, 2, 3])
    assert part.depth == 3
    assert part.block_names == ("blocks.1", "blocks.2", "blocks.3")


def test_a_projection_of_the_user_s_own_is_used():
    seen = []

    def projection(state, shape):
        seen.append((tuple(state.shape), tuple(shape)))
        return F.pad(state, (0, shape[1] - state.shape[1]))

    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in [(4, 6), (6, 8), (8, 8), (8, 10)]]
    model = nn.Sequential(*layers, nn.Linear(10, 3))
    data = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
    plan = planned(model, data, blocks=["0", "1", "2", "3"], horizons=[1, 2, 3, 4], projection=projection)
    assert plan.depth == 4
    assert {before[1] for before, _ in seen} == {6, 8}
    assert {wanted for _, wanted in seen} == {(8, 10)}


def test_progress_tells_every_stage_in_order():
    told = []
    planned(progress=lambda message, done, total: told.append((message, done, total)))
    assert [done for _, done, _ in told] == list(range(len(told)))
    assert {total for *_, total in told} == {len(told) - 1}
    assert told[0][0] == "profile 5 blocks"
    assert told[-1][0] == "done"


def test_a_model_in_eval_mode_is_planned_as_it_will_be_trained():
    model, data = task()
    for block in model.blocks:
        block.drop.p = 0.5
    training = planned(model, data)
    model.eval()
    with unchanged(model):
        plan = planned(model, data)
    assert not model.training
    assert [row.memory_bytes for row in plan.rows] == [row.memory_bytes for row in training.rows]
    assert hp.train(model, data, plan=plan, progress=False).peak_bytes == plan.row.memory_bytes


def test_a_user_s_objective_can_be_plugged_in():
    class Middle(hp.Objective):
        def value(self, rate, cost, memory_bytes, horizon):
            return abs(horizon - 3)

        def shortfall(self, rate, cost, memory_bytes, horizon):
            return 0.0

    assert planned(objective=Middle()).horizon == 3


def test_frozen_parts_are_planned_as_frozen():
    model, data = task()
    for part in (model.stem, *model.blocks[:2]):
        part.requires_grad_(False)
    plan, whole = planned(model, data), planned()
    pairs = zip(plan.rows, whole.rows, strict=True)
    assert all(row.memory_bytes < other.memory_bytes and row.flops < other.flops for row, other in pairs)


def test_provenance_says_how_the_numbers_were_made():
    plan = planned(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), seed=4, horizons=[1, 3, 4, 5])
    told = plan.provenance
    assert (told["model"], told["device"], told["seed"]) == ("ResidualMLP", "cpu", 4)
    assert told["torch"] == torch.__version__
    assert told["batch"] == [[[32, 4], "torch.float32"], [[32], "torch.int64"]]
    assert told["measured_horizons"] == [1, 2, 3, 4, 5]  # h = 2 is held out
    assert {(h, s): m for h, s, m in told["memory"]} == {
        (r.horizon, r.stride): r.memory_bytes for r in plan.rows if r.stride == 1 and not r.recompute
    }
    assert told["probing_seconds"] > 0
    assert (told["nvml_fallback"], told["memory_counts"]) == ("no gpu", "allocated")
