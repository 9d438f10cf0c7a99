"""A mixin for a ``LightningModule`` whose steps use horizonplan's gradient, in Lightning's manual optimisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from horizonplan.algorithms import GradientMethod
from horizonplan.batch import ComputeLoss, LossFunction, resolve_loss
from horizonplan.integrations import LazyGradient
from horizonplan.plan import Plan

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import SingleDeviceStrategy
except ImportError as error:
    raise ImportError(
        f"horizonplan.integrations.lightning needs lightning ({error}): pip install 'horizonplan[lightning]'."
    ) from error

__all__ = ["HorizonMixin"]


class HorizonMixin(LightningModule):
    """A ``LightningModule`` with :meth:`horizon_step`: a training step as in automatic optimisation.

    Set ``plan`` or ``algorithm`` in ``__init__`` or in the class; with neither, the gradient is back-propagation's.
    Either may be another one later. The chain is built from the first batch, by a few trial forwards.

    Attributes:
        plan: what to train with; excludes ``algorithm``.
        algorithm: a method that only differs in the gradient.

    >>> class Model(HorizonMixin, LightningModule):
    ...     def __init__(self, network, plan):
    ...         super().__init__()
    ...         self.model, self.plan = network, plan
    ...
    ...     def training_step(self, batch, batch_idx):
    ...         self.log("loss", self.horizon_step(batch))
    ...
    ...     def configure_optimizers(self):
    ...         return torch.optim.AdamW(self.parameters())
    """

    plan: Plan | None = None
    algorithm: GradientMethod | None = None
    _gradient: LazyGradient | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def horizon_step(
        self,
        batch: Any,
        *,
        model: nn.Module | None = None,
        loss: LossFunction | None = None,
        compute_loss: ComputeLoss | None = None,
        blocks: str | Sequence[str] | None = None,
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        step_schedulers: bool = True,
    ) -> Tensor:
        """One training step: clear, accumulate the gradient, clip, update, go on with the learning rate.

        Args:
            batch: ``training_step``'s batch.
            model: the chain; ``None``: ``self.model``. ``self`` if the blocks are this module's own.
            loss: as for :func:`horizonplan.train`.
            compute_loss: likewise.
            blocks: likewise.
            max_grad_norm: the gradient's norm is clipped to this (``gradient_clip_val`` of Lightning's Trainer is for
                automatic optimisation); ``None``: not.
            accumulate: batches to an update, each weighing ``1 / accumulate``. The last batch of an epoch updates in
                any case, as in automatic optimisation.
            step_schedulers: step schedulers of interval ``"step"`` after every ``frequency`` updates, those of
                interval ``"epoch"`` after the last batch of every ``frequency`` epochs. ``False``: you do.

        Returns:
            The batch's loss, detached, shape ``()``.

        Raises:
            ValueError: bad arguments, or what :class:`HorizonMixin` does not go with: the message has the way out.
        """
        self._check(max_grad_norm, accumulate, step_schedulers)
        optimizer, trainer = self._optimizer(), self.trainer
        index: int = trainer.fit_loop.batch_idx
        last = trainer.is_last_batch or index + 1 == trainer.num_training_batches
        if index % accumulate == 0:
            optimizer.zero_grad()
        found = self._accumulate(batch, self._chained(model), resolve_loss(loss, compute_loss), blocks, 1 / accumulate)
        updates = (index + 1) % accumulate == 0 or last
        if updates:
            if max_grad_norm is not None:
                self._clip(optimizer, max_grad_norm)
            optimizer.step()
        if step_schedulers:
            self._step_schedulers(updates, last)
        return found

    def _accumulate(
        self, batch: Any, model: nn.Module, compute: ComputeLoss, blocks: str | Sequence[str] | None, share: float
    ) -> Tensor:
        """The gradient into ``p.grad``, with Lightning's hooks behind it."""
        if self._gradient is None or self._gradient.asked != (self.plan, self.algorithm, blocks):
            self._gradient = LazyGradient(self.plan, self.algorithm, blocks)
        scaler: Any = self.trainer.scaler
        scale = share if scaler is None else scaler.scale(torch.tensor(share, device=self.device))
        found = self._gradient.backward(model, batch, compute, scale)
        self.manual_backward((found * share).requires_grad_())  # a leaf: nothing but the hooks and the strategy's part
        return found

    def _clip(self, optimizer: Any, norm: float) -> None:
        """Clip; gradients that are still scaled (16-mixed) to a norm that is scaled as well."""
        scaler: Any = self.trainer.scaler
        scaled = norm if scaler is None else norm * scaler.get_scale()
        self.clip_gradients(optimizer, gradient_clip_val=scaled, gradient_clip_algorithm="norm")

    def _step_schedulers(self, updated: bool, last: bool) -> None:
        done = {"step": self.trainer.global_step if updated else 0, "epoch": self.current_epoch + 1 if last else 0}
        for config in self.trainer.lr_scheduler_configs:
            count = done[config.interval]
            if count and count % config.frequency == 0:
                self.lr_scheduler_step(config.scheduler, None)

    def _chained(self, model: nn.Module | None) -> nn.Module:
        found: Any = getattr(self, "model", None) if model is None else model
        if not isinstance(found, nn.Module):
            raise ValueError(
                f"model is a {type(found).__name__}: give the network as self.model, or horizon_step(..., model=...)."
            )
        return found

    def _optimizer(self) -> Any:
        optimizer = self.optimizers()
        if isinstance(optimizer, list):
            raise ValueError(
                f"configure_optimizers returned {len(optimizer)} optimisers: horizon_step makes one update; return one "
                "optimiser with parameter groups, or use plan.backward in a training_step of your own."
            )
        return optimizer

    def _check(self, max_grad_norm: float | None, accumulate: int, step_schedulers: bool) -> None:
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate={accumulate!r}: give a whole number >= 1.")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm!r}: give a number > 0, or None.")
        if self.automatic_optimization:
            raise ValueError("automatic_optimization=True: horizon_step updates by itself; leave it at False.")
        if getattr(self, "_compiler_ctx", None) is not None:  # Lightning's note of a compiled module
            raise ValueError(
                "torch.compile(module): it hides the blocks; compile the blocks instead (block.compile())."
            )
        if not isinstance(self.trainer.strategy, SingleDeviceStrategy):
            raise ValueError(
                f"strategy: {type(self.trainer.strategy).__name__} wraps the model, or reduces gradients before they "
                "are complete; use Trainer(devices=1, strategy='auto'), or horizonplan.train."
            )
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if step_schedulers and any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in schedulers):
            raise ValueError(
                "step_schedulers=True: ReduceLROnPlateau waits for a metric that a step does not have; give "
                "step_schedulers=False and step the schedulers in on_validation_epoch_end."
            )
