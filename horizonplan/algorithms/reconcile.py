"""The regulariser of successive gradient reconciliation: how far two gradients of one state are from each other."""

from __future__ import annotations

import torch
from torch import Tensor

Scale = float | Tensor


def distance(now: Tensor, before: Tensor, normalize: bool, scale: Scale = 1.0) -> Tensor:
    """The regulariser ("Towards Interpretable Deep Local Learning with Successive Gradient Reconciliation").

    Normalised, as Algorithm 1 has it: each sample's gradient divided by its own norm (a gradient of zero stays zero,
    and has no slope), then the squared difference's mean over samples *and* features. Plain, as Eq. 6 has it: the
    squared norm of the difference, for each sample, then the mean over samples. What is given is the gradient of a mean
    over the batch, so a sample's own is B times its rows: the sum of all squares is taken B times.

    Both are means over samples, so that the gradient on a batch is the mean of those on its parts, as for any loss.

    Args:
        now: the gradient of the module's loss in its input, ``(B, ...)``; its graph is kept.
        before: the gradient of the module before in its own output, ``(B, ...)``, a constant.
        normalize: which of the two.
        scale: a factor that both gradients carry (loss scaling); the result does not.

    Returns:
        A scalar of at least single precision.
    """
    now, before = (_wide(g.flatten(1) if g.ndim > 1 else g.unsqueeze(1)) for g in (now, before))
    if normalize:
        found: Tensor = (_unit(now) - _unit(before)).square().mean()
        return found
    return len(now) * ((now - before) / scale).square().sum()


def refuse_once(gradient: Tensor) -> None:
    """Refuse a gradient with an operator in it that can be differentiated once only.

    Autograd leaves such an operator out in silence where only some of the leaves are asked for.

    Raises:
        RuntimeError: there is one.
    """
    stack, seen = [gradient.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a second derivative is not implemented: an operator is marked once_differentiable")
        stack += [following for following, _ in node.next_functions]


def split_scale(scale: Scale) -> tuple[Scale, Scale]:
    """A factor on a loss as ``inner * outer``, ``inner`` never 0: gradients can be divided by it."""
    if not isinstance(scale, Tensor):
        return (scale, 1.0) if scale != 0 else (1.0, 0.0)
    inner = torch.where(scale == 0, torch.ones_like(scale), scale)
    return inner, scale / inner


def _unit(rows: Tensor) -> Tensor:
    """Rows divided by their norms; a row of zeros stays, and has no slope.

    Divided by their largest entries first, so that no square underflows.
    """
    top = rows.detach().abs().amax(1, keepdim=True)
    some = top > 0
    scaled = rows / torch.where(some, top, 1)
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled * torch.where(some, 1 / torch.where(some, norm, 1), 0)


def _wide(gradient: Tensor) -> Tensor:
    return gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient
