"""A batch's gradient, all at once or as the sum over its micro-batches: the same gradient in less memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.batch import batch_size, split
from horizonplan.chain import Chain
from horizonplan.chain.calls import intercept, quiet, training_mode
from horizonplan.chain.slots import Output
from horizonplan.gradient import horizon_backward
from horizonplan.schedule import Schedule

TOLERANCE = 1e-3  # of a loss and of its gradient, relative


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

    Its value does not tell: before training all tokens' losses are alike, and a mean over valid tokens is the mean of
    any parts. So the gradient at the head is compared, too.

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
    whole, wanted = _at_the_head(chain, batch)
    parts = [(share, *_at_the_head(chain, piece)) for piece, share in pieces(batch, micro_batches)]
    mean = sum(share * loss for share, loss, _ in parts)
    found = _joined([share * slope for share, _, slope in parts], wanted.shape)
    apart = math.inf if found is None else float((found - wanted).norm())
    if not math.isclose(whole, mean, rel_tol=TOLERANCE, abs_tol=1e-6) or apart > TOLERANCE * float(wanted.norm()):
        raise ValueError(
            f"loss: {whole:.6g} on a batch, {mean:.6g} as the mean over its {micro_batches} micro-batches, and its "
            f"gradient at the head differs by {apart / (float(wanted.norm()) or 1.0):.1%}; let it be a mean over "
            "samples, or give smaller batches."
        )


def _at_the_head(chain: Chain, batch: Any) -> tuple[float, Tensor]:
    """The loss in evaluation mode, and its gradient with respect to the last block's output: only the head's graph."""
    leaves = []

    def cut(original: Any, args: Any, kwargs: Any) -> Any:
        output = Output.of(original(*args, **kwargs))
        assert output is not None
        leaves.append(output.state.detach().requires_grad_())
        torch.set_grad_enabled(True)  # from here on; the end of `no_grad` takes it back
        return output.rebuild(leaves[-1], lambda other: other)

    with quiet(chain.model), training_mode(chain.model, False), chain.running(), torch.no_grad():
        with intercept({chain.blocks[-1]: cut}):
            loss = chain.loss(batch)
        slope = torch.autograd.grad(loss, leaves[-1])[0]
    return loss.item(), slope.float()


def _joined(parts: list[Tensor], shape: torch.Size) -> Tensor | None:
    """Parts side by side along the dimension of the samples, whichever it is in a state; ``None``: there is none."""
    for dim in range(len(shape)):
        try:
            joined = torch.cat(parts, dim)
        except RuntimeError:
            continue
        if joined.shape == shape:
            return joined
    return None


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
