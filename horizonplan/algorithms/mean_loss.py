"""Is a loss a mean over samples, or their sum? For methods whose steps are taken for each sample by itself."""

from __future__ import annotations

from typing import Any

import torch

from horizonplan.batch import batch_size, split
from horizonplan.chain import Chain
from horizonplan.chain.calls import quiet

SUM = 0.75  # the loss of a batch over the sum of its halves' losses is near 1/2 for a mean, near 1 for a sum


def refuse_sum(chain: Chain, batch: Any) -> None:
    """See that the loss does not grow with the number of samples, by the two halves of a batch.

    What cannot be judged is let pass: batches of fewer than 4 samples, or whose samples cannot be told apart, models
    that take batches of one size only, losses that are not positive.

    Raises:
        ValueError: it does.
    """
    if (batch_size(batch) or 0) < 4:  # BatchNorm wants two samples
        return
    with quiet(chain.model), torch.no_grad():
        whole = chain.loss(batch).item()
        try:
            halves = [chain.loss(part).item() for part in split(batch, 2)]
        except (RuntimeError, ValueError):
            return
    if min(halves) > 0 and whole > SUM * sum(halves):
        raise ValueError(
            f"loss: {whole:.4g} on a batch, {halves[0]:.4g} and {halves[1]:.4g} on its halves, as a sum over samples; "
            "give a mean (reduction='mean'), which is what the codes' steps are scaled for."
        )
