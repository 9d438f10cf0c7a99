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
    links = sweep.links
    found = dict(before)
    for layer in dict.fromkeys(links.modules[i] for i in links.coded):
        calls = [i for i in links.coded if links.modules[i] is layer]
        read = {j for i in calls for j in links.children[i]} - links.outputs
        length = sum(((sweep.codes[i] - sweep.forward[i]).square().sum() for i in calls), torch.zeros(()))
        if set(calls) & links.steps:
            read_values = {j: sweep.relaxed[j] for j in read}
        else:
            read_values = {j: run.predictions[j] for j in read}
        change = sum(((read_values[j] - sweep.forward[j]).square().sum() for j in read), torch.zeros_like(length))
        gain = change / length
        old = before.get(layer, torch.zeros_like(gain))
        found[layer] = torch.where(torch.isfinite(gain), gain, old)
    return found
