"""Back-propagation itself: ``loss.backward()`` on the model's own graph, which is not cut between blocks.

The engine's gradient at h = T is the same bit for bit. Its books take time, and it holds a block's output until the
block is pulled through: so this one is a little faster, and needs no more memory than is predicted and measured there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from horizonplan.batch import scalar
from horizonplan.chain import Chain
from horizonplan.chain.calls import Ambient


def back_propagation(chain: Chain, batch: Any, scale: float | Tensor = 1.0) -> Tensor:
    """Add ``scale`` times the exact gradient into ``p.grad``; returns the loss, unscaled and detached.

    After an error, gradients that were ``None`` are ``None`` again.

    Raises:
        ValueError: nothing is trainable, or the loss is no scalar.
    """
    parameters = list(chain.parameters())
    if not any(p.requires_grad for p in parameters):
        raise ValueError("model: no parameter requires a gradient; unfreeze one before training.")
    torch.clear_autocast_cache()  # an optimiser may have changed the weights behind it
    fresh = [p for p in parameters if p.grad is None]
    try:
        with chain.running(), torch.enable_grad():
            loss = scalar(chain.loss(batch))
            with Ambient.off():
                scaled = loss if isinstance(scale, float | int) and scale == 1 else loss * scale
                torch.autograd.backward(scaled)
    except BaseException:
        for p in fresh:
            p.grad = None
        raise
    return loss.detach()
