"""What a user can ask of a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from horizonplan.algorithms import Algorithm
from horizonplan.batch import ComputeLoss, LossFunction
from horizonplan.plan import Plan
from horizonplan.progress import Progress
from horizonplan.projection import Projection
from horizonplan.training.evaluate import Metric


@dataclass
class Options:
    """What a training run is asked to do; :class:`Trainer` does it.

    Args:
        model: the model the plan was made for, or any chain for an algorithm.
        data: a DataLoader, a list of batches, or a Dataset (32 samples a batch, shuffled anew each epoch).
        plan: what to train with; excludes ``algorithm``.
        algorithm: a :class:`horizonplan.algorithms.Algorithm`, or a mapping from first epochs to algorithms
            (``{0: Horizon(2, 2), 5: BackPropagation()}``). With neither, back-propagation.
        warmup: epochs of smaller horizons, growing to that of the plan or algorithm.
        epochs: passes over the data.
        loss: as for :func:`horizonplan.plan_horizon`.
        compute_loss: likewise.
        blocks: likewise; a plan brings its own.
        projection: likewise.
        device: where to train; ``None``: where the model is; ``"emulated:40MiB"``: on the CPU, which runs out of
            memory as a card of that size would.
        optimizer: ``callable(params) -> Optimizer``, an Optimizer over this model's parameters, or ``None``
            for ``AdamW(lr=1e-3)``.
        scheduler: ``callable(optimizer) -> scheduler``, or one made from ``optimizer``: any of
            ``torch.optim.lr_scheduler``, or :class:`horizonplan.DecayOnGrowth`, the paper's rule.
        scheduler_every: ``"epoch"`` or ``"step"``: how often it is stepped.
        precision: ``"fp32"``; ``"bf16"`` or ``"fp16"``: autocast around forwards, and for fp16 a scaled loss.
            ``None``: the plan's; without a plan ``"fp32"``.
        accumulate: batches whose gradients make one step (weighted by their samples). A plan's micro-batches are
            parts of each of them.
        max_grad_norm: what the gradient's norm is clipped to.
        fused: update each parameter as soon as its gradient is complete, and free the gradient: the same weights
            bit for bit, in less memory. A step that turns out not to be finite has then changed weights already.
        compile: compile each block: ``True``, or a backend of ``torch.compile``.
        val_data: as ``data``, evaluated in eval mode after each epoch.
        metrics: for the validation, see :func:`horizonplan.training.evaluate`.
        callbacks: objects with methods of :class:`horizonplan.Callback`, such as
            :class:`horizonplan.EarlyStopping`.
        watch_every: steps between measurements of a step's peak on CPU (on CUDA it is always known); 0: the first
            two steps only. A peak beyond the plan's by more than 5 % is logged and warned of.
        cosine_every: steps between measurements of the gradient's cosine, at the price of a step of
            back-propagation each; 0: none. One below the plan's is logged and warned of.
        progress: ``None``: shown on a terminal; ``True``: always; ``False``: never; or
            ``callable(message, done, total)``, called after each epoch.
        run_dir: a folder for ``log.jsonl``, ``plan.json``, ``checkpoints/`` and the final weights
            ``model.safetensors``.
        save_every: steps between checkpoints; ``None``: one after each epoch. The last two are kept.
        resume: ``True``: go on from the newest valid checkpoint in ``run_dir`` (from the start if there is none); or
            the path of a run's folder or of a checkpoint.
        nonfinite: what to do when a loss or gradient is NaN or infinite: ``"raise"``; ``"skip"`` the update; or
            ``"rollback"`` to the last checkpoint's weights, and go on with the next batch.
        max_nonfinite: how many such steps are borne in a run.
        oom_retries: how often, when memory runs out, the same step is tried again with recompute or half the horizon,
            with which training then goes on. Each is warned of and logged.
        seed: of all generators (torch, NumPy, Python) during the run, and of a Dataset's order; restored afterwards.
        deterministic: torch's deterministic algorithms during the run.

    In processes started by torchrun, each takes its share of the batches, and gradients are those on the joint batch.
    """

    model: nn.Module
    data: Any
    _: KW_ONLY
    plan: Plan | None = None
    algorithm: Algorithm | Mapping[int, Algorithm] | None = None
    warmup: int = 0
    epochs: int = 1
    loss: LossFunction | None = None
    compute_loss: ComputeLoss | None = None
    blocks: str | Sequence[str] | None = None
    projection: Projection | None = None
    device: str | torch.device | None = None
    optimizer: Callable[[Any], Optimizer] | Optimizer | None = None
    scheduler: Any = None
    scheduler_every: str = "epoch"
    precision: str | None = None
    accumulate: int = 1
    max_grad_norm: float | None = None
    fused: bool = False
    compile: bool | str | Callable[..., Any] = False
    val_data: Any = None
    metrics: Mapping[str, Metric] | None = None
    callbacks: Sequence[Any] = ()
    watch_every: int = 100
    cosine_every: int = 0
    progress: Progress = None
    run_dir: str | Path | None = None
    save_every: int | None = None
    resume: bool | str | Path = False
    nonfinite: str = "raise"
    max_nonfinite: int = 10
    oom_retries: int = 2
    seed: int = 0
    deterministic: bool = False

    @property
    def forward_precision(self) -> str:
        """What is asked for, or else the plan's precision."""
        if self.precision is not None:
            return self.precision
        return "fp32" if self.plan is None else self.plan.precision

    @property
    def micro_batches(self) -> int:
        """Parts of each batch: the plan's."""
        return 1 if self.plan is None else self.plan.micro_batches
