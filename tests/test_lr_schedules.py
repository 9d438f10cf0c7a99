"""The learning rate falls when the loss has grown. Oracle: the rule written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from horizonplan.training.schedules import DecayOnGrowth


def sgd(*rates):
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates])


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


@given(losses=st.lists(st.floats(0, 3) | st.sampled_from([1.0, math.inf])), factor=st.floats(0.1, 0.9))
def test_every_epoch_that_is_worse_than_the_last_one_multiplies_every_rate(losses, factor):
    optimizer = sgd(1.0, 0.25)
    decay, wanted = DecayOnGrowth(optimizer, factor), [1.0, 0.25]
    for epoch, loss in enumerate(losses):
        decay.step(loss)
        if epoch > 0 and loss > losses[epoch - 1]:
            wanted = [rate * factor for rate in wanted]
        assert rates(optimizer) == wanted


def test_the_papers_factor_is_the_default():
    optimizer = sgd(1.0)
    decay = DecayOnGrowth(optimizer)
    decay.step(1.0)
    decay.step(1.1)
    assert rates(optimizer) == [0.9]


def test_a_rate_that_is_a_tensor_stays_that_tensor_and_falls_once_where_groups_share_it():
    rate = torch.tensor(1.0)
    optimizer = sgd(rate, rate)
    decay = DecayOnGrowth(optimizer, 0.5)
    decay.step(1.0)
    decay.step(2.0)
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    assert rate.item() == 0.5


@pytest.mark.parametrize("split", range(5))
def test_a_restored_run_goes_on_as_if_it_had_never_stopped(split):
    losses = [2.0, 1.0, 1.5, 1.4, 1.6]
    whole, first, second = sgd(1.0), sgd(1.0), sgd(1.0)
    uninterrupted, before = DecayOnGrowth(whole, 0.5), DecayOnGrowth(first, 0.5)
    for loss in losses:
        uninterrupted.step(loss)
    for loss in losses[:split]:
        before.step(loss)
    after = DecayOnGrowth(second)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    for loss in losses[split:]:
        after.step(loss)
    assert rates(second) == rates(whole) == [0.25]
    assert after.state_dict() == uninterrupted.state_dict() == {"factor": 0.5, "last_loss": 1.6}


@pytest.mark.parametrize("factor", [0, 1, 1.5, -0.5, math.nan, True, "0.9", None])
def test_a_factor_that_is_not_between_0_and_1_is_refused(factor):
    with pytest.raises(ValueError, match="factor="):
        DecayOnGrowth(sgd(1.0), factor)
    with pytest.raises(ValueError, match="factor="):
        DecayOnGrowth(sgd(1.0)).load_state_dict({"factor": factor, "last_loss": None})


def test_a_loss_that_is_nan_is_refused_and_changes_nothing():
    optimizer = sgd(1.0)
    decay = DecayOnGrowth(optimizer, 0.5)
    decay.step(1.0)
    with pytest.raises(ValueError, match="loss=nan"):
        decay.step(math.nan)
    decay.step(2.0)
    assert rates(optimizer) == [0.5]


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="optimizer="):
        DecayOnGrowth("sgd")
    with pytest.raises(ValueError, match="state: has"):
        DecayOnGrowth(sgd(1.0)).load_state_dict({"last_epoch": 3})
