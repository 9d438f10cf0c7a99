"""``plan_horizon(methods=...)``: other training methods are measured beside the table, shown, and never chosen.

Oracles: steps made and counted here, the folds and rollouts of the same windows, the plan without methods.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import test_planner
import torch
from starlette.testclient import TestClient
from test_planner import _quick_collections, task  # noqa: F401 - a fixture
from test_probes import unchanged

import horizonplan as hp
from horizonplan import measured
from horizonplan.algorithms import DGL, SGR, Algorithm, BackPropagation, LocalLearning, LoCo, short_name
from horizonplan.api import plans
from horizonplan.explain import explain
from horizonplan.models import PlainCNN

pytestmark = pytest.mark.filterwarnings("ignore::horizonplan.PoorFitWarning")


@dataclass
class TwoSteps(Algorithm):
    """Owns its step: back-propagation, two updates a batch, and a head that it trains along and reads."""

    fails: str = ""

    def prepare(self, chain, batch):
        self.scale = torch.nn.LayerNorm(2)
        return self.scale

    def step(self, chain, batch, optimizer):
        if self.fails == "raises":
            raise FloatingPointError("loss is nan")
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            loss = chain.loss(batch) + self.scale.weight.square().sum()
            loss.backward()
            optimizer.step()
        return torch.tensor(math.nan) if self.fails == "diverges" else loss.detach()


planned = partial(test_planner.planned, horizons=[1, 3, 5], probe_steps=0, batches=1)


def row_of(plan, method):
    return next(row for row in plan.rows if row.algorithm == short_name(method))


def timeless(rows):
    return [replace(row, step_seconds=None, step_seconds_source="unmeasured") for row in rows]


def peak_by_hand(method, chain, batch):
    """The peak of a second step, from what a tracker sees and the bytes of what stands before it."""
    extra = method.prepare(chain, batch)
    parameters = [*chain.model.parameters(), *(extra.parameters() if extra is not None else ())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    method.step(chain, batch, optimizer)
    optimizer.zero_grad(set_to_none=True)
    buffers = [*chain.model.buffers(), *(extra.buffers() if extra is not None else ())]
    state = [v for own in optimizer.state.values() for v in own.values()]
    with hp.probes.LiveBytes() as tracker:
        method.step(chain, batch, optimizer)
    return tracker.peak + sum(t.nbytes for t in (*parameters, *buffers, *state, *batch))


HOW = {"rollout_steps": 8, "objective": hp.AccuracyConstraint(0.4), "seed": 3}
METHODS = [SGR(3), SGR(3, weight=0.0), SGR(2, heads="own"), LoCo(3), LocalLearning(2), TwoSteps()]


@pytest.fixture(scope="module")
def plan():
    return planned(**HOW, methods=METHODS)


@pytest.fixture(scope="module")
def free():
    return planned(methods=[LocalLearning(2)])  # and no short runs


def test_the_rows_bytes_are_those_of_a_training_step(plan):
    """Graphs of second derivatives, heads and their optimiser state included."""
    for method in METHODS:
        model, data = task()
        row = row_of(plan, method)
        assert row.memory_bytes == peak_by_hand(method, hp.Chain.from_model(model, data[0]), data[0]), method
        assert row.memory_source == row.step_seconds_source == "measured"
        assert row.step_seconds > 0
        model, data = task()
        trained = hp.train(model, data[:1] * 3, algorithm=method, progress=False)
        assert abs(trained.peak_bytes - row.memory_bytes) <= 0.02 * row.memory_bytes, method
    assert row_of(plan, SGR(3)).memory_bytes > row_of(plan, SGR(3, weight=0.0)).memory_bytes


def test_a_methods_flops_and_rate_are_those_of_its_windows():
    """Disjoint windows are a row of the plan's own and plain local learning."""
    model, data = task(depth=4)
    how = {"rollout_steps": 12, "strides": ("horizon",), "horizons": [1, 2, 4]}
    plan = planned(model, data, methods=[LocalLearning(2), BackPropagation(), TwoSteps()], **how)
    local, windows = row_of(plan, LocalLearning(2)), next(r for r in plan.rows if (r.horizon, r.stride) == (2, 2))
    assert (local.horizon, local.stride, local.flops) == (2, 2, windows.flops)
    (sample,) = hp.probes.rollout(hp.Chain.from_model(model, data[0]), data, [(2, 2)], 12)
    assert (local.rate, local.rate_stderr, local.rate_source) == (sample.value, sample.stderr, "measured")
    exact = row_of(plan, BackPropagation())
    assert exact.rate == 1
    assert exact.flops == next(r for r in plan.rows if r.horizon == 4 and r.plain).flops
    assert row_of(plan, TwoSteps()).flops == 2 * exact.flops


def test_model_optimiser_generators_and_methods_are_left_as_they_were():
    model, data = task()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sgr, two = SGR(3), TwoSteps()
    how = {"rollout_steps": 2, "progress": False, "horizons": [1, 2, 4], "probe_steps": 0, "batches": 1}
    with unchanged(model, optimizer):
        hp.plan_horizon(model, data, methods=[sgr, two], **how)
    assert sgr._ready is None
    assert not hasattr(two, "scale")
    model = PlainCNN(1, (4, 6), 2)  # batch normalisation: buffers
    data = [(torch.randn(4, 1, 8, 8), torch.arange(4)) for _ in range(3)]
    with unchanged(model):
        plan = hp.plan_horizon(model, data, methods=[DGL(2), SGR(2, heads="conv")], **how)
    assert [row.algorithm for row in plan.rows[-2:]] == ["DGL(modules=2)", "SGR(modules=2, heads='conv')"]


def test_the_choice_and_the_other_rows_are_the_same_with_and_without_methods(plan):
    before = planned(**HOW)
    assert timeless(plan.rows[: -len(METHODS)]) == timeless(before.rows)
    assert timeless([plan.row]) == timeless([before.row])
    assert [row.algorithm for row in plan.rows[-len(METHODS) :]] == [short_name(method) for method in METHODS]
    assert all(row.reference and row.rate_source == "measured" for row in plan.rows[-len(METHODS) :])
    told = [note.split(" has auxiliary heads")[0] for note in plan.notes if "has auxiliary heads of" in note]
    assert told == ["SGR(modules=3)", "SGR(modules=3, weight=0.0)", "TwoSteps()"]


def test_no_methods_numbers_depend_on_those_before_it_or_on_where_rates_come_from(plan):
    again = planned(**HOW, methods=[LocalLearning(2), SGR(3)], accuracy="rollout")
    for row in again.rows[-2:]:
        assert timeless([row]) == timeless([r for r in plan.rows if r.algorithm == row.algorithm])


def test_a_method_is_judged_and_may_be_infeasible(plan):
    row = row_of(plan, SGR(3))
    assert row.cost == pytest.approx(row.memory_bytes / plan.rows[4].memory_bytes)
    assert row.feasible == (row.rate >= 0.6)
    for limit, feasible in ((row.memory_bytes - 1, False), (row.memory_bytes, True)):
        other = measured.replan(plan, hp.MemoryLimit(limit))
        assert row_of(other, SGR(3)).feasible is feasible
        assert other.row.algorithm == "horizon"
    other = planned(methods=[SGR(3)], objective=hp.MemoryLimit(row.memory_bytes - 1))
    assert row_of(other, SGR(3)).feasible is False


def test_without_steps_the_rate_is_unmeasured(free):
    row = row_of(free, LocalLearning(2))
    assert (row.rate, row.rate_source) == (None, "unmeasured")
    assert not row.feasible


def test_what_refuses_the_model_or_does_not_fit_is_a_note():
    plan = planned(methods=[DGL(2), SGR(9), SGR(2)])
    assert [row.algorithm for row in plan.rows if row.algorithm != "horizon"] == ["SGR(modules=2)"]
    assert any(note.startswith("DGL(modules=2) is not in the table: heads='dgl'") for note in plan.notes)
    assert any(note.startswith("SGR(modules=9) is not in the table: modules=9: give") for note in plan.notes)
    model, data = task(rows=256)
    exact = planned(model, data).rows[4].memory_bytes
    plan = planned(model, data, methods=[SGR(2), LocalLearning(5)], device=f"emulated:{exact + 1024}")
    assert any(note.startswith("SGR(modules=2) is not in the table: it ran out of memory") for note in plan.notes)
    assert [row.algorithm for row in plan.rows if row.algorithm != "horizon"] == ["LocalLearning(modules=5)"]


@pytest.mark.parametrize(("fails", "told"), [("diverges", "the run diverged"), ("raises", "the run diverged")])
def test_a_run_that_diverges_has_no_rate(fails, told):
    class Later(TwoSteps):
        """Behaves while its memory and time are measured."""

        def step(self, chain, batch, optimizer):
            self.count = getattr(self, "count", 0) + 1
            self.fails = fails if self.count == 3 and len(batch[0]) == 32 and Later.runs > 1 else ""
            return super().step(chain, batch, optimizer)

        def prepare(self, chain, batch):
            Later.runs += 1
            return super().prepare(chain, batch)

    Later.runs = 0
    plan = planned(methods=[Later()], rollout_steps=8)
    assert f"Later() has no rate: {told}." in plan.notes
    assert row_of(plan, Later()).rate is None


def test_what_methods_cost_is_told_under_their_own_name(free):
    paid = planned(methods=[LocalLearning(2)], rollout_steps=8)
    row, exact = row_of(free, LocalLearning(2)), free.rows[4]
    assert exact.horizon == 5
    part = row.flops / exact.flops
    spent = free.provenance["probing_steps"]["methods"]
    assert spent == pytest.approx(8 * part, abs=0.01)  # counted, tracked, a warm-up, five timed
    more = paid.provenance["probing_steps"]["methods"] - spent
    assert 8 * (1 + part) < more < 8 * (1 + part) + 2  # and the initial weights' losses on the last two batches
    assert f"methods {spent:.0f}" in free.explain()
    told = [detail for *_, detail in paid.provenance["rollouts"] if "method" in detail]
    assert [(detail["method"], detail["steps"]) for detail in told] == [("LocalLearning(modules=2)", 8)]


def test_the_explanation_says_when_a_method_beats_the_choice(plan):
    own, chosen = row_of(plan, SGR(3)), plan.row

    def told(**changes):
        row = replace(own, rate=0.97, rate_source="measured", **changes)
        rows = [r for r in plan.rows if r.algorithm == "horizon"]
        return explain([*rows, row], chosen, plan.objective, plan.cost, [])

    better = told(memory_bytes=chosen.memory_bytes - 4, feasible=True, objective=chosen.objective - 0.1)
    rates = f"with a rate of 0.97 instead of {chosen.rate:.2f}"
    assert "Another method beats this choice in a short run: SGR(modules=3) needs" in better
    assert rates in better
    worse = told(memory_bytes=chosen.memory_bytes + 4, feasible=True, objective=chosen.objective + 0.1)
    assert "Another method" not in worse
    assert "SGR(modules=3) (reference)" in worse


def test_plans_with_methods_are_kept_judged_anew_and_served(plan, app, tmp_path):
    plan.save(tmp_path / "plan.json")
    loaded = hp.Plan.load(tmp_path / "plan.json")
    assert (loaded.rows, loaded.row, loaded.explain()) == (plan.rows, plan.row, plan.explain())
    plan.plot(tmp_path / "plan.png")
    plan.plot_frontier(tmp_path / "frontier.png")
    anew = measured.replan(loaded, hp.MemoryLimit(plan.row.memory_bytes))
    assert anew.row.algorithm == "horizon"
    assert row_of(anew, SGR(3)).objective == -row_of(plan, SGR(3)).horizon
    with TestClient(app, base_url="http://localhost") as client:
        with app.state.database.write() as connection:
            plan_id = plans.store(connection, plan)
        assert hp.Plan.from_dict(client.get(f"/v1/plans/{plan_id}").json()).rows == plan.rows
        page = client.get(f"/plans/{plan_id}")
        assert page.status_code == 200
        assert "SGR(modules=3)" in page.text
        weighted = {"objective": {"kind": "weighted", "lam": 0.5}}
        again = client.post(f"/v1/plans/{plan_id}/replan", json=weighted)
        assert again.status_code == 201, again.text
        assert [row["algorithm"] for row in again.json()["rows"][-2:]] == ["LocalLearning(modules=2)", "TwoSteps()"]


@pytest.mark.parametrize(
    ("methods", "complaint"),
    [
        (SGR(2), r"methods=SGR\(modules=2.*: give a list"),
        ([SGR], r"methods\[0\]=<class .*: give a method such as"),
        ([SGR(2), SGR(2)], r"methods: SGR\(modules=2\) is there twice"),
    ],
)
def test_bad_methods_are_named(methods, complaint):
    with pytest.raises(ValueError, match=complaint):
        planned(methods=methods)


def test_nothing_can_be_run_on_a_card_that_is_not_there():
    with pytest.raises(ValueError, match="methods: nothing can be run on a simulated device"):
        planned(methods=[SGR(2)], device="simulated:24GiB")


def test_short_names_are_the_class_and_what_is_no_default():
    class Plain(Algorithm):
        def step(self, chain, batch, optimizer): ...

    assert short_name(Plain()) == "Plain"
    assert short_name(SGR(2, heads=task)) == "SGR(modules=2, heads=task)"
    assert short_name(LoCo(3, summed=True)) == "LoCo(stages=3, summed=True)"
