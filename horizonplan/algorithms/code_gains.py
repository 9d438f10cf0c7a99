"""How much each layer magnifies what its code moves by, and the rate of descent on codes that follows from it.

Eq. 5 of "Beyond Backprop: Online Alternating Minimization with Auxiliary Variables" is quadratic in the move d of a
code wherever the activation is linear: ``|Delta - M d|^2 + |d|^2``. Along its slope the minimum is at the rate
``1 / (2 (1 + gain))`` with ``gain = |M d|^2 / |d|^2``. A step of more than twice that turns the layer above around,
which a fixed rate comes to as soon as weights grow. The same rate is best for Eq. 4, ``loss / mu + |d|^2``, with half
the loss's curvature along d for ``|M d|^2``, taken from its slopes before and after the move:
``gain = (slope(c + d) - slope(c)) d / (2 mu |d|^2)``. The gains of one batch make the next one's rates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from horizonplan.algorithms.code_pass import CodePass
from horizonplan.algorithms.code_sweep import Sweep


def rate(gain: Tensor | float) -> Tensor | float:
    """Of the descent on a code whose move is magnified so.

    >>> rate(4.0)
    0.1
    """
    return 0.5 / (1 + gain)


@torch.no_grad()
def measured_gains(
    sweep: Sweep, run: CodePass, loss: Tensor, before: Mapping[nn.Module, Tensor]
) -> dict[nn.Module, Tensor]:
    """The gain after each layer's codes, over the batch and all calls of the layer; at least 0.

    Args:
        sweep: whose codes have moved.
        run: a pass with the moved codes and all predictions.
        loss: of that pass, with its graph, which is kept.
        before: the gains until now, kept where no code has moved.
    """
    links, found = sweep.links, dict(before)
    predicted = run.predictions | sweep.relaxed
    bends = sweep.bends | _bends(sweep, loss)
    for layer, calls in links.calls.items():
        move = _length([torch.dist(sweep.codes[i], sweep.forward[i]) for i in calls])
        read = {j for i in calls for j in links.children[i]} - links.outputs
        gain = torch.zeros_like(move)
        if read:
            changes = [torch.dist(predicted[j], sweep.forward[j]) for j in sorted(read)]
            gain = (_length(changes) / move).square()
        for i in bends.keys() & set(calls):
            gain = gain + bends[i] / move.square()
        found[layer] = torch.where(torch.isfinite(gain / move), gain.clamp(min=0), before[layer])
    return found


def _bends(sweep: Sweep, loss: Tensor) -> dict[int, Tensor]:
    """For each moved code that the loss is read from: half the change of the loss's slope along its move."""
    if not sweep.leaves or not loss.requires_grad:
        return {}
    weight = loss.new_tensor(sweep.samples / sweep.mu)
    slopes = torch.autograd.grad(loss, list(sweep.leaves.values()), weight, retain_graph=True, allow_unused=True)
    found = {}
    for i, slope in zip(sweep.leaves, slopes, strict=True):
        change = -sweep.loss_slopes[i] if slope is None else slope - sweep.loss_slopes[i]
        found[i] = (change * (sweep.codes[i] - sweep.forward[i])).sum() / 2
    return found


def _length(parts: list[Tensor]) -> Tensor:
    """Of a vector, from the lengths of its parts."""
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))
