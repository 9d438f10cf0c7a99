"""The largest micro-batch under a limit: seen by the tracker around real steps, and a larger one does not fit."""

import pytest
import torch
from families import ResidualMLP, classes
from torch import nn

import horizonplan as hp
from horizonplan.probes.memory import step
from horizonplan.probes.steady import optimizer_for, restored, standing_bytes, trainable
from horizonplan.probes.tracker import LiveBytes

DEPTH, ROWS = 4, 32


def task():
    torch.manual_seed(0)
    return ResidualMLP(DEPTH, width=24, p=0.0, norm=False).train(), (torch.randn(ROWS, 4), classes(ROWS))


def seen_bytes(model, batch, schedule, parts):
    chain = hp.Chain.from_model(model, batch)
    with restored(chain, weights=True):
        made = optimizer_for(trainable(chain), None)
        step(chain, batch, schedule, made, parts)
        made.zero_grad(set_to_none=True)
        base = standing_bytes(chain, made, batch)
        with LiveBytes() as tracker:
            step(chain, batch, schedule, made, parts)
    return base + tracker.peak


@pytest.mark.parametrize(
    ("horizon", "stride", "recompute"),
    [(None, 1, 0), *(pytest.param(*way, marks=pytest.mark.slow) for way in ((2, 2, 0), (2, 1, 0), (None, 1, 2)))],
)
def test_what_is_found_fits_and_the_next_larger_does_not(horizon, stride, recompute):
    model, batch = task()
    schedule = hp.Schedule.horizon(DEPTH, horizon or DEPTH, stride, recompute)
    sizes = {parts: seen_bytes(model, batch, schedule, parts) for parts in (1, 3, 8, ROWS)}
    for parts in (1, 3, 8):
        limit = round(1.005 * sizes[parts])
        found = hp.largest_micro_batch(model, batch, limit, horizon, stride=stride, recompute=recompute)
        assert found.parts <= parts
        assert found.samples == -(-ROWS // found.parts)
        assert found.predicted_bytes <= limit
        real = seen_bytes(model, batch, schedule, found.parts)
        assert real == pytest.approx(found.predicted_bytes, rel=0.06 if recompute else 0.01)
        if found.parts > 1:
            assert seen_bytes(model, batch, schedule, found.parts - 1) > limit
    nothing = hp.largest_micro_batch(model, batch, sizes[ROWS] // 2, horizon, stride=stride, recompute=recompute)
    assert (nothing.samples, nothing.parts) == (0, 0)
    assert "Not even" in nothing.explain()


def test_the_model_is_left_as_it_was_and_the_answer_is_told():
    model, batch = task()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = hp.largest_micro_batch(model, batch, "1GiB")
    assert (found.samples, found.parts) == (ROWS, 1)
    assert "fits 1.0 GiB as it is" in found.explain()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    tight = hp.largest_micro_batch(model, batch, found.predicted_bytes - 1)
    assert f"in {tight.parts} parts" in tight.explain()


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_small_batches_need_no_lines(samples):
    model, (x, y) = task()
    found = hp.largest_micro_batch(model, (x[:samples], y[:samples]), "1GiB")
    assert (found.samples, found.parts) == (samples, 1)


@pytest.mark.parametrize("samples", [2, 3])
def test_small_batches_are_split_too(samples):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)), nn.Linear(8, 3))
    batch = torch.randn(samples, 2048, 8), torch.randn(samples, 2048, 3)
    schedule = hp.Schedule.exact(4)
    sizes = [seen_bytes(model, batch, schedule, parts) for parts in range(1, samples + 1)]
    assert sizes == sorted(sizes, reverse=True)
    for parts, size in enumerate(sizes, 1):
        found = hp.largest_micro_batch(model, batch, size)
        assert (found.parts, found.predicted_bytes) == (parts, pytest.approx(size, abs=8))  # a scalar or two


def test_a_batch_without_samples_is_refused():
    with pytest.raises(ValueError, match="share no first dimension"):
        hp.largest_micro_batch(nn.Linear(2, 2), (torch.zeros(3, 2), torch.zeros(4, 2)), "1GiB")
