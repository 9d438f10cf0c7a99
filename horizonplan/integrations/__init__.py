"""horizonplan's gradients inside other people's training loops; each loop's library is an optional extra.

``hugging_face`` has a ``transformers.Trainer``, ``lightning`` a mixin for a ``LightningModule``. What both need is
here: the choice of the gradient, and the chain, which can only be built when the first batch is there. Importing this
package imports neither library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from horizonplan.algorithms import Algorithm, BackPropagation, Fixed, GradientMethod
from horizonplan.batch import ComputeLoss
from horizonplan.chain import Chain
from horizonplan.plan import Plan

__all__ = ["LazyGradient"]


class LazyGradient:
    """The gradient of a plan or a method, for a model and batches that come later.

    The chain is built from the first batch, and again when the model, or what is trainable in it, has changed.

    Args:
        plan: what to train with; excludes ``algorithm``.
        algorithm: a method that only differs in the gradient; with neither, back-propagation.
        blocks: as for :func:`horizonplan.plan_horizon`; a plan brings its own.

    Raises:
        ValueError: the arguments exclude each other, or the method is more than a gradient.
    """

    def __init__(
        self, plan: Plan | None, algorithm: GradientMethod | None, blocks: str | Sequence[str] | None = None
    ) -> None:
        self.asked = (plan, algorithm, blocks)
        self.plan, self.blocks = plan, blocks
        self.method = _method(plan, algorithm, blocks)
        self.chain: Chain | None = None
        self.trainable: list[bool] = []
        self._compute: ComputeLoss | None = None

    def backward(self, model: nn.Module, batch: Any, compute: ComputeLoss, scale: float | Tensor = 1.0) -> Tensor:
        """Add ``scale`` times the gradient into ``p.grad``; return the terminal loss, unscaled and detached.

        Args:
            model: the model that is trained.
            batch: whatever ``compute`` takes, on the model's device.
            compute: ``(model, batch) -> scalar``; may be another one in each call.
            scale: factor on the gradient (loss scaling, accumulation).

        Raises:
            ValueError: the model is no chain, or not the plan's, or the method trains modules of its own.
        """
        self._compute = compute
        trainable = [p.requires_grad for p in model.parameters()]
        if self.chain is None or self.chain.model is not model or self.trainable != trainable:
            self.chain, self.trainable = self._build(model, batch), trainable
        return self.method.backward(self.chain, batch, scale)

    def _build(self, model: nn.Module, batch: Any) -> Chain:
        if self.plan is not None:
            chain = self.plan.chain(model, batch, compute_loss=self._loss)
        else:
            chain = Chain.from_model(model, batch, self.blocks, compute_loss=self._loss)
        if self.method.prepare(chain, batch) is not None:
            raise ValueError(
                f"algorithm={self.method!r} trains modules of its own, which this loop's optimiser does not have: "
                "train with horizonplan.train."
            )
        return chain

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        assert self._compute is not None
        return self._compute(model, batch)

    def __getstate__(self) -> dict[str, Any]:
        """A copy (of a module that keeps this, say) builds a chain of its own."""
        return {**self.__dict__, "chain": None, "_compute": None}


def _method(plan: Any, algorithm: Any, blocks: str | Sequence[str] | None) -> GradientMethod:
    """What computes the gradient."""
    if plan is not None and algorithm is not None:
        raise ValueError("plan and algorithm are both given: give one.")
    if plan is not None:
        if not isinstance(plan, Plan):
            raise ValueError(f"plan is a {type(plan).__name__}: give a Plan, e.g. Plan.load(path).")
        if blocks is not None:
            raise ValueError(f"blocks={blocks!r}: a plan brings its own blocks; leave it out.")
        return Fixed(plan.schedule)
    method = BackPropagation() if algorithm is None else algorithm
    if isinstance(method, Algorithm) and not isinstance(method, GradientMethod):
        raise ValueError(f"algorithm={method!r} makes its whole step itself: train with horizonplan.train.")
    if not isinstance(method, GradientMethod):
        raise ValueError(f"algorithm={method!r}: give a GradientMethod such as horizonplan.algorithms.Horizon(3).")
    if type(method).state_dict is not Algorithm.state_dict:
        raise ValueError(
            f"algorithm={method!r} keeps a state of its own, which this loop's checkpoints do not hold: train with "
            "horizonplan.train."
        )
    return method
