"""``horizonplan reproduce``: each experiment in miniature, against slow transcriptions."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from miniature import make_lab, shrink
from torch import nn

import horizonplan as hp
from horizonplan.models import ResidualCNN, ResidualLinear
from horizonplan.objective import AccuracyConstraint, Weighted
from horizonplan.reproduce import e1, fig2, fig3, run, scoring, selection, theorem
from horizonplan.reproduce.findings import FAILS, HOLDS, PARTLY
from horizonplan.reproduce.methods import BP, disjoint, sliding
from horizonplan.reproduce.numbers import line, log_line, ranks, rate
from horizonplan.reproduce.static import static_backward


@pytest.fixture
def tiny(monkeypatch):
    shrink(monkeypatch)


# The paper's definitions


def test_appendix_a():
    """The worked example: five residual layers, MSE, h = 1, 3 and 5."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(5)]

    class Block(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return x + torch.relu(self.layer(x))

    x, y = torch.randn(8, 4), torch.randn(8, 4)
    chain = hp.Chain(None, [Block(layer) for layer in layers], None, nn.functional.mse_loss)
    ends = {1: (1, 2, 3, 4, 5), 3: (3, 4, 5, 5, 5), 5: (5, 5, 5, 5, 5)}
    for h, losses_at in ends.items():
        chain.model.zero_grad()
        hp.horizon_backward(chain, (x, y), h)
        for t, end in enumerate(losses_at):
            state = x
            for s in range(end):
                state = state.detach() if s == t else state
                state = state + torch.relu(layers[s](state))
            wanted = torch.autograd.grad(nn.functional.mse_loss(state, y), layers[t].weight)[0]
            assert torch.equal(layers[t].weight.grad, wanted)


@pytest.mark.parametrize("kind", theorem.KINDS)
def test_theorem_s_gradients_are_the_engine_s(kind):
    """Eq. 27 against horizon_backward on whitened data, L = 1/2 |W - Phi|^2."""
    weights, phi = theorem.weights(kind, 7, seed=1, width=4)
    blocks = [nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(7)]
    for block, w in zip(blocks, weights, strict=True):
        block.weight.data.copy_(w)
    chain = hp.Chain(None, blocks, None, lambda out, target: 0.5 * (out - target).square().sum())
    eye = torch.eye(4, dtype=torch.float64)
    for h in range(1, 8):
        chain.model.zero_grad()
        hp.horizon_backward(chain, (eye, phi.T), h)
        wanted = torch.stack([block.weight.grad for block in blocks])
        torch.testing.assert_close(theorem.gradients(weights, phi, h), wanted, rtol=1e-10, atol=1e-12)


def test_theorem_s_powers_at_small_depths():
    """A drift's power grows towards 3; zero-mean weights stay near 2, and 1 - cos^2 shrinks with T."""
    rows = {kind: theorem.deviations(kind, (32, 128), 4) for kind in theorem.KINDS}

    def mean(kind, depth):
        powers = [theorem.power(rows[kind], kind, depth, seed, theorem.WIDE) for seed in range(4)]
        return sum(powers) / 4

    assert 2.3 < mean("drift", 32) < mean("drift", 128) < 3
    assert abs(mean("zero-mean", 128) - 2) < 0.4
    sizes = [sum(theorem._at_half(rows["zero-mean"], "zero-mean", depth)) for depth in (32, 128)]
    assert sizes[0] / sizes[1] == pytest.approx(4, rel=0.4)


def test_deviation_keeps_small_angles():
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    assert theorem.deviation(a, b) == pytest.approx(1e-18, rel=1e-6)
    assert theorem.deviation(a, torch.tensor([1.0, 1.0], dtype=torch.float64)) == pytest.approx(0.5)


@pytest.mark.parametrize("h", [1, 2, 4, 6])
@pytest.mark.parametrize("kind", ["linear", "cnn"])
def test_static_mode_is_the_same_gradient(kind, h):
    torch.manual_seed(0)
    if kind == "linear":
        model, batch, loss = ResidualLinear(3, 5, 2, 6), (torch.randn(4, 3), torch.randn(4, 2)), nn.functional.mse_loss
    else:
        model, loss = ResidualCNN(3, (2, 4), 3), nn.functional.cross_entropy
        batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    chain = hp.Chain.from_model(model, batch, loss=loss)
    hp.horizon_backward(chain, batch, h)
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    static_backward(model, batch, loss, h)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-5, atol=1e-7, msg=name)


def test_memory_is_linear_one_window_at_a_time_and_a_parabola_all_at_once(tiny, tmp_path):
    lab = make_lab(tmp_path)
    case = replace(lab.case("M1"), batch=2000)
    grid = list(range(1, 7))
    eager = lab.costs(case, [sliding(h, 6) for h in grid], "eager")
    sizes = [eager[sliding(h, 6).name].bytes for h in grid]
    steps = {b - a for a, b in pairwise(sizes[1:])}
    state = 2000 * 10 * 4
    assert all(abs(step - state) <= 1000 for step in steps)  # a block keeps its input
    static = [e1.static_bytes(lab, case, grid)[str(h)] for h in grid]
    assert abs(static[-1] - eager["BP"].bytes) <= 1.1 * state  # one window: back-propagation
    graphs = [h * (6 - h + 1) for h in grid]
    fit = np.linalg.lstsq(np.array([[g, 6 - h + 1, 1] for g, h in zip(graphs, grid, strict=True)]), static, rcond=None)
    assert fit[0][0] == pytest.approx(state, rel=0.05)


@pytest.mark.parametrize(("name", "state"), [("M1", 500 * 10 * 4), ("M2", 500 * 10 * 4), ("M3", 8 * 2 * 8 * 8 * 4)])
def test_static_mode_at_the_whole_depth_takes_what_back_propagation_takes(tiny, tmp_path, name, state):
    """To one state."""
    lab = make_lab(tmp_path)
    case = lab.case(name)
    exact = lab.costs(case, [BP], "eager")["BP"].bytes
    found = e1.static_bytes(lab, case, [3, case.depth])
    assert abs(found[str(case.depth)] - exact) <= 1.1 * state
    assert found["3"] > 1.2 * exact


# Figure 5's scoring


def test_relative_performance_against_a_slow_transcription():
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = {
            str(i): float(v) if generator.random() < 0.7 else None for i, v in enumerate(generator.normal(size=6))
        }
        known = [v for v in values.values() if v is not None]
        for name, found in scoring.relative(values).items():
            if values[name] is None:
                assert found == 1.5
            else:
                best, worst = sorted(known)[0], sorted(known)[-1]
                assert found == pytest.approx(0 if best == worst else (values[name] - best) / (worst - best))


def test_relative_performance_of_ties_and_of_nothing():
    assert scoring.relative({"a": 2.0, "b": 2.0, "c": None}) == {"a": 0.0, "b": 0.0, "c": 1.5}
    assert scoring.relative({"a": None}) == {"a": 1.5}


def test_worth_is_the_paper_s_objective():
    linear, ladder = (scoring.Column("M1", cost, "O2", 0.5) for cost in ("C1", "C2"))
    assert scoring.worth(linear, 0.8, 40, 100) == pytest.approx(-0.8 + 0.5 * 0.4)
    assert scoring.worth(ladder, 0.8, 31, 100) == pytest.approx(-0.8 + 0.5 * 2)
    strict = scoring.Column("M1", "C1", "O1", 0.1)
    assert scoring.worth(strict, 0.95, 40, 100) == pytest.approx(0.4)
    assert scoring.worth(strict, 0.85, 40, 100) is None
    assert scoring.worth(linear, -math.inf, 40, 100) is None


def test_there_are_twelve_cases_with_both_parameters():
    assert len({(c.model, c.cost, c.objective) for c in scoring.COLUMNS}) == 12
    assert len(scoring.COLUMNS) == 24


@pytest.mark.parametrize("objective", [AccuracyConstraint(0.2), Weighted(0.7)])
def test_algorithm_1_against_polyfit_and_brute_force(objective):
    depth, memory, price = 13, {1: 210.0, 5: 480.0, 9: 830.0, 13: 1000.0}, hp.LinearCost(1.0, 1000)
    cosines = {1: 0.62, 5: 0.83, 9: 0.97, 13: 0.99}
    a, b = np.polyfit(list(memory), list(memory.values()), 1)
    cubic = np.polyfit(list(cosines), list(cosines.values()), 3)
    values = {}
    for h in range(1, depth + 1):
        r, cost = min(1, np.polyval(cubic, h)) ** 2, round(a * h + b) / 1000
        if isinstance(objective, Weighted):
            values[h] = -r + 0.7 * cost
        elif r >= 0.8:
            values[h] = cost
    assert selection.algorithm_1(memory, cosines, depth, objective, price) == min(values, key=values.get)


def test_algorithm_1_without_a_feasible_horizon_takes_the_nearest():
    memory, cosines = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    assert selection.algorithm_1(memory, cosines, 4, AccuracyConstraint(0.1), hp.LinearCost(1.0, 4)) == 4


def test_a_negative_cosine_is_no_good_rate():
    """Squared it would be the best of all and the cheapest."""
    memory, cosines = {1: 1.0, 5: 5.0, 9: 9.0, 13: 13.0}, {1: -0.95, 5: 0.2, 9: 0.6, 13: 1.0}
    assert selection.algorithm_1(memory, cosines, 13, AccuracyConstraint(0.1), hp.LinearCost(1.0, 13)) > 9


# Statistics


def test_lines_ranks_and_rates():
    assert line([0, 1, 2], [1, 3, 5]) == line([0, 1, 2], [1.0, 3.0, 5.0])
    assert log_line([1, 2, 4], [3, 24, 192]).slope == pytest.approx(3)
    assert ranks([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert ranks([1, 2, 3], [1, 1, 1]) == 0
    assert rate(1.0, 0.1, 0.01) == pytest.approx(0.5)
    assert rate(1.0, math.inf, 0.01) == -math.inf


@pytest.mark.parametrize("exact", [4.0, 1.0, 2.0, 0.0, -1.0, math.inf, math.nan])
def test_there_is_no_rate_where_back_propagation_does_not_lower_the_loss(exact):
    """Eq. 14 would turn its sign, divide by 0 or take the logarithm of 0."""
    assert rate(1.0, 0.5, exact) == rate(1.0, 4.0, exact) == -math.inf


def test_a_loss_of_zero_has_the_highest_rate_and_a_growing_one_a_negative_rate():
    assert math.isfinite(rate(1.0, 0.0, 0.5))
    assert rate(1.0, 0.0, 0.5) > rate(1.0, 1e-300, 0.5) > rate(1.0, 0.5, 0.5) == 1
    assert rate(1.0, 2.0, 0.5) == pytest.approx(-1)


# Training runs and costs


def slow_gradients(model, batch, loss, ends):
    """By autograd, block by block: the loss at the end of each block's window, its input held constant."""
    blocks = list(model.blocks)
    with torch.no_grad():
        states = [model.stem(batch[0])]
        for block in blocks:
            states.append(block(states[-1]))
    found = []
    for t, end in enumerate(ends):
        x = states[t]
        for block in blocks[t:end]:
            x = block(x)
        found.append(torch.autograd.grad(loss(model.head(x), batch[1]), list(blocks[t].parameters())))
    return found


@pytest.mark.parametrize("stride", ["s = 1", "s = h"])
def test_angles_of_figure_2_against_autograd(tiny, tmp_path, stride):
    lab = make_lab(tmp_path)
    case = replace(lab.case("M2"), epochs=1)
    rows = fig2.angles(lab, case, seed=1)
    model, batches = lab.model(case, 1), lab.batches(case, 1, fig2.BATCHES)
    mine = {r["h"]: r["1-cos"] for r in rows if (r["stride"], r["epoch"]) == (stride, 0)}
    assert list(mine) == ([1, 2, 3, 4, 5] if stride == "s = 1" else [2, 3, 4, 5])
    for h, found in mine.items():
        s = 1 if stride == "s = 1" else h
        cosines = []
        for batch in batches:
            g, exact = (
                torch.cat([p.flatten() for own in slow_gradients(model, batch, case.loss, ends) for p in own])
                for ends in ([min(t // s * s + h, 6) for t in range(6)], [6] * 6)
            )
            cosines.append(torch.nn.functional.cosine_similarity(g, exact, dim=0).item())
        assert found == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("learning_rate", [2.0, 1e9])
def test_angles_of_a_run_that_diverges_are_those_until_then(tiny, tmp_path, learning_rate):
    lab = make_lab(tmp_path)
    case = replace(lab.case("M1"), learning_rate=learning_rate, epochs=40)
    rows = fig2.angles(lab, case, seed=0)
    assert {0} <= {row["epoch"] for row in rows} < set(fig2.EPOCHS)
    assert all(math.isfinite(row["1-cos"]) for row in rows)


def test_a_run_of_figure_e2_against_a_loop_by_hand(tiny, tmp_path):
    """Losses of each epoch with h = 2, the learning rate multiplied by .9 after an epoch whose loss grew."""
    lab = make_lab(tmp_path)
    case = replace(lab.case("M1"), learning_rate=0.4, epochs=6, batch=250)
    found = lab.run(case, sliding(2, 6), 0)
    model, loader, lr, losses = lab.model(case, 0), lab.loader(case, 0), case.learning_rate, []
    for _ in range(case.epochs):
        sums = 0.0
        for x, y in loader:
            inner = slow_gradients(model, (x, y), case.loss, [2, 3, 4, 5, 6, 6])
            stem = torch.autograd.grad(case.loss(model.head(first_two(model, x)), y), list(model.stem.parameters()))
            whole = case.loss(model(x), y)
            head = torch.autograd.grad(whole, list(model.head.parameters()))
            sums += whole.item() * len(x)
            parts = [(model.stem, stem), *zip(model.blocks, inner, strict=True), (model.head, head)]
            with torch.no_grad():
                for module, gradients in parts:
                    for p, g in zip(module.parameters(), gradients, strict=True):
                        p -= lr * g
        losses.append(sums / 2000)
        lr *= 0.9 if len(losses) > 1 and losses[-1] > losses[-2] else 1
    assert found.losses == pytest.approx(losses, rel=1e-3)
    assert lr < case.learning_rate  # the rule has been at work


def first_two(model, x):
    return model.blocks[1](model.blocks[0](model.stem(x)))


def test_batches_of_figure_3_are_reciprocal_to_the_horizon(tiny, tmp_path):
    case = replace(make_lab(tmp_path).case("M1"), batch=60)
    assert [fig3.reciprocal(case, h).batch for h in (1, 2, 3, 5, 6)] == [360, 180, 120, 72, 60]


# Verdicts: a world as the paper says, and one that is not


def linear_or_not(power):
    """Rows of Figure E1 whose memory grows with a power of the horizon, and the static mode's."""
    rows = []
    for model in ("M1", "M2", "M3"):
        for h in range(1, 13):
            place = {"model": model, "h": h, "T": 12}
            rows.append({**place, "kind": "s = 1", "bytes": 100 + 7 * h**power})
            static = h * (12 - h + 1) if power == 1 else h
            rows.append({**place, "kind": "all windows at once", "bytes": 50 + static, "bytes/BP": static / 12})
    return rows


@pytest.mark.parametrize(("power", "verdict"), [(1, HOLDS), (5, FAILS)])
def test_verdicts_on_memory(power, verdict):
    rows = linear_or_not(power)
    assert e1._linear(rows).verdict == verdict
    assert e1._bulged(rows).verdict == verdict


@pytest.mark.parametrize(("drift", "verdict"), [(0.0, HOLDS), (1.0, FAILS)])
def test_verdicts_on_angles(drift, verdict):
    """1 - cos is a power of T - h that grows over the epochs; or a wave that falls."""
    rows = [
        {"model": m, "seed": 0, "epoch": e, "stride": "s = 1", "h": 10 - left, "T-h": left}
        | {"1-cos": 1e-3 * (1 + e) * left**2 if drift == 0 else 1e-3 * (2 + math.sin(2 * left)) / (1 + e)}
        for m in fig2.MODELS
        for e in (0, 1)
        for left in range(1, 10)
    ]
    fits = [{"model": m, "epoch": e, "seed": 0, **fig2._fit(rows, m, e, 0)} for m in fig2.MODELS for e in (0, 1)]
    assert fig2._polynomial(fits).verdict == verdict
    assert fig2._growing(rows).verdict == verdict


@pytest.mark.parametrize(
    ("near", "growth", "verdict"),
    [(2.9, 0, HOLDS), (2.4, 0, PARTLY), (2.0, 0, FAILS), (2.9, -0.5, PARTLY), (2.9, -1, FAILS), (2.9, 1, FAILS)],
)
def test_verdicts_on_the_theorem(tiny, near, growth, verdict):
    """Rows of 2 T^growth (1 - h/T)^3: the formal statement wants growth 0, the informal one at most 0."""
    places = [{"kind": "drift", "T": T, "seed": s} for T in theorem.DEPTHS for s in range(theorem.SEEDS)]
    powers = [{**place, "near": near, "wide": near} for place in places]
    rows = [
        {**place, "stride": "s = 1", "1-h/T": left, "1-cos2": 2 * place["T"] ** growth * left**3}
        for place in places
        for left in (theorem._left(share, place["T"]) for share in theorem.SHARES)
    ]
    claim = theorem._claim(rows, powers, "drift", "a drift")
    assert claim.verdict == verdict
    assert f"between {growth:.2f} and {growth:.2f}" in claim.found.replace("-0.00", "0.00")
    assert f"an upper bound, {FAILS if growth > 0 else HOLDS}:" in claim.found


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_theorem_has_as_many_draws_as_seeds_are_asked_for(tiny, tmp_path, seeds):
    found = theorem.run(make_lab(tmp_path, seeds=seeds), tmp_path)
    assert f"mean over {seeds} draws" in found.caption
    assert ("±" in found.claims[0].found) == (seeds > 1)


def test_runs_of_one_seed_are_equal_and_a_diverged_one_is_kept(tiny, tmp_path):
    case = make_lab(tmp_path).case("M1")
    first, second = (make_lab(tmp_path / name).run(case, sliding(2, 6), 0) for name in "ab")
    assert first == second
    wild = make_lab(tmp_path / "c").run(replace(case, learning_rate=1e9), BP, 0)
    assert "the weights were not updated" in wild.stopped
    assert wild.final_loss == math.inf


def test_checkpointing_and_disjoint_windows_cost_what_their_units_say(tiny, tmp_path):
    lab = make_lab(tmp_path)
    costs = lab.costs(lab.case("M1"), [BP, disjoint(3), *scoring.again(6)], "costs")
    assert (costs["BP"].units, costs["h=s=3"].units) == (3 * 6, 3 * 6 - 1)  # the stem trains
    every, root = (costs[method.name] for method in scoring.again(6))
    assert every.units == root.units == 4 * 6
    assert root.bytes < costs["BP"].bytes
    assert all(len(cost.seconds) == 1 for cost in costs.values())
    again = make_lab(tmp_path / "other").costs(lab.case("M1"), [disjoint(3), BP], "costs")
    assert {name: cost.bytes for name, cost in again.items()} == {name: costs[name].bytes for name in again}


def test_a_damaged_folder_is_told_by_name(tmp_path):
    (tmp_path / "settings.json").write_text("{bad")
    with pytest.raises(ValueError, match=r"settings.json in it is damaged .* give another folder"):
        run._claim_folder(tmp_path, {"scale": "small"})
