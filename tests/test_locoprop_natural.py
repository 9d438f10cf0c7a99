"""Natural gradients in pre-activations: images and sequences, vanishing gradients, and training with them."""

from functools import partial

import pytest
import torch
from torch import nn

import horizonplan as hp
from horizonplan.algorithms import LocoProp
from horizonplan.algorithms.local_problem import natural


@pytest.mark.parametrize("features", [-1, -3])
def test_natural_gradients_of_images_and_sequences_take_each_samples_own_gradient(features):
    """D is a mean over samples and places, of what a mean loss would have without its division by the samples."""
    torch.manual_seed(0)
    own = torch.randn(5, 3, 4, 2, dtype=torch.float64)  # of each sample's loss: samples, features, places
    fisher = sum(torch.outer(own[i, :, j, k], own[i, :, j, k]) for i in range(5) for j in range(4) for k in range(2))
    expected = torch.einsum("ab,nbjk->najk", torch.linalg.inv(fisher / 40 + 0.1 * torch.eye(3)), own / 5)
    found = natural((own / 5).movedim(1, features), 0.1, features).movedim(features, 1)
    torch.testing.assert_close(found, expected)


def test_natural_gradients_of_a_1x1_convolution_are_the_linear_layers():
    """On images of one place; and of one place repeated, where each has its share of the sample's gradient."""
    torch.manual_seed(0)
    g = torch.randn(5, 3, dtype=torch.float64)
    one = natural(g, 0.1)
    torch.testing.assert_close(natural(g[:, :, None, None], 0.1, -3)[:, :, 0, 0], one)
    torch.testing.assert_close(natural(g[:, :, None, None].expand(5, 3, 2, 2), 0.1, -3)[:, :, 1, 0], one)
    torch.testing.assert_close(natural(g[0][:, None, None], 0.1, -3)[:, 0, 0], natural(g[:1], 0.1)[0])


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-15, 1e-30, 0.0])
def test_natural_gradients_vanish_with_the_gradient(size):
    """In float32 too; with more features than rows, and damping far below the rounding of D."""
    torch.manual_seed(0)
    g = size * torch.randn(4, 16)
    found = natural(g, 1e-2)
    assert torch.isfinite(natural(g, 1e-12)).all()
    assert found.norm() <= g.norm() / 1e-2 * 1.0001
    if size <= 1e-6:
        torch.testing.assert_close(found, g / 1e-2)


def test_natural_targets_settle_as_the_loss_falls():
    """With damping relative to D the steps do not shrink, and the loss is back above its start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 3))
    x = torch.randn(8, 5)
    data = x, torch.randn(8, 3)
    chain = hp.Chain(None, list(model), None)
    method = LocoProp("S", iterations=5, gamma=1.0, inner=partial(torch.optim.SGD, lr=0.02), damping=0.1)
    method.prepare(chain, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = [method.step(chain, data, optimizer).item() for _ in range(400)]
    assert max(losses[300:]) < 0.01 * losses[0]
