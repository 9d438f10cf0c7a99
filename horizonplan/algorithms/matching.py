"""Is the network's loss a matching loss of its last layer? Found by measuring.

If it is, its gradient in the layer's pre-activation is ``(f(a) - y) / n`` with a target y that does not depend on a
("LocoProp: Enhancing BackProp via Local Loss Optimization", Eq. 2), so between any two pre-activations it changes by
``(f(a') - f(a)) / n``. Cross-entropy passes with softmax, binary cross-entropy with sigmoid, whether the loss or the
model applies them, with label smoothing and ignored labels too. What passes with the linear function (the squared
error) needs no finding.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from horizonplan.algorithms.layers import Weighted, evaluate, feature_dim
from horizonplan.algorithms.taps import replaced
from horizonplan.algorithms.transfer import SIGMOID, Transfer, softmax
from horizonplan.chain import Chain
from horizonplan.chain.calls import quiet

KEPT = 2**20  # numbers to compare, at most
TOLERANCE = 1e-2  # of a norm; float32 and half precision inside a model stay below it


def matching(chain: Chain, batch: Any, last: Weighted) -> Transfer | None:
    """The transfer function with which the loss matches the last layer: softmax, sigmoid, or ``None`` of them.

    Warns where the loss has no gradient there, as with a batch whose labels are all ignored: then it cannot be told.
    """
    here, slope = _gradient(chain, batch, last, 0.0)
    there, slope_there = _gradient(chain, batch, last, 1.0)
    change = slope_there - slope
    counts = (slope != 0) | (slope_there != 0)
    if not counts.any():
        warnings.warn(
            "LocoProp: on the batch that it is prepared with the loss has no gradient in the layer called last, so its "
            "matching loss is not found, and the layer trains as a linear one: prepare with another batch, or "
            "name the function in transfers.",
            stacklevel=2,
        )
    for transfer in (softmax(feature_dim(last)), SIGMOID):
        expected = (transfer.function(there) - transfer.function(here)) * counts
        size, product = change.square().sum(), (change * expected).sum()
        if size > 0 and product > 0:
            rest = expected - change * (product / size)
            if rest.norm() <= TOLERANCE * expected.norm():
                return transfer
    return None


def _gradient(chain: Chain, batch: Any, last: Weighted, noise: float) -> tuple[Tensor, Tensor]:
    """The layer's pre-activation with noise added, and the loss's gradient there, both in float32.

    Of a large batch only the first samples. The noise is as large as the pre-activations, so that a network that is
    sure of its predictions is not any more.
    """
    leaves: list[Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        out = evaluate(last, args[0] if args else kwargs["input"], last.weight, last.bias)
        generator = torch.Generator().manual_seed(0)
        added = torch.randn(out.shape, generator=generator).to(out)
        leaves.append((out + noise * (1 + out.abs().mean()) * added).detach().requires_grad_())
        torch.set_grad_enabled(True)  # from here on
        return leaves[-1].clone()  # which may be overwritten

    with chain.running(), quiet(chain.model), replaced({last: forward}), torch.no_grad():
        loss = chain.loss(batch)
    (leaf,) = leaves
    gradient = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    slope = torch.zeros_like(leaf) if gradient is None else gradient
    rows = max(1, KEPT * len(leaf) // max(1, leaf.numel()))
    return leaf.detach()[:rows].float(), slope[:rows].float()
