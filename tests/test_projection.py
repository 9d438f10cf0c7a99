"""A state reaches the head's shape by averaging and zero padding only: linear, and mean-preserving where it pools."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from horizonplan.projection import project

sides = st.integers(1, 7)


@st.composite
def states_and_shapes(draw):
    """A state and a wanted shape of one kind, or of an image or a sequence and a vector."""
    kind = draw(st.sampled_from(["vector", "sequence", "image", "volume"]))
    ndim = {"vector": 2, "sequence": 3, "image": 4, "volume": 5}[kind]
    state = torch.randn([2] + [draw(sides) for _ in range(ndim - 1)], dtype=torch.float64)
    target = 2 if kind in ("image", "sequence") and draw(st.booleans()) else ndim
    return state, (2, *(draw(sides) for _ in range(target - 1)))


@given(case=states_and_shapes())
def test_every_pair_of_shapes_is_bridged_linearly(case):
    state, shape = case
    out = project(state, shape)
    assert tuple(out.shape) == shape
    other = torch.randn_like(state)
    torch.testing.assert_close(project(2 * state + other, shape), 2 * out + project(other, shape))


@given(case=states_and_shapes())
def test_the_own_shape_is_passed_on_as_it_is(case):
    state, _ = case
    assert project(state, tuple(state.shape)) is state


def test_the_batch_size_is_not_part_of_the_shape():
    assert project(torch.ones(3, 4), (7, 6)).shape == (3, 6)


def test_missing_channels_are_zeros_after_the_others():
    state = torch.randn(2, 3, 4, 4)
    out = project(state, (2, 5, 4, 4))
    assert torch.equal(out[:, :3], state)
    assert not out[:, 3:].any()


def test_positions_are_pooled_before_channels_are_padded():
    state = torch.ones(2, 3, 8, 8)
    out = project(state, (2, 5, 2, 2))
    assert torch.equal(out[:, :3], torch.ones(2, 3, 2, 2))
    assert not out[:, 3:].any()


def test_too_many_channels_are_averaged_in_groups():
    assert project(torch.tensor([[1.0, 3.0, 5.0, 7.0]]), (1, 2)).tolist() == [[2.0, 6.0]]


def test_an_image_reaches_a_vector_by_its_mean_over_positions():
    state = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(project(state, (2, 3)), state.mean((2, 3)))


def test_a_sequence_reaches_a_vector_by_its_mean_over_tokens():
    state = torch.randn(2, 5, 3)
    torch.testing.assert_close(project(state, (2, 3)), state.mean(1))


def test_a_sequence_keeps_its_channels_last():
    state = torch.randn(2, 6, 3)
    torch.testing.assert_close(project(state, (2, 3, 3)), state.reshape(2, 3, 2, 3).mean(2))


def test_an_image_reaches_a_sequence_as_its_pixels():
    """The patch embedding of a vision transformer, where it belongs to a block."""
    state = torch.randn(2, 3, 4, 4)
    assert torch.equal(project(state, (2, 16, 3)), state.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("state", "shape"), [((2, 3), (2, 3, 4)), ((2, 3), (2, 3, 4, 4)), ((2, 3, 4, 4, 4), (2, 3, 4, 4))]
)
def test_no_way_between_shapes_names_both_and_the_remedy(state, shape):
    with pytest.raises(ValueError, match="projection") as error:
        project(torch.ones(state), shape)
    assert str(state) in str(error.value)
    assert "projection=" in str(error.value)
