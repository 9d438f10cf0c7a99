"""Beside the paper's family: what the table of ``candidates="all"`` holds, what its numbers are worth, and who may win.

Oracles: the tracker around real steps; back-propagation's own gradient; the definition of dominance.
"""

import math
import re
from dataclasses import replace

import pytest
import torch
from families import ResidualMLP
from torch import nn
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.batch import batch_size
from horizonplan.candidates import schedule_of
from horizonplan.frontier import dominates
from horizonplan.precision import autocast
from horizonplan.probes.pieces import check_pieces
from horizonplan.probes.steady import optimizer_for, restored, standing_bytes, trainable
from horizonplan.probes.tracker import LiveBytes

pytestmark = pytest.mark.filterwarnings("ignore::horizonplan.PoorFitWarning")

DEPTH, ROWS = 5, 48


def task(norm=False, rows=ROWS):
    torch.manual_seed(1)
    model = ResidualMLP(DEPTH, width=12, p=0.0, norm=norm)
    truth = torch.randn(4, 3)
    inputs = [torch.randn(rows, 4) for _ in range(4)]
    return model, [(x, (x @ truth).argmax(1)) for x in inputs]


def planned(model, data, **kwargs):
    kwargs = {"progress": False, "rollout_steps": 4, "candidates": "all", "horizons": [1, 2, 4, 5], **kwargs}
    return hp.plan_horizon(model, data, **kwargs)


@pytest.fixture(scope="module")
def made():
    model, data = task()
    return model, data, planned(model, data, objective=hp.MemoryLimit("1GiB"))


def way(row):
    return row.algorithm, row.horizon, row.stride, row.recompute, row.micro_batches, row.precision


def test_the_contract_s_rows_are_there_and_every_row_is_once(made):
    _, _, plan = made
    ways = [way(row) for row in plan.rows]
    assert len(set(ways)) == len(ways)
    pairs = {(row.horizon, row.stride) for row in plan.rows if row.plain and not row.reference}
    assert pairs >= {(h, 1) for h in range(1, DEPTH + 1)} | {(h, h) for h in range(2, DEPTH)}
    assert pairs >= {(h, 2) for h in range(3, DEPTH)}
    assert {(DEPTH, 1), (DEPTH, 2)} <= {(row.horizon, row.recompute) for row in plan.rows}
    assert all(row.micro_batches == 2 ** round(math.log2(row.micro_batches)) <= ROWS for row in plan.rows)
    assert any(row.micro_batches > 1 for row in plan.rows)
    assert any(row.precision == "bf16" for row in plan.rows)
    assert not any(row.reference for row in plan.rows)
    assert hp.Plan.from_dict(plan.to_dict()) == plan


def test_only_what_is_exact_is_called_so(made):
    _, _, plan = made
    for row in plan.rows:
        known = row.horizon == DEPTH and row.precision == "fp32"
        assert row.exact == known
        if known:
            assert (row.cosine, row.rate, row.rate_source) == (1.0, 1.0, "derived")
        elif row.precision == "bf16" or row.algorithm != "horizon":
            assert (row.cosine, row.rate, row.rate_source) == (None, None, "unmeasured")


@pytest.mark.slow
def test_bytes_of_all_rows_are_those_of_real_steps(made):
    model, data, plan = made
    chain = hp.Chain.from_model(model.train(), data[0])
    optimizer = optimizer_for(trainable(chain), None)
    for row in plan.rows:
        with restored(chain, weights=True):
            one = replace(plan, row=row)
            assert one.schedule == schedule_of(row, DEPTH)
            for _ in range(2):  # the first makes the optimiser's state
                optimizer.zero_grad(set_to_none=True)
                base = standing_bytes(chain, optimizer, data[0])
                with LiveBytes() as tracker:
                    one.backward(chain, data[0])
                    optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        again = bool(row.recompute)
        assert row.memory_bytes == pytest.approx(base + tracker.peak, rel=0.09 if again else 0.02), way(row)


def test_more_micro_batches_need_fewer_bytes_and_cost_no_flops(made):
    _, _, plan = made
    exact = next(row for row in plan.rows if row.horizon == DEPTH and row.plain)
    for k in {row.recompute for row in plan.rows if row.exact}:
        rows = [row for row in plan.rows if row.exact and row.recompute == k]
        rows.sort(key=lambda row: row.micro_batches)
        sizes = [row.memory_bytes for row in rows]
        assert sizes == sorted(sizes, reverse=True)
        assert len({row.flops for row in rows}) == 1
    assert min(row.memory_bytes for row in plan.rows if row.micro_batches > 1) < exact.memory_bytes


class Normed(ResidualMLP):
    def __init__(self):
        super().__init__(DEPTH, width=12, p=0.0, norm=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return super().forward(self.norm(x))


def masked(data):
    """Targets of which the parts have different numbers: the loss is a mean over those alone."""
    return [(x, torch.where(torch.arange(len(y)) < 13, torch.full_like(y, -100), y)) for x, y in data]


@pytest.mark.parametrize(("norm", "message"), [(True, "couples the samples"), (False, "mean over its 2 micro-batches")])
def test_parts_that_have_another_gradient_are_not_called_exact(norm, message):
    model, data = task()
    model, data = (Normed(), data) if norm else (model, masked(data))
    plan = planned(model, data, objective=hp.AccuracyConstraint(0.5), rollout_steps=0)
    parts = [row for row in plan.rows if row.micro_batches > 1]
    assert parts
    assert all((row.rate, row.cosine, row.feasible) == (None, None, False) for row in parts)
    assert any("not the exact gradient" in note and message in note for note in plan.notes)
    assert plan.micro_batches == 1


class Tied(nn.Module):
    """As GPT-2 begins: small weights, tied ones, so that the loss of every token is about ln V."""

    def __init__(self, words=50, width=8):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(width, words, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("valid", [[8, 8, 8, 8], [8, 7, 1, 2]])
def test_a_mean_over_valid_tokens_is_seen_through_although_all_losses_are_alike(valid):
    torch.manual_seed(0)
    ids, words = torch.randint(0, 50, (2, 4, 8))
    for row, count in enumerate(valid):
        words[row, count:] = -100
    chain = hp.Chain.from_model(Tied(), (ids, words), loss=lambda o, t: nn.functional.cross_entropy(o.mT, t))
    if len(set(valid)) == 1:
        return check_pieces(chain, (ids, words), 2)
    with pytest.raises(ValueError, match="gradient at the head differs by"):
        check_pieces(chain, (ids, words), 2)


OBJECTIVES = {
    "accuracy": (hp.AccuracyConstraint(0.3), hp.LadderCost(1.0, 4000)),
    "weighted": (hp.Weighted(0.3), None),
    "time": (hp.TimeToLoss(100), None),
    "money": (hp.MoneyToLoss(100), hp.LadderCost(1.0, 4000)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_choice_is_on_the_frontier_and_was_measured(name):
    model, data = task()
    objective, cost = OBJECTIVES[name]
    plan = planned(model, data, objective=objective, cost=cost)
    assert plan.row in plan.frontier
    assert plan.row.memory_source == "measured"
    assert plan.row.exact or plan.row.rate_source == "measured"
    candidates = [row for row in plan.rows if not row.reference and row.fits is not False]
    assert not any(dominates(row, plan.row) for row in candidates)
    best = min(row.objective for row in candidates if row.feasible)
    assert plan.row.objective == best


@pytest.mark.slow
def test_within_a_limit_the_exact_gradient_is_had_in_some_way_and_the_plan_says_which(made):
    model, data, free = made
    assert (free.row.exact, free.recompute) == (True, 0)
    exact = sorted({row.memory_bytes for row in free.rows if row.exact})
    plan = planned(model, data, objective=hp.MemoryLimit(exact[-1] - 1))
    assert plan.row.exact
    assert not plan.row.plain
    assert plan.row.memory_bytes < exact[-1]
    assert re.search(r"Its gradient is exact: (activation checkpointing|accumulation).* wins", plan.explain())
    least = planned(model, data, objective=hp.MemoryLimit(round(1.02 * exact[0])))
    assert least.row.memory_bytes <= 1.02 * exact[0]
    assert least.micro_batches > 1


@pytest.mark.parametrize(("micro", "k"), [(4, 0), (8, 2), (32, 0)])
def test_a_plan_in_micro_batches_has_the_gradient_and_trains_as_back_propagation(made, micro, k):
    model, data, plan = made
    plan = replace(plan, row=next(row for row in plan.rows if row.exact and row.plain))
    row = replace(plan.row, micro_batches=micro, recompute=k)
    split = replace(plan, row=row, rows=(*plan.rows, row))
    assert (split.micro_batches, split.precision) == (micro, "fp32")
    data = [*data, (data[0][0][:5], data[0][1][:5])]  # a last batch with fewer samples than some have parts
    chain = split.chain(model, data[0])
    for batch in data:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        exact = [p.grad.clone() for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        split.backward(chain, batch, scale=0.5)
        torch.testing.assert_close([2 * p.grad for p in model.parameters()], exact, rtol=1e-4, atol=1e-6)
    model.zero_grad(set_to_none=True)
    losses = []
    for one in (plan, split):
        model, _ = task()
        sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
        result = hp.train(model, data, plan=one, epochs=2, optimizer=sgd, progress=False)
        losses.append([entry["loss"] for entry in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_training_takes_the_plan_s_micro_batches_and_precision(made):
    _, data, plan = made
    model, _ = task()
    row = replace(plan.row, micro_batches=4, precision="bf16", recompute=0)
    low = replace(plan, row=row, rows=(*plan.rows, row))
    seen = []
    block = next(m for m in model.modules() if isinstance(m, nn.Linear))
    block.register_forward_hook(lambda m, given, out: seen.append((len(given[0]), out.dtype)))
    hp.train(model, data[:1], plan=low, epochs=1, progress=False)
    assert seen[-4:] == [(ROWS // 4, torch.bfloat16)] * 4
    seen.clear()
    hp.train(model, data[:1], plan=low, epochs=1, precision="fp32", progress=False)  # the user's word goes before
    assert seen[-4:] == [(ROWS // 4, torch.float32)] * 4
    with pytest.raises(ValueError, match="fused and micro_batches=4"):
        hp.train(model, data, plan=low, fused=True, progress=False)


@pytest.mark.slow
def test_bf16_is_left_out_where_the_model_does_not_run_under_it():
    class Picky(ResidualMLP):
        def forward(self, x):
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError("expected scalar type Float but found BFloat16")
            return super().forward(x)

    torch.manual_seed(1)
    _, data = task()
    plan = planned(Picky(DEPTH, width=12, p=0.0, norm=False), data, objective=hp.MemoryLimit("1GiB"), rollout_steps=0)
    assert not any(row.precision == "bf16" for row in plan.rows)
    assert any("does not run under it" in note and "found BFloat16" in note for note in plan.notes)


def test_without_a_number_of_samples_there_are_no_micro_batches():
    model, data = task()
    batches = [{"x": x, "y": y, "extra": torch.zeros(3)} for x, y in data]
    assert batch_size(batches[0]) is None
    with autocast("fp32", torch.device("cpu")):
        plan = planned(
            model,
            batches,
            compute_loss=lambda m, b: F.cross_entropy(m(b["x"]), b["y"]),
            objective=hp.MemoryLimit("1GiB"),
            rollout_steps=0,
        )
    assert all(row.micro_batches == 1 for row in plan.rows)
    assert any("share no first dimension" in note for note in plan.notes)
