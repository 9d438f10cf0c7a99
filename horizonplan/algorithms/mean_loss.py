"""Is a loss a mean over samples, or their sum? For methods whose steps are taken for each sample by itself."""

from __future__ import annotations

from typing import Any

import torch

from horizonplan.batch import batch_size, resized
from horizonplan.chain import Chain
from horizonplan.chain.calls import quiet

SAMPLES = 16  # enough to judge by
GROWTH = 1.5  # twice the samples make a sum twice as large, and then four times


def refuse_sum(chain: Chain, batch: Any) -> None:
    """See that the loss does not grow with the number of samples, by a batch in which they come two and four times.

    A mean stays (weighted or not, since the samples are the same ones), a contrastive loss grows with the logarithm,
    a sum in proportion. What cannot be judged is let pass: batches whose samples cannot be told apart, models that
    take batches of one size only, losses that are not positive.

    Raises:
        ValueError: it does.
    """
    count = min(batch_size(batch) or 0, SAMPLES)
    if count == 0:
        return
    with quiet(chain.model), torch.no_grad():
        try:
            once, twice, four = (chain.loss(resized(batch, times * count)).item() for times in (1, 2, 4))
        except (RuntimeError, ValueError, IndexError):
            return
    if once > 0 and twice > GROWTH * once and four - twice > GROWTH * (twice - once):
        raise ValueError(
            f"loss: {once:.4g} on {count} samples, {twice:.4g} and {four:.4g} where each comes two and four times, as "
            "a sum over samples; give a mean (reduction='mean'), which is what the codes' steps are scaled for."
        )
