"""Validation: mean loss, and accuracy where targets are classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.batch import ComputeLoss, call, model_inputs, move, output_tensor, target_of
from horizonplan.chain.calls import training_mode
from horizonplan.probes.budget import each


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Iterable[Any], compute_loss: ComputeLoss, device: torch.device
) -> dict[str, float]:
    """Evaluate a model in eval mode; its mode is restored.

    Returns:
        ``loss``, the mean over batches weighted by their first dimension, and ``accuracy`` in [0, 1] where
        the targets are integers and the model returns scores with one class dimension more, last or second.
    """
    losses, sizes, hits, counted = 0.0, 0, 0, 0
    with training_mode(model, False):
        for batch in each(data):
            batch = move(batch, device)
            target = target_of(batch)
            size = len(target) if isinstance(target, Tensor) and target.ndim else 1
            losses += compute_loss(model, batch).item() * size
            sizes += size
            right, total = _hits(model, batch, target)
            hits, counted = hits + right, counted + total
    if sizes == 0:
        raise ValueError("val_data has no batches: give at least one, or val_data=None.")
    return {"loss": losses / sizes} | ({"accuracy": hits / counted} if counted else {})


def _hits(model: nn.Module, batch: Any, target: Any) -> tuple[int, int]:
    if not isinstance(target, Tensor) or target.ndim != 1 or target.is_floating_point() or target.dtype == torch.bool:
        return 0, 0
    try:
        scores = output_tensor(call(model, model_inputs(batch)))
    except (TypeError, ValueError):
        return 0, 0
    if not isinstance(scores, Tensor) or scores.ndim != target.ndim + 1 or not scores.is_floating_point():
        return 0, 0
    axis = -1 if scores.shape[:-1] == target.shape else 1
    guesses = scores.argmax(axis)
    if guesses.shape != target.shape:
        return 0, 0
    valid = target >= 0
    return int((guesses == target)[valid].sum()), int(valid.sum())
