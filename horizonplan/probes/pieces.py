"""A batch's gradient, all at once or as the sum over its micro-batches: the same gradient in less memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.batch import batch_size, split
from horizonplan.chain import Chain
from horizonplan.chain.calls import quiet, training_mode
from horizonplan.gradient import horizon_backward
from horizonplan.schedule import Schedule


def gradient(
    chain: Chain, batch: Any, schedule: Schedule, micro_batches: int = 1, scale: float | Tensor = 1.0
) -> Tensor:
    """Accumulate ``scale`` times a schedule's gradient on a batch into ``p.grad``; returns the terminal loss, detached.

    With micro-batches the losses are weighted by their samples: the loss must be a mean over samples
    (:func:`check_pieces`).
    """
    if micro_batches == 1:
        return horizon_backward(chain, batch, schedule, scale=scale)
    total = torch.zeros((), device=chain.device)
    for piece, share in pieces(batch, micro_batches):
        total = total + share * horizon_backward(chain, piece, schedule, scale=scale * share)
    return total


def check_pieces(chain: Chain, batch: Any, micro_batches: int) -> None:
    """See that a batch's loss is the mean of its micro-batches' losses, weighted by their samples.

    Raises:
        ValueError: it is not, so that accumulated gradients would be another gradient: BatchNorm
            couples the samples of a batch, or the loss is no mean over samples.
    """
    for name, module in chain.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"model: {name or 'it'} is a {type(module).__name__}, which couples the samples of a batch, so "
                "micro-batches have another gradient; give smaller batches."
            )
    with quiet(chain.model), training_mode(chain.model, False), torch.no_grad():
        whole = chain.loss(batch).item()
        parts = sum(share * chain.loss(piece).item() for piece, share in pieces(batch, micro_batches))
    if not math.isclose(whole, parts, rel_tol=1e-3, abs_tol=1e-6):
        raise ValueError(
            f"loss: {whole:.6g} on a batch, but {parts:.6g} as the mean over its {micro_batches} micro-batches; let it "
            "be a mean over samples, or give smaller batches."
        )


def pieces(batch: Any, micro_batches: int) -> list[tuple[Any, float]]:
    """Micro-batches, each with its share of the samples.

    Raises:
        ValueError: there are fewer samples than that, or the batch has no number of them.
    """
    parts = split(batch, micro_batches)
    sizes = [batch_size(part) or 0 for part in parts]
    return [(part, size / sum(sizes)) for part, size in zip(parts, sizes, strict=True)]


def at_most(batch: Any, micro_batches: int) -> int:
    """So many micro-batches, or fewer for a batch of fewer samples, such as an epoch's last one."""
    samples = batch_size(batch)
    return micro_batches if samples is None else min(micro_batches, samples)
