"""A plan is immutable, survives a file bit for bit, refuses what is none, and trains what it says."""

import dataclasses
import json
import math

import oracle
import pytest
import torch
from families import ResidualMLP, classes
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.explain import explain
from horizonplan.gradient import horizon_backward
from horizonplan.plan import SCHEMA_VERSION

DEPTH = 4


def task(depth=DEPTH):
    torch.manual_seed(2)
    model = ResidualMLP(depth, width=12)
    return model, [(torch.randn(16, 4), classes(16)) for _ in range(4)]


@pytest.fixture(scope="module")
def plan():
    model, data = task()
    return hp.plan_horizon(
        model,
        data,
        objective=hp.AccuracyConstraint(0.6),
        cost=hp.LadderCost(2.0, "2KB"),
        rollout_steps=6,
        progress=False,
    )


def test_a_plan_and_its_parts_are_frozen(plan):
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.depth = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.row.horizon = 3
    with pytest.raises(AttributeError):
        plan.horizon = 3
    assert isinstance(plan.rows, tuple)
    assert isinstance(plan.notes, tuple)


def test_a_plan_read_back_is_equal(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = hp.Plan.load(path)
    assert loaded == plan
    assert loaded.explain() == plan.explain()
    assert [loaded.curves["cosine"](h) for h in range(1, DEPTH + 1)] == [
        plan.curves["cosine"](h) for h in range(1, DEPTH + 1)
    ]
    assert loaded.schedule == plan.schedule
    again = tmp_path / "again.json"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_the_file_is_strict_json_with_the_contract_s_names(plan):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads(json.dumps(plan.to_dict()), parse_constant=refuse)
    assert data["schema_version"] == SCHEMA_VERSION
    assert (data["horizon"], data["stride"], data["recompute"]) == (plan.horizon, plan.stride, plan.recompute)
    assert data["rows"][data["chosen"]] == plan.row.to_dict()


def test_a_run_that_diverged_leaves_strict_json():
    model, _ = task()
    data = [(torch.randn(64, 4), classes(64))]

    def plan(**kwargs):
        return hp.plan_horizon(model, data, progress=False, optimizer=lambda p: torch.optim.SGD(p, lr=1e30), **kwargs)

    roomy = plan(objective=hp.MemoryLimit("1GB"), rollout_steps=0)
    limit = next(r.memory_bytes for r in roomy.rows if r.horizon == 2)
    diverged = plan(objective=hp.MemoryLimit(limit), rollout_steps=8)
    assert (diverged.horizon, diverged.row.rate_source) == (2, "derived")
    assert any("The short runs found no rate" in note for note in diverged.notes)
    assert hp.Plan.from_dict(json.loads(json.dumps(diverged.to_dict(), allow_nan=False))) == diverged


def test_functions_are_kept_by_name_only(plan, tmp_path):
    def my_price(size):
        return size / 1000

    named = dataclasses.replace(plan, cost=my_price)
    named.save(tmp_path / "plan.json")
    loaded = hp.Plan.load(tmp_path / "plan.json")
    assert loaded.cost.name == "my_price"
    assert loaded.rows == plan.rows
    loaded.explain()
    with pytest.raises(ValueError, match="files store no code"):
        loaded.cost(1000)


def damaged(change):
    def make(text):
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return make


CORRUPT = {
    "no JSON": (lambda text: text[: len(text) // 2], "is no JSON file"),
    "empty": (lambda text: "", "is no JSON file"),
    "another file": (lambda text: "[1, 2]", "no schema_version"),
    "no version": (damaged(lambda d: d.pop("schema_version")), "no schema_version"),
    "a strange version": (damaged(lambda d: d.update(schema_version="new")), "no schema_version"),
    "newer": (damaged(lambda d: d.update(schema_version=SCHEMA_VERSION + 1)), r"schema_version=2 is newer.*upgrade"),
    "no rows": (damaged(lambda d: d.pop("rows")), "the data are damaged.*plan again"),
    "a missing choice": (damaged(lambda d: d.update(chosen=999)), "the data are damaged.*plan again"),
    "a foreign field": (damaged(lambda d: d["rows"][0].update(colour="red")), "the data are damaged.*plan again"),
    "a bad row": (damaged(lambda d: d["rows"][0].update(cosine=7)), "the data are damaged.*plan again"),
    "an impossible depth": (damaged(lambda d: d.update(depth=0)), "the data are damaged.*plan again"),
    "no objective": (damaged(lambda d: d.update(objective=None)), "the data are damaged.*plan again"),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_or_newer_file_is_refused_by_name(plan, tmp_path, kind):
    corrupt, message = CORRUPT[kind]
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text(corrupt(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        hp.Plan.load(path)
    assert str(path) in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00plan")
    with pytest.raises(ValueError, match="is no JSON file"):
        hp.Plan.load(tmp_path / "plan.json")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        hp.Plan.load(tmp_path / "nowhere.json")


PNG = b"\x89PNG\r\n\x1a\n"


def test_the_plot_is_a_picture(plan, tmp_path):
    plan.plot(tmp_path / "plan.png")
    picture = (tmp_path / "plan.png").read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) > 10_000
    plan.plot(str(tmp_path / "plan.svg"))
    assert "<svg" in (tmp_path / "plan.svg").read_text(encoding="utf-8")


def test_a_bare_plan_can_be_plotted_and_explained(tmp_path):
    """Nothing fitted, nothing timed: one row without a cosine, and back-propagation."""
    rows = (hp.Row(horizon=1, memory_bytes=10), hp.Row(horizon=2, memory_bytes=20, cosine=1.0, rate=1.0, feasible=True))
    bare = hp.Plan(rows[1], rows, 2, hp.AccuracyConstraint(), hp.LinearCost(node_memory=100), curves={})
    bare.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(PNG)
    assert "BP (back-propagation)" in bare.explain()
    assert hp.Plan.from_dict(bare.to_dict()) == bare


@pytest.mark.parametrize(("horizon", "stride", "recompute"), [(1, 1, 0), (2, 1, 0), (3, 3, 0), (4, 1, 0), (4, 1, 2)])
def test_chain_and_backward_are_horizon_backward_s(plan, horizon, stride, recompute):
    model, data = task()
    row = hp.Row(horizon=horizon, stride=stride, recompute=recompute, memory_bytes=1)
    chosen = dataclasses.replace(plan, row=row)
    chain = chosen.chain(model, data[0])
    assert chosen.schedule == hp.Schedule.horizon(DEPTH, horizon, stride, recompute)
    found = oracle.step(lambda: chosen.backward(chain, data[0], scale=2.0), model)
    wanted = oracle.step(lambda: horizon_backward(chain, data[0], horizon, stride, recompute, scale=2.0), model)
    assert torch.equal(found[0], wanted[0])
    oracle.assert_same_gradients(found[1], wanted[1])


def test_a_chain_takes_the_loss_that_it_is_given(plan):
    model, data = task()
    batch = data[0]
    torch.manual_seed(0)
    doubled = plan.chain(model, batch, loss=lambda output, target: 2 * F.cross_entropy(output, target))
    torch.manual_seed(0)
    twice = doubled.loss(batch)
    torch.manual_seed(0)
    assert twice == 2 * plan.chain(model, batch).loss(batch)
    torch.manual_seed(0)
    own = plan.chain(model, batch, compute_loss=lambda m, b: 3 * F.cross_entropy(m(b[0]), b[1]))
    assert math.isclose(own.loss(batch).item(), 1.5 * twice.item(), rel_tol=1e-6)


def test_a_plan_for_another_model_is_refused(plan):
    deeper, data = task(depth=DEPTH + 2)
    with pytest.raises(ValueError, match=r"made for 4 blocks 'blocks.0'..'blocks.3', this model has 6.*plan again"):
        plan.chain(deeper, data[0])
    other = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()) for _ in range(4)))
    with pytest.raises(ValueError, match="plan again"):
        hp.train(other, [(torch.randn(3, 4), torch.randn(3, 4))], plan=plan, progress=False)


def test_a_schedule_for_another_depth_is_refused(plan):
    model, data = task(depth=DEPTH + 2)
    with pytest.raises(ValueError, match="depth 4, the chain has 6"):
        plan.backward(hp.Chain.from_model(model, data[0]), data[0])


def test_the_explanation_names_choice_objective_cost_and_sources(plan):
    text = plan.explain()
    assert plan.objective.describe() in text
    assert "m measured, f fitted, p predicted" in text
    assert f"Train with h={plan.horizon}, " in text
    lines = plan.table().splitlines()
    assert len(lines) == 1 + len(plan.rows)
    assert [line.startswith("->") for line in lines[1:]] == [row == plan.row for row in plan.rows]
    assert all(len(line) < 200 for line in lines)


def test_notes_stand_at_the_end_of_the_explanation(plan):
    told = explain(plan.rows, plan.row, plan.objective, plan.cost, ("beware",))
    assert told.endswith("Note: beware")
