"""How a plan's numbers were made: versions, device, batches, optimiser, and the raw measurements."""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from horizonplan.batch import signature
from horizonplan.chain import Chain
from horizonplan.probes.memory import FAILED, OUT_OF_MEMORY
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize


def circumstances(chain: Chain, batch: Any, optimizer: Optimize | None, seed: int, device: str) -> dict[str, Any]:
    """What was measured, where and with what."""
    made = type(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else optimizer or torch.optim.AdamW
    return {
        "model": type(chain.model).__name__,
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "batch": [[list(shape), str(dtype)] for shape, dtype in signature(batch)],
        "optimizer": getattr(made, "__name__", type(made).__name__),
        "seed": seed,
    }


def measurements(samples: Sequence[Sample], rolled: Sequence[Sample]) -> dict[str, Any]:
    """The samples as JSON-ready values; what did not fit has ``null`` bytes."""
    cosines = [s for s in samples if s.quantity == "cosine"]
    memory = [s for s in samples if s.quantity == "memory"]
    told: dict[str, Any] = {
        "measured_horizons": sorted({s.horizon for s in samples if not math.isnan(s.value)}),
        "memory": [[s.horizon, s.stride, _finite(s.value)] for s in memory],
        "out_of_memory": [[s.horizon, s.stride, s.detail["message"]] for s in memory if s.source == OUT_OF_MEMORY],
        "failed": [[s.horizon, s.stride, s.detail["message"]] for s in memory if s.source == FAILED],
        "scale": [[s.horizon, s.stride, s.detail["scale"]] for s in cosines],
        "cosine_per_block": [[s.horizon, s.stride, list(s.detail["per_block"])] for s in cosines],
        "rollouts": [[s.horizon, s.stride, {k: _finite(v) for k, v in s.detail.items()}] for s in rolled],
    }
    on_device = [[s.horizon, s.stride, dict(s.detail)] for s in memory if "nvml" in s.detail]
    return told | ({"memory_detail": on_device} if on_device else {})


def varying(sample: Sequence[Any]) -> list[str]:
    """A warning, and a note, where batches differ in shape: memory is that of the largest *seen*."""
    shapes = {tuple(shape[1:] for shape, _ in signature(batch)) for batch in sample}
    if len(shapes) < 2:
        return []
    note = (
        f"The first {len(sample)} batches have samples of {len(shapes)} different shapes: memory is that of the "
        "largest of them, and a larger batch needs more. Plan with the largest batch you will train on."
    )
    warnings.warn(note, UserWarning, stacklevel=3)
    return [note]


def _finite(value: Any) -> Any:
    """A diverged run's loss is NaN, which JSON does not know."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
