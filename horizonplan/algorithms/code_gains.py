"""How much each layer magnifies what its code moves by, and the rate of descent on codes that follows from it.

Eq. 5 of "Beyond Backprop: Online Alternating Minimization with Auxiliary Variables" is quadratic in the move d of a
code wherever the activation is linear: ``|Delta - M d|^2 + |d|^2``. Along its slope the minimum is at the rate
``1 / (2 (1 + gain))`` with ``gain = |M d|^2 / |d|^2``. A step of more than twice that turns the layer above around,
which a fixed rate comes to as soon as weights grow. The gains of one batch make the next one's rates.
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
def measured_gains(sweep: Sweep, run: CodePass, before: Mapping[nn.Module, Tensor]) -> dict[nn.Module, Tensor]:
    """The gain after each layer's codes, over the batch and all calls of the layer.

    A code that only the output layer reads has gain 0: the loss says itself how far it goes.

    Args:
        sweep: whose codes have moved.
        run: a pass with the moved codes and all predictions.
        before: the gains until now, kept where no code has moved.
    """
    links, found = sweep.links, dict(before)
    predicted = run.predictions | sweep.relaxed
    for layer, calls in links.calls.items():
        moves = [torch.dist(sweep.codes[i], sweep.forward[i]) for i in calls]
        read = {j for i in calls for j in links.children[i]} - links.outputs
        if not read:
            found[layer] = torch.zeros_like(moves[0])
            continue
        changes = [torch.dist(predicted[j], sweep.forward[j]) for j in sorted(read)]
        gain = (_length(changes) / _length(moves)).square()
        found[layer] = torch.where(torch.isfinite(gain), gain, before[layer])
    return found


def _length(parts: list[Tensor]) -> Tensor:
    """Of a vector, from the lengths of its parts."""
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))
