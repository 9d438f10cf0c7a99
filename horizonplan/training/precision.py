"""The loss's scale in fp16."""

from __future__ import annotations

import torch


def scaler_for(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """What keeps fp16's small gradients from vanishing; ``None`` for the other precisions."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None
