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

    A batch whose samples cannot be told apart is let pass, as is a loss that is not positive.

    Raises:
        ValueError: it does.
    """
    if (batch_size(batch) or 0) < 2:
        return
    with quiet(chain.model), torch.no_grad():
        whole, *halves = (chain.loss(part).item() for part in (batch, *split(batch, 2)))
    if min(halves) > 0 and whole > SUM * sum(halves):
        raise ValueError(
            f"loss: {whole:.4g} on a batch, {halves[0]:.4g} and {halves[1]:.4g} on its halves, as a sum over samples; "
            "give a mean (reduction='mean'), which is what the codes' steps are scaled for."
        )
