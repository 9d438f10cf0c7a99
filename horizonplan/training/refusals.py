"""What a trainer refuses, with the reason: bad values, and options that cannot be honoured together."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from horizonplan.algorithms import Algorithm, LayerParallel, Windows
from horizonplan.batch import resolve_loss
from horizonplan.chain import Chain
from horizonplan.devices import parse_device
from horizonplan.plan import Plan
from horizonplan.precision import check_precision
from horizonplan.training.callbacks import check_callback
from horizonplan.training.evaluate import check_metrics
from horizonplan.training.fused import check_schedule
from horizonplan.training.options import Options
from horizonplan.training.schedules import DecayOnGrowth

FUSED_EXCLUDES = {
    "accumulate": "gradients that wait for the next batch cannot be freed",
    "micro_batches": "the plan accumulates gradients over them, which cannot be freed in between",
    "max_grad_norm": "the norm of all gradients is known only when all are complete, after the first updates",
    "nonfinite": "updates are made before all gradients are known to be finite; 'rollback' undoes them",
    "precision": "fp16's scaler must see all gradients before an update; 'bf16' needs none",
}


def check(options: Options) -> None:
    """See that the options make sense, each by itself and together.

    Raises:
        ValueError: one does not.
    """
    _numbers(options)
    _methods(options)
    _choices(options)
    resolve_loss(options.loss, options.compute_loss)
    for name, module in options.model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"model: {name!r} has sparse gradients, which are not taken; set sparse=False.")
    card = parse_device(options.device)
    if card is not None and card.kind == "simulated":
        raise ValueError(
            f"device={options.device!r}: nothing runs on a simulated device; give an emulated or a real one."
        )
    if not isinstance(options.callbacks, Sequence):
        raise ValueError(f"callbacks={options.callbacks!r}: give a list of them.")
    for callback in options.callbacks:
        check_callback(callback)
    if options.metrics is not None:
        check_metrics(options.metrics)
        if options.val_data is None:
            raise ValueError("metrics: there is no val_data to measure them on; give some.")
    if options.run_dir is None:
        for name, value in {"resume": options.resume is True, "save_every": options.save_every is not None}.items():
            if value:
                raise ValueError(f"{name}: it needs a run_dir, where checkpoints are; give one.")
        if options.nonfinite == "rollback":
            raise ValueError("nonfinite='rollback': it needs a run_dir with checkpoints to roll back to; give one.")
    if options.fused:
        _fused(options)


def check_sharing(methods: Iterable[Algorithm]) -> None:
    """See that in several processes all methods of a run share the layers.

    Raises:
        ValueError: some share the samples.
    """
    odd = [type(method).__name__ for method in methods if not isinstance(method, LayerParallel)]
    if odd:
        raise ValueError(
            f"algorithm: {odd[0]} shares the samples among processes, and another method of the run the layers; leave "
            "one of them out, or start one process."
        )


def check_method(options: Options, method: Algorithm, chain: Chain, world: int) -> None:
    """See that a method honours on a chain what is asked for inside its steps.

    Raises:
        ValueError: it does not.
    """
    layers = isinstance(method, LayerParallel)
    asked = {
        "accumulate": options.accumulate > 1,
        "max_grad_norm": options.max_grad_norm is not None,
        "fused": options.fused,
        "precision": options.forward_precision != "fp32",
        "data_parallel": world > 1 and not layers,
        "nonfinite": options.nonfinite == "skip" or (options.nonfinite == "rollback" and layers),
    }
    for name, wanted in asked.items():
        if wanted and name not in method.honours:
            what = f"{world} processes" if name == "data_parallel" else f"{name}={getattr(options, name)!r}"
            raise ValueError(f"{what}: {type(method).__name__} owns its step and does not take it; leave it out.")
    if options.fused and isinstance(method, Windows):
        check_schedule(chain, method.schedule(chain.depth))


def check_scheduler(scheduler: Any, optimizer: Optimizer, every: str) -> None:
    """See that it is a scheduler of this optimiser.

    Raises:
        ValueError: it is not.
    """
    if scheduler is None:
        return
    if not callable(getattr(scheduler, "step", None)) or not callable(getattr(scheduler, "state_dict", None)):
        raise ValueError(
            f"scheduler={scheduler!r}: give a scheduler of torch.optim, or callable(optimizer) -> scheduler."
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("scheduler: it was made for another optimizer; give callable(optimizer) -> scheduler.")
    if every == "step" and isinstance(scheduler, ReduceLROnPlateau | DecayOnGrowth):
        raise ValueError(f"scheduler_every='step': {type(scheduler).__name__} compares epochs; set it to 'epoch'.")
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode == "max":
        raise ValueError("scheduler: ReduceLROnPlateau gets the validation loss, which is to fall; give it mode='min'.")


def check_steps(optimizer: Optimizer) -> None:
    """See that an optimiser's step needs nothing but gradients.

    Raises:
        ValueError: it needs a closure, as LBFGS does.
    """
    needed = [p for p in inspect.signature(type(optimizer).step).parameters.values() if p.default is p.empty]
    if [p.name for p in needed if p.kind is p.POSITIONAL_OR_KEYWORD] != ["self"]:
        raise ValueError(f"optimizer: {type(optimizer).__name__}.step needs a closure; give one that steps without.")


def _methods(options: Options) -> None:
    plan, algorithm = options.plan, options.algorithm
    if plan is not None and algorithm is not None:
        raise ValueError("plan and algorithm are both given: give one.")
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(f"plan is a {type(plan).__name__}: give a Plan, e.g. Plan.load(path).")
    if plan is not None and options.blocks is not None:
        raise ValueError(f"blocks={options.blocks!r}: a plan brings its own blocks; leave it out.")
    if options.warmup >= options.epochs:
        raise ValueError(f"warmup={options.warmup}: it is to end before the {options.epochs} epochs do; give fewer.")
    if isinstance(algorithm, Mapping):
        if options.warmup:
            raise ValueError(f"warmup={options.warmup}: the mapping of algorithms has its own; leave one out.")
        if 0 not in algorithm or not all(_whole(epoch, 0) for epoch in algorithm):
            raise ValueError(f"algorithm: its keys {list(algorithm)} are not first epochs; give {{0: ..., 5: ...}}.")
    for method in algorithm.values() if isinstance(algorithm, Mapping) else [algorithm]:
        if method is not None and not isinstance(method, Algorithm):
            raise ValueError(f"algorithm={method!r}: give an Algorithm such as horizonplan.algorithms.Horizon(3).")


def _numbers(options: Options) -> None:
    least = {"epochs": 1, "accumulate": 1, "save_every": 1, "warmup": 0, "watch_every": 0, "cosine_every": 0}
    least |= {"max_nonfinite": 0, "oom_retries": 0, "seed": 0}
    for name, low in least.items():
        value = getattr(options, name)
        if not _whole(value, low) and not (name == "save_every" and value is None):
            raise ValueError(f"{name}={value!r}: give a whole number >= {low}.")
    norm = options.max_grad_norm
    if norm is not None and not (isinstance(norm, int | float) and 0 < norm < math.inf):
        raise ValueError(f"max_grad_norm={norm!r}: give a number > 0.")


def _choices(options: Options) -> None:
    check_precision(options.forward_precision)
    for name, choices in {"scheduler_every": ("epoch", "step"), "nonfinite": ("raise", "skip", "rollback")}.items():
        if getattr(options, name) not in choices:
            raise ValueError(f"{name}={getattr(options, name)!r}: give {', '.join(map(repr, choices))}.")


def _fused(options: Options) -> None:
    asked = {
        "accumulate": options.accumulate > 1,
        "max_grad_norm": options.max_grad_norm is not None,
        "nonfinite": options.nonfinite == "skip",
        "precision": options.precision == "fp16",
        "micro_batches": options.micro_batches > 1,
    }
    for name, wanted in asked.items():
        if wanted:
            raise ValueError(f"fused and {name}={getattr(options, name)!r}: {FUSED_EXCLUDES[name]}; leave one out.")


def _whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
