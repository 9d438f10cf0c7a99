"""Number formats of the forward pass: autocast around forwards."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", *DTYPES)


def check_precision(precision: object) -> None:
    """See that it is one.

    Raises:
        ValueError: it is not.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: give {', '.join(map(repr, PRECISIONS))}.")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward; the gradient engine leaves it for its backward passes. fp32 leaves it as it is."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])
