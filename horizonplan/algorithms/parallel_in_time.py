"""Parallel in time: a chain's parts are trained at once, each by a process of its own, on predicted co-states.

"Predict Globally, Correct Locally: Parallel-in-Time Optimal Control of Neural Networks", Algorithm 4. Part p runs its
blocks on the state that part p - 1 sends, and sends its own state on. The gradient there (the co-state) is not waited
for: it is predicted by linear regression on the pairs of earlier batches, so that the part pulls it back, updates its
weights and goes on with the next batch while the part after it is still at work on this one. Once a batch the true
co-state comes back, for the regression to learn from. Before that, a coarse model is trained for some batches, serially
(the global prediction), which gives weights and first pairs.

A step begins with a part's forward, where the paper's iteration ends with it; so a step is a batch, every part works on
the same batch, and the order of all work is the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from horizonplan.algorithms.base import LayerParallel
from horizonplan.algorithms.coarse import Coarse
from horizonplan.algorithms.mean_loss import refuse_sum
from horizonplan.algorithms.part import check_layers, cut
from horizonplan.algorithms.regression import Regression, classes_of
from horizonplan.algorithms.section import PredictionError
from horizonplan.algorithms.sections import Sections
from horizonplan.algorithms.trial import trial
from horizonplan.chain import Chain


@dataclass(eq=False)
class ParallelInTime(LayerParallel):
    """Train ``parts`` parts of a chain at once, in as many processes (torchrun), or in turn in one.

    Args:
        parts: parts of the chain, and processes.
        coarse_factor: blocks of the chain for each block of the coarse model.
        coarse_steps: batches that the coarse model is trained on first; 0: no global prediction.
        split: where to cut: ``"blocks"`` (equally many, larger parts first), ``"memory"`` (balanced), or a list of
            first blocks; see :func:`horizonplan.algorithms.partition.bounds_of`.
        targets: whether the regression sees the batch's targets beside the states. Eq. 6 does not.
        decay: factor on the weight of earlier pairs at each new one; 1, as in Eq. 6: all weigh the same.
        ridge: of the regression, relative to the mean square of what it sees.
        exact: wait for the true co-states. This is back-propagation, in parts and without any work at the same time;
            there is no global prediction then, whatever ``coarse_steps`` is.
        time_limit: seconds that a process waits for another one.

    Attributes:
        steps: batches trained on, those of the coarse model included.

    Raises:
        ValueError: bad arguments.

    >>> ParallelInTime(parts=2, coarse_factor=2).parts
    2
    """

    parts: int = 2
    coarse_factor: int = 2
    coarse_steps: int = 20
    split: str | Sequence[int] = "blocks"
    targets: bool = True
    decay: float = 0.95
    ridge: float = 1e-3
    exact: bool = False
    time_limit: float = field(default=300.0, repr=False)  # a run may be resumed with another one

    def __post_init__(self) -> None:
        self._check()
        self.steps = 0
        self._ready: Sections | None = None

    @property
    def bounds(self) -> tuple[int, ...]:
        """Part p holds blocks ``bounds[p]..bounds[p + 1] - 1``; known once prepared."""
        return self._prepared().bounds

    @property
    def errors(self) -> list[PredictionError]:
        """How wrong the predictions were, in the order of steps; in processes those of other cuts after a gather."""
        return sorted(self._prepared().errors, key=lambda error: (error.step, error.cut))

    def prepare(self, chain: Chain, batch: Any) -> None:
        """Cut the chain, and meet the other processes. The first step does it where it was not done.

        Raises:
            ValueError: more parts than blocks, other than ``parts`` processes, a cut that cannot be, or a loss that
                is a sum over samples, where co-states are predicted.
            ChainError: a parameter is used in two parts, or there is no coarser model.
        """
        found = trial(chain, batch)
        parts = cut(chain, found, self.parts, self.split)
        states, bounds = (found.entry, *found.states), [*(part.first for part in parts), chain.depth]
        coarse = Coarse(chain, bounds, self.coarse_factor, states) if self._global_steps else None
        if self.parts > 1 and not self.exact:
            _refuse_sum(chain, batch)
        classes = classes_of(batch, found.output) if self.targets and found.output is not None else None
        predictors = [None if part.last else Regression(self.decay, self.ridge, classes) for part in parts]
        self.steps = 0
        self._ready = Sections(chain, parts, predictors, coarse, self.exact, self.time_limit)

    def step(self, chain: Chain, batch: Any, optimizer: Optimizer) -> Tensor:
        """Train on one batch; returns the model's loss (the coarse model's at first), detached, shape ``()``.

        In several processes every one has to give the same batch, and returns the same loss; each has then updated its
        own part's weights.

        Raises:
            FloatingPointError: the loss, a gradient or a co-state is not finite; this process's weights were not
                updated.
            LostProcessError: another process ended, or did not answer in time.
        """
        if self._ready is None or self._ready.chain is not chain:
            self.prepare(chain, batch)
        sections = self._prepared()
        if self.steps < self._global_steps:
            loss = sections.predict_globally(batch, optimizer, last=self.steps + 1 == self.coarse_steps)
        else:
            if self.steps == 0:
                sections.share(optimizer, all_from_first=True)
            loss = sections.correct_locally(batch, optimizer, self.steps)
        self.steps += 1
        return loss

    def gather(self, chain: Chain, optimizer: Optimizer) -> None:
        """See :class:`LayerParallel`.

        Raises:
            ValueError: not prepared.
        """
        self._prepared().gather(optimizer, coarse=self.steps < self._global_steps)

    def state_dict(self) -> dict[str, Any]:
        """Where the chain is cut, the steps made, and the regressions; of all processes after :meth:`gather`."""
        sections = self._prepared()
        return {"bounds": list(sections.bounds), "steps": self.steps, "sections": sections.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them, on all processes.

        Raises:
            ValueError: the chain is cut elsewhere now.
        """
        sections = self._prepared()
        if tuple(state.get("bounds", ())) != sections.bounds:
            raise ValueError(
                f"split: parts began at {state.get('bounds')} and do at {sections.bounds} now; give split=."
            )
        self.steps = state["steps"]
        sections.load_state_dict(state["sections"])

    @property
    def _global_steps(self) -> int:
        return 0 if self.exact else self.coarse_steps

    def _prepared(self) -> Sections:
        if self._ready is None:
            raise ValueError(
                "ParallelInTime: it has to know the chain first: call prepare(chain, batch), or make a step."
            )
        return self._ready

    def _check(self) -> None:
        check_layers(self.parts, self.split, self.time_limit)
        for name, low in {"coarse_factor": 2, "coarse_steps": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}={value!r}: give a whole number >= {low}.")
        if not isinstance(self.decay, int | float) or not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay!r}: give a number above 0, at most 1.")
        if not isinstance(self.ridge, int | float) or not 0 < self.ridge < math.inf:
            raise ValueError(f"ridge={self.ridge!r}: give a number > 0.")


def _refuse_sum(chain: Chain, batch: Any) -> None:
    """See that the loss is no sum over samples: the regression divides co-states by the number of samples.

    Raises:
        ValueError: it is.
    """
    try:
        refuse_sum(chain, batch)
    except ValueError as error:
        raise ValueError(
            "loss: it grows with the number of samples, as a sum over them; co-states of a batch of another size would "
            "be predicted wrongly. Give a mean (reduction='mean'), or exact=True, which predicts nothing."
        ) from error
