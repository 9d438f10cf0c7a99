"""A ``transformers.Trainer`` whose backward pass is horizonplan's; everything around it is the Trainer's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.algorithms import GradientMethod
from horizonplan.integrations import LazyGradient
from horizonplan.plan import Plan

try:
    import transformers

    memory = import_module("accelerate.utils.memory")
except ImportError as error:
    raise ImportError(
        f"horizonplan.integrations.hugging_face needs transformers and accelerate ({error}): "
        "pip install 'horizonplan[hugging-face]'."
    ) from error

__all__ = ["HorizonTrainer"]


@dataclass(frozen=True)
class _Batch:
    """A batch as the chain sees it: the model's inputs, and what the Trainer divides their loss by."""

    inputs: Any
    items: Any
    steps: int


class HorizonTrainer(transformers.Trainer):
    """``transformers.Trainer`` with the gradient of a plan or a method.

    The loss is the Trainer's: ``compute_loss`` (a subclass's own too), ``compute_loss_func``, label smoothing, and its
    division by the items or the steps of a gradient accumulation. So are mixed precision, clipping, optimiser,
    schedule, logging, evaluation, checkpoints. ``compute_loss`` runs once more for each window of a truncated
    gradient, and a few times when the chain is built, at the first batch.

    Args:
        *args: the Trainer's.
        plan: what to train with; excludes ``algorithm``.
        algorithm: a method that only differs in the gradient; with neither, back-propagation.
        blocks: as for :func:`horizonplan.plan_horizon`; a plan brings its own.
        **kwargs: the Trainer's.

    Raises:
        ValueError: the arguments exclude each other, or something would take the backward pass or the model's blocks
            out of horizonplan's hands: the message names it and the way out.
    """

    def __init__(
        self,
        *args: Any,
        plan: Plan | None = None,
        algorithm: GradientMethod | None = None,
        blocks: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._gradient = LazyGradient(plan, algorithm, blocks)
        super().__init__(*args, **kwargs)
        for what, way_out in _refused(self):
            raise ValueError(f"{what}: {way_out}.")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Accumulate the gradient of one batch; return its loss, detached and divided as the Trainer expects.

        Raises:
            ValueError: the model was wrapped on its way here, is no chain, or is not the plan's.
        """
        if model is not self.model:
            raise ValueError(
                f"model: the Trainer wrapped it in a {type(model).__name__}, which horizonplan cannot see through; "
                "switch off what wraps it, or use horizonplan.train."
            )
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):
            train()  # optimisers without a schedule have modes of their own
        batch = _Batch(self._prepare_inputs(inputs), num_items_in_batch, self._divisor(num_items_in_batch))
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            memory.clear_device_cache()
        with self.compute_loss_context_manager():
            return self._gradient.backward(model, batch, self._batch_loss, self._scale())

    def _batch_loss(self, model: nn.Module, batch: _Batch) -> Tensor:
        """What the Trainer would call backward on, before the scaler. ``compute_loss`` may take the inputs apart."""
        loss: Any = self.compute_loss(model, copy.copy(batch.inputs), num_items_in_batch=batch.items)
        return loss / batch.steps  # type: ignore[no-any-return]

    def _divisor(self, items: Tensor | int | None) -> int:
        """The steps of a gradient accumulation, where the loss has not been divided by all their items already."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # newer transformers: a subclass can say so
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None
        return 1 if scaled else self.current_gradient_accumulation_steps

    def _scale(self) -> float | Tensor:
        """The fp16 scaler's factor; asked for in the way that also starts the scaler."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.args.device))


def _refused(trainer: transformers.Trainer) -> Iterator[tuple[str, str]]:
    """What stands in the way of a gradient engine inside the model's forward, and the way out of each."""
    args: Any = trainer.args
    alone = "start one process for one device"
    checkpointing = any(getattr(args, name, False) for name in ("activation_checkpointing", "gradient_checkpointing"))
    if trainer.is_deepspeed_enabled:
        yield "deepspeed", "it owns the backward pass; train without it"
    if trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled:
        yield "fsdp", "it shards the blocks' weights behind the schedule's back; train without it"
    if (count := trainer.accelerator.num_processes) > 1:
        yield (
            f"{count} processes",
            f"DistributedDataParallel would sum gradients before they are complete; {alone}, or use horizonplan.train",
        )
    if args.n_gpu > 1:
        yield f"n_gpu={args.n_gpu}", f"DataParallel copies the model in every forward; {alone} (CUDA_VISIBLE_DEVICES=0)"
    if trainer.is_model_parallel:
        yield "hf_device_map", "the model is spread over several devices; put it on one"
    if checkpointing:
        yield "gradient_checkpointing=True", "it runs blocks a second time; leave it out and plan with recompute=1"
    if args.torch_compile:
        yield "torch_compile=True", "a compiled whole model hides its blocks; compile the blocks (block.compile())"
    if args.optim in ("lomo", "adalomo"):
        yield f"optim={args.optim.value!r}", "it makes the backward pass itself; choose another optimiser"
