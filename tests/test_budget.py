"""Where back-propagation does not fit: a small card, emulated, is planned for and trained on within its bytes."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import horizonplan as hp
from horizonplan.batch import batch_size, resized, split
from horizonplan.candidates import Room
from horizonplan.choice import choose_stride, first_that_fits
from horizonplan.frugal import Frugal
from horizonplan.predict import accumulated_bytes, at_batch_size, step_bytes
from horizonplan.probes import LiveBytes, profile
from horizonplan.probes.budget import Budget, host_copy
from horizonplan.probes.memory import OUT_OF_MEMORY, step
from horizonplan.probes.pieces import check_pieces, gradient
from horizonplan.probes.steady import optimizer_for, restored, standing_bytes, trainable

DEPTH = 6


class Wide(nn.Module):
    """A residual block whose insides are much wider than its state."""

    def __init__(self, width=8, inside=64):
        super().__init__()
        self.up, self.down = nn.Linear(width, inside), nn.Linear(inside, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, depth=DEPTH, norm=False):
        super().__init__()
        self.blocks = nn.ModuleList(Wide() for _ in range(depth))
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def task(depth=DEPTH, rows=256, batches=4, norm=False):
    torch.manual_seed(0)
    pairs = [(torch.randn(rows, 8), torch.randint(0, 3, (rows,))) for _ in range(batches)]
    return Model(depth, norm), pairs


def needs(model, data, **kwargs):
    """Peak bytes of a real step at every horizon."""
    chain = hp.Chain.from_model(model, data[0])
    return {s.horizon: s.value for s in hp.probes.memory(chain, data, range(1, chain.depth + 1), **kwargs)}


def plan(model, data, limit, **kwargs):
    kwargs = {"objective": hp.MemoryLimit(limit), "rollout_steps": 0, "progress": False, "strides": (1,), **kwargs}
    return hp.plan_horizon(model, data, device=f"emulated:{limit}", **kwargs)


def fits_in(limit, call, held):
    try:
        with Budget(limit) as budget:
            budget.hold(held)
            call()
    except torch.OutOfMemoryError:
        return False
    return True


@pytest.mark.parametrize("horizon", [1, 3, DEPTH])
def test_memory_runs_out_below_the_peak_and_not_at_it(horizon):
    model, data = task()
    chain = hp.Chain.from_model(model, data[0])
    run = lambda: hp.horizon_backward(chain, data[0], horizon)  # noqa: E731
    run()
    model.zero_grad(set_to_none=True)
    with LiveBytes() as tracker:
        run()
    held = [*model.parameters(), *data[0]]
    peak = tracker.peak + sum(t.nbytes for t in held)
    for short, expected in ((0, True), (1, False), (peak // 2, False)):
        model.zero_grad(set_to_none=True)
        assert fits_in(peak - short, run, held) is expected
    assert all(p.grad is None for p in model.parameters())  # nothing is left of the run that failed


def test_what_is_the_host_s_does_not_count():
    x = torch.zeros(1000)
    with Budget(100):
        copied = host_copy(x)
        with pytest.raises(torch.OutOfMemoryError, match=r"3\.9 KiB more than the 0 B in use do not fit in 100 B"):
            x.clone()
    assert copied.data_ptr() != x.data_ptr()


def test_running_out_is_a_measurement_and_larger_horizons_are_not_tried():
    model, data = task()
    chain = hp.Chain.from_model(model, data[0])
    wanted = needs(model, data)
    before = copy.deepcopy(model.state_dict())
    with Budget(wanted[3]) as budget:
        budget.hold(*model.parameters(), *data[0])
        found = hp.probes.memory(chain, data[:1], [5, 1, 4, 3], (1, "horizon"))
    ones = [s for s in found if s.stride == 1]
    assert [(s.horizon, s.value) for s in ones[:2]] == [(1, wanted[1]), (3, wanted[3])]
    assert (ones[2].horizon, ones[2].source) == (4, OUT_OF_MEMORY)
    assert math.isnan(ones[2].value)
    assert len(ones) == 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("horizon", range(1, DEPTH))
def test_a_card_too_small_for_back_propagation_gets_the_largest_horizon_that_fits_and_trains_within_it(horizon):
    model, data = task()
    limit = needs(model, data)[horizon] + 7
    made = plan(model, data, limit)
    assert (made.horizon, made.row.memory_source, made.row.fits) == (horizon, "measured", True)
    assert all((row.memory_bytes <= limit) == row.fits for row in made.rows)
    result = hp.train(model, data, plan=made, epochs=2, device=f"emulated:{limit}", progress=False)
    assert result.peak_bytes == made.row.memory_bytes <= limit
    assert math.isfinite(result.final_loss)
    with pytest.raises(torch.OutOfMemoryError):
        hp.train(model, data, device=f"emulated:{limit}", oom_retries=0, progress=False)


SHAPES = {
    "list": lambda data: data,
    "slices": lambda data: list(zip(*(torch.cat(part).split(256) for part in zip(*data, strict=True)), strict=True)),
    "loader": lambda data: DataLoader(TensorDataset(*map(torch.cat, zip(*data, strict=True))), batch_size=256),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rollout_steps", [0, 6])
def test_only_one_batch_at_a_time_is_on_the_card_however_they_come(shape, rollout_steps):
    model, data = task()
    limit = needs(model, data)[3]
    batches = SHAPES[shape](data)
    made = plan(model, batches, limit, rollout_steps=rollout_steps)
    assert (made.horizon, made.row.fits, made.row.memory_source) == (3, True, "measured")
    result = hp.train(model, batches, plan=made, device=f"emulated:{limit}", progress=False, val_data=batches)
    assert result.peak_bytes == made.row.memory_bytes == limit


def test_rates_of_another_gradient_are_not_told():
    torch.manual_seed(0)
    depth = 24
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(depth)]
    model = nn.Sequential(*layers, nn.BatchNorm1d(16), nn.Linear(16, 3))
    data = [(torch.randn(1024, 16), torch.randint(0, 3, (1024,))) for _ in range(2)]
    blocks = [str(t) for t in range(depth)]
    costs = profile(hp.Chain.from_model(model, data[0], blocks), data[0], repeats=0)
    limit = int(1.5 * step_bytes(hp.Schedule.horizon(depth, 1), costs))
    made = plan(model, data, limit, blocks=blocks, batches=2, rollout_steps=4, strides=(1, "horizon"))
    assert made.row.rate is None
    assert any("There were no short runs" in note and "couples the samples" in note for note in made.notes)


def test_a_choice_that_runs_out_after_all_gives_way_to_the_next_best(monkeypatch):
    model, data = task()
    limit = needs(model, data)[4] + 7
    real = hp.probing.Probing.memory

    def short(probing, pairs, recompute=0):
        if pairs == [(4, 4)]:
            return [
                hp.probes.Sample("memory", "bytes", 4, 4, math.nan, source=OUT_OF_MEMORY, detail={"message": "full"})
            ]
        return real(probing, pairs, recompute)

    monkeypatch.setattr(hp.probing.Probing, "memory", short)
    made = plan(model, data, limit, strides=("horizon", 1))
    assert (made.horizon, made.stride, made.row.fits, made.row.feasible) == (4, 1, True, True)
    assert any("h=4, stride 4 was chosen first and did not fit the device" in note for note in made.notes)


def test_a_stride_that_does_not_fit_is_never_taken():
    rows = [
        hp.Row(horizon=4, memory_bytes=100, rate=0.5, fits=True),
        hp.Row(horizon=4, stride=4, memory_bytes=90, rate=0.8, fits=False),
        hp.Row(horizon=6, memory_bytes=200, rate=1.0, fits=False),
    ]
    pairs = [(4, 4), (4, 1)]
    chosen, _ = choose_stride(rows, pairs, hp.AccuracyConstraint(0.05), hp.LinearCost(node_memory=100))
    assert chosen.stride == first_that_fits(rows, pairs).stride == 1


def test_what_is_predicted_to_need_as_much_as_what_ran_out_does_not_fit():
    room = Room(limit_bytes=1000, too_large_bytes=500)
    rows = [hp.Row(horizon=1, memory_bytes=size, memory_source="predicted") for size in (499, 500, 900, 1001)]
    assert [room.holds(row).fits for row in rows] == [True, False, False, False]
    assert room.holds(hp.Row(horizon=1, memory_bytes=600, memory_source="measured")).fits  # a fact


def test_back_propagation_is_found_where_it_needs_less_than_a_horizon_does():
    torch.manual_seed(22)
    model = nn.Sequential(*(Wide(16, 32) for _ in range(2)), nn.Linear(16, 3))
    data = [(torch.randn(16, 16), torch.randint(0, 3, (16,))) for _ in range(3)]
    made = needs(model, data)
    if made[2] >= made[1]:
        pytest.skip("this torch keeps other bytes")
    limit = made[2] + (made[1] - made[2]) // 2
    assert plan(model, data, limit).horizon == 2


def test_what_the_device_needs_is_what_the_driver_saw_or_a_prediction():
    room = Room(limit_bytes=150, margin_bytes=lambda size: 60, as_memory=True)
    measured = hp.Row(horizon=1, memory_bytes=100, memory_source="measured", nvml_bytes=140)
    hidden = hp.Row(horizon=1, memory_bytes=100, memory_source="measured")
    told = [
        (row.memory_bytes, row.device_bytes, row.memory_source, row.fits) for row in map(room.holds, (measured, hidden))
    ]
    assert told == [(140, 140, "measured", True), (160, 160, "predicted", False)]
    plain = Room(limit_bytes=150, margin_bytes=lambda size: 60).holds(hidden)
    assert (plain.memory_bytes, plain.device_bytes, plain.memory_source, plain.fits) == (100, 160, "measured", False)


def test_cosines_are_measured_where_back_propagation_does_not_fit_and_the_plan_says_how():
    model, data = task()
    limit = needs(model, data)[2]
    made = plan(model, data, limit)
    chain = hp.Chain.from_model(model, data[0])
    wanted = {s.horizon: s for s in hp.probes.cosine(chain, data, range(1, DEPTH))}
    measured = [row for row in made.rows if row.stride == 1 and row.cosine_source == "measured"]
    assert len(measured) >= 3
    for row in measured:
        assert row.cosine == pytest.approx(wanted[row.horizon].value, abs=1e-6)
    assert any("the exact gradient was computed by checkpointing every" in note for note in made.notes)
    assert any("Memory ran out at h=" in note for note in made.notes)
    assert made.provenance["out_of_memory"]
    assert hp.Plan.from_dict(made.to_dict()) == made


def test_an_accuracy_constraint_takes_nothing_that_does_not_fit():
    model, data = task()
    exact = hp.plan_horizon(model, data, objective=hp.AccuracyConstraint(0.001), rollout_steps=0, progress=False)
    assert exact.horizon == DEPTH
    limit = needs(model, data)[4]
    with pytest.raises(hp.InfeasibleError) as error:
        plan(model, data, limit, objective=hp.AccuracyConstraint(0.001))
    assert error.value.nearest.fits
    made = plan(model, data, limit, objective=hp.Weighted(0.0))
    assert made.horizon == 4
    assert made.cost.node_memory_bytes == limit


def test_nothing_fits():
    model, data = task()
    wanted = needs(model, data)
    with pytest.raises(torch.OutOfMemoryError, match="give smaller batches or a larger device"):
        plan(model, data, 5000)
    with pytest.raises(hp.InfeasibleError, match="more than the device has: use smaller batches"):
        plan(model, data, wanted[1] - 1)
    assert all(p.grad is None for p in model.parameters())


def test_short_runs_fit_where_back_propagation_does_not():
    model, data = task()
    limit = needs(model, data)[2]
    made = plan(model, data, limit, rollout_steps=8, strides=(1, "horizon"))
    assert made.row.rate_source == "measured"
    free = hp.probes.rollout(hp.Chain.from_model(model, data[0]), data, [(made.horizon, made.stride)], 8)[0]
    assert made.row.rate == pytest.approx(free.value, abs=1e-4)


def test_micro_batches_give_the_exact_gradient_where_recomputing_does_not_make_room():
    torch.manual_seed(0)
    depth, rows = 24, 1024  # checkpoints are all there is: every state is as large as a block's graph
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(depth)), nn.Linear(16, 3))
    data = [(torch.randn(rows, 16), torch.randint(0, 3, (rows,))) for _ in range(2)]
    blocks = [str(t) for t in range(depth)]
    chain = hp.Chain.from_model(model, data[0], blocks)
    costs = profile(chain, data[0], repeats=0)
    limit = int(1.5 * step_bytes(hp.Schedule.horizon(depth, 1), costs))
    assert limit < min(step_bytes(hp.Schedule.exact(depth, k), costs) for k in range(depth + 1))
    made = plan(model, data, limit, blocks=blocks, horizons=[1, 12, depth], batches=2)
    (note,) = (note for note in made.notes if "micro-batches" in note)
    assert "by checkpointing every" in note
    row = next(row for row in made.rows if row.horizon == 12 and row.stride == 1)
    assert row.cosine_source == "measured"
    assert row.cosine == pytest.approx(hp.probes.cosine(chain, data, [12])[0].value, abs=1e-5)
    assert made.row.fits
    assert [way.micro_batches for way in Frugal(costs, limit).levels(16)] == [1, 1, 2, 4, 8, 16]
    assert [way.micro_batches for way in Frugal(costs).levels(16)] == [1]


def test_without_an_exact_gradient_a_memory_limit_is_planned_and_an_accuracy_is_not():
    torch.manual_seed(0)
    depth = 24
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(depth)]
    model = nn.Sequential(*layers, nn.BatchNorm1d(16), nn.Linear(16, 3))  # its samples cannot be told apart
    data = [(torch.randn(1024, 16), torch.randint(0, 3, (1024,))) for _ in range(2)]
    blocks = [str(t) for t in range(depth)]
    costs = profile(hp.Chain.from_model(model, data[0], blocks), data[0], repeats=0)
    limit = int(1.5 * step_bytes(hp.Schedule.horizon(depth, 1), costs))
    made = plan(model, data, limit, blocks=blocks, batches=2)
    assert (made.row.fits, made.row.cosine, made.row.rate) == (True, None, None)
    assert any("There is no exact gradient to compare with" in n and "couples the samples" in n for n in made.notes)
    with pytest.raises(hp.InfeasibleError, match="no candidate is feasible"):
        plan(model, data, limit, blocks=blocks, batches=2, objective=hp.AccuracyConstraint(0.5))


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("horizon", [1, 3, DEPTH])
def test_the_gradient_in_parts_is_the_gradient(parts, horizon):
    model, data = task(rows=17)
    model.double()
    batch = (data[0][0].double(), data[0][1])
    chain = hp.Chain.from_model(model, batch)
    schedule = hp.Schedule.horizon(DEPTH, horizon)
    grads, losses = [], []
    for micro in (1, parts):
        model.zero_grad(set_to_none=True)
        losses.append(gradient(chain, batch, schedule, micro))
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(losses[0], losses[1])
    check_pieces(chain, batch, parts)


def test_what_has_another_gradient_in_parts_is_refused():
    model, data = task(norm=True)
    chain = hp.Chain.from_model(model.train(), data[0])
    with pytest.raises(ValueError, match="norm is a BatchNorm1d, which couples the samples"):
        check_pieces(chain, data[0], 2)
    model, data = task()
    total = hp.Chain.from_model(model, data[0], loss=nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ValueError, match="as the mean over its 2 micro-batches"):
        check_pieces(total, data[0], 2)
    with pytest.raises(ValueError, match="couples the samples"):
        hp.probes.cosine(hp.Chain.from_model(Model(norm=True).train(), data[0]), data, [1], micro_batches=2)


def test_accumulating_and_other_batch_sizes_are_predicted():
    model, data = task(rows=240, batches=1)
    batch = data[0]
    chain = hp.Chain.from_model(model, batch)
    costs = {n: profile(chain, resized(batch, n), repeats=0) for n in (60, 120, 240)}
    made = optimizer_for(trainable(chain), None)
    for h in (1, 3, DEPTH):
        schedule = hp.Schedule.horizon(DEPTH, h)
        for wanted, (a, b) in ((60, (120, 240)), (240, (60, 120)), (120, (60, 240))):
            predicted = at_batch_size(costs[a], costs[b], (a, b), wanted)
            assert step_bytes(schedule, predicted) == pytest.approx(step_bytes(schedule, costs[wanted]), rel=1e-3)
        for parts in (2, 4):
            with restored(chain, weights=True):
                step(chain, batch, schedule, made, parts)
                made.zero_grad(set_to_none=True)
                base = standing_bytes(chain, made, batch)
                with LiveBytes() as tracker:
                    step(chain, batch, schedule, made, parts)
            predicted_bytes = accumulated_bytes(schedule, costs[240], costs[240 // parts])
            assert predicted_bytes == pytest.approx(base + tracker.peak, rel=0.01)
    with pytest.raises(ValueError, match="profiles of two sizes"):
        at_batch_size(costs[60], costs[60], (60, 60), 5)


def test_batches_are_split_and_resized_by_samples():
    batch = {"x": torch.arange(10).reshape(5, 2), "scalar": torch.tensor(3.0), "y": torch.arange(5)}
    assert batch_size(batch) == 5
    pieces = split(batch, 2)
    assert [batch_size(piece) for piece in pieces] == [2, 3]
    assert torch.equal(torch.cat([piece["y"] for piece in pieces]), batch["y"])
    assert all(piece["scalar"] == 3 for piece in pieces)
    assert resized(batch, 7)["y"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch_size((torch.zeros(2), torch.zeros(3))) is None
    with pytest.raises(ValueError, match="share no first dimension"):
        resized((torch.zeros(2), torch.zeros(3)), 4)
    with pytest.raises(ValueError, match="parts=6"):
        split(batch, 6)


def test_a_simulated_device_trains_nothing():
    model, data = task()
    with pytest.raises(ValueError, match="nothing runs on a simulated device"):
        hp.train(model, data, device="simulated:1GiB", progress=False)
