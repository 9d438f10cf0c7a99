"""``horizon_backward``: what ``loss.backward()`` is to back-propagation, for any horizon."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from horizonplan.chain import Chain
from horizonplan.gradient.engine import execute
from horizonplan.schedule import Schedule


def horizon_backward(
    chain: Chain,
    batch: Any,
    horizon: int | Schedule,
    stride: int = 1,
    recompute: int = 0,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Accumulate the horizon gradient into ``p.grad``, as ``loss.backward()`` does for horizon = depth.

    Block t's gradient is that of the loss at x(min(s*floor(t/s) + h, T)) with its window's first
    state as a constant (Unifying Back-Propagation and Forward-Forward Algorithms through Model
    Predictive Control, Eq. 9 and Remark 3.2; h = T is Eq. 3). The stem trains with block 0, the head
    with the terminal loss. A parameter used several times gets the sum over its uses. Each block's
    forward runs once, and once more per window that covers it with ``recompute``. Hooks fire as
    usual: post-accumulate hooks once a parameter and call.

    Args:
        chain: the model; its forward runs in its present mode (train or eval).
        batch: a batch on the model's device.
        horizon: h, blocks each gradient looks ahead, or a whole :class:`Schedule`.
        stride: s, blocks between the starts of two windows; 1 is the paper's family.
        recompute: k, activation checkpointing every k blocks; 0 keeps the graphs.
        scale: factor on the gradient (loss scaling, accumulation); not on the returned loss.

    Returns:
        The terminal loss, unscaled and detached, shape ``()``. As with ``backward()``, a loss that is
        not finite is not refused here.

    Raises:
        ValueError: unless ``1 <= stride <= horizon <= depth``; nothing is trainable; a loss is no scalar.
    """
    if not isinstance(chain, Chain):
        raise ValueError(f"chain is a {type(chain).__name__}: give a Chain, e.g. Chain.from_model(model, batch).")
    if isinstance(horizon, Schedule):
        schedule = horizon
        if schedule.depth != chain.depth:
            raise ValueError(
                f"horizon: the schedule is for depth {schedule.depth}, the chain has {chain.depth} blocks."
            )
    else:
        schedule = Schedule.horizon(chain.depth, horizon, stride, recompute)
    return execute(chain, batch, schedule.ops(chain.stem_trains, chain.trainable), scale)
