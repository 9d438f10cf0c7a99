"""``tune_horizon``: trials of the few schedules worth training, and of the parameters they train best with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from horizonplan.batch import ComputeLoss, LossFunction
from horizonplan.objective import Objective
from horizonplan.plan import Plan
from horizonplan.planner import DEFAULT_OBJECTIVE
from horizonplan.progress import Progress, reporter
from horizonplan.projection import Projection
from horizonplan.training.evaluate import Metric
from horizonplan.tuner.ledger import Direction, Ledger, join
from horizonplan.tuner.planning import Asked, recall
from horizonplan.tuner.proposals import Proposal, Proposals, Space, check_optimizer, check_options
from horizonplan.tuner.schedules import label
from horizonplan.tuner.setting import Setting
from horizonplan.tuner.storage import Place, opened
from horizonplan.tuner.study import Study, read
from horizonplan.tuner.work import Found, Model
from horizonplan.tuner.workers import Workers
from horizonplan.units import format_bytes, parse_bytes


def tune_horizon(
    model: Model,
    data: Any,
    *,
    val_data: Any,
    plan: Plan | None = None,
    storage: Place = None,
    trials: int = 20,
    epochs: int = 1,
    metric: str = "loss",
    higher_is_better: bool | None = None,
    optimizer: Callable[..., Optimizer] | None = None,
    learning_rates: tuple[float, float] | None = (1e-4, 1e-2),
    max_warmup: int | None = None,
    space: Space | None = None,
    schedules: int = 6,
    memory_limit: int | str | None = None,
    workers: int = 1,
    prune: bool = True,
    seed: int = 0,
    name: str = "horizonplan",
    timeout_seconds: float = 24 * 3600.0,
    loss: LossFunction | None = None,
    compute_loss: ComputeLoss | None = None,
    blocks: str | Sequence[str] | None = None,
    objective: Objective = DEFAULT_OBJECTIVE,
    device: str | torch.device | None = None,
    projection: Projection | None = None,
    metrics: Mapping[str, Metric] | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress = None,
) -> Study:
    """Train the few schedules of a plan that nothing else beats, and find the parameters they train best with.

    Horizons, strides and recomputing are weighed by the plan, at once; trials are spent on what only training tells.
    Each trains from the same seed for ``epochs``, and is judged by three numbers: peak memory of a step, the metric on
    the validation data, time of a step. The first trials are the plan's schedules, its choice first, at the middle
    learning rate; then Optuna's TPE sampler proposes.

    A storage that holds the study already is gone on with, up to ``trials`` in all: after a crash, or on several
    machines at once. No finished trial is lost; one whose process died is made again.

    Each trial has a process of its own, so that one that crashes, or runs out of memory, ends no other. What is
    given here is pickled for it: define classes and functions at the top of a module, and guard what a main script runs
    with ``if __name__ == "__main__":``. ``workers=0`` trains in this process instead.

    Args:
        model: a module, which is left as it is (trials train copies), or a function that returns one, called with what
            ``space`` has for ``"model"``; without arguments to plan.
        data: as for :func:`horizonplan.train`, or a function without arguments that returns it, called in each trial,
            so that large data need not be pickled.
        val_data: likewise, to validate on.
        plan: whose schedules to try; ``None``: one is made.
        storage: ``None``: memory; a path: a journal on one machine; a URL (``postgresql://user@host/name``): a
            database for several; or an Optuna storage.
        trials: how many there are to be in all.
        epochs: of each trial.
        metric: ``"loss"``, ``"accuracy"``, or one of ``metrics``.
        higher_is_better: of the metric; ``None``: True for names that end in "accuracy", False in "loss".
        optimizer: ``callable(params, lr=..., ...) -> Optimizer``, such as ``torch.optim.SGD``; ``None``: AdamW.
        learning_rates: the least and the largest, tuned on a log scale; ``None``: the optimizer's own.
        max_warmup: most epochs of smaller horizons at the start; ``None``: half of ``epochs``.
        space: ``(optuna trial) -> {"model": {...}, "optimizer": {...}, "train": {...}}``: arguments for the model's
            function, the optimizer, and :func:`horizonplan.train`, suggested by ``trial.suggest_float`` and the like.
            A model of other sizes is predicted before it is trained; it has to have the blocks that were planned for.
        schedules: how many of the plan's schedules to try, at most.
        memory_limit: what a step may need, bytes or ``"24GiB"``. What is predicted to need more is never trained.
            ``None``: the objective's limit, or an emulated or CUDA device's memory, if there is one.
        workers: trials side by side, each in a process, which share this machine's device and cores; 0: none.
        prune: end a trial after an epoch in which its metric is worse than the median of at least three finished
            trials with schedules that need no more memory and time.
        seed: of the trials' weights and training, of proposals, and of the plan. With one worker the same seed gives
            the same trials, as long as the plan is the same (and ``space`` changes no model, see ``Study.clock``).
        name: of the study in its storage.
        timeout_seconds: for a trial; one that takes longer has failed.
        loss: as for :func:`horizonplan.plan_horizon`.
        compute_loss: likewise.
        blocks: likewise; a plan brings its own.
        objective: of the plan that is made.
        device: where to plan and train; ``"emulated:40MiB"``: on the CPU, which runs out of memory as such a card.
        projection: as for :func:`horizonplan.plan_horizon`.
        metrics: as for :func:`horizonplan.train`.
        options: further arguments of :func:`horizonplan.train` for all trials: ``precision``, ``accumulate``, ...
        progress: ``None``: a line a trial on a terminal; ``True``/``False``; or ``callable(message, done, total)``.

    Raises:
        ValueError: bad arguments; no schedule fits; the storage's study was made with other settings; something
            cannot go to a trial's process.
    """
    _check(trials, epochs, schedules, workers, seed, learning_rates, max_warmup, timeout_seconds)
    check_options("options", options or {})
    higher = _direction(metric, higher_is_better)
    asked = Asked(
        model=model,
        data=data,
        val_data=val_data,
        plan=plan,
        how={"loss": loss, "compute_loss": compute_loss, "projection": projection},
        device=device,
        metrics=metrics,
        objective=objective,
        blocks=blocks,
        schedules=schedules,
        memory_limit=None if memory_limit is None else parse_bytes(memory_limit, "memory_limit"),
        proposals=Proposals(
            rows={},
            optimizer=check_optimizer(optimizer, learning_rates is not None),
            rates=learning_rates,
            warmup=epochs // 2 if max_warmup is None else max_warmup,
            space=space,
            factory=not isinstance(model, nn.Module),
        ),
        seed=seed,
        progress=progress,
    )
    asked.check_metric(metric)
    settings = {"metric": metric, "epochs": epochs, "seed": seed, "learning_rates": learning_rates}
    settings |= {"max_warmup": asked.proposals.warmup, "memory_limit": asked.limit_bytes, "schedules": schedules}
    directions: list[Direction] = ["minimize", "maximize" if higher else "minimize", "minimize"]
    with opened(storage) as kept:
        study, record = join(kept, name, directions, partial(asked.record, settings))
        base, rows = recall(record, asked, settings, name)
        asked = replace(asked, plan=base, proposals=replace(asked.proposals, rows=rows))
        given = {**asked.how, "device": device, "metrics": metrics}
        setting = Setting(
            model=model,
            data=data,
            val_data=val_data,
            plan=base,
            epochs=epochs,
            metric=metric,
            higher_is_better=higher,
            clock=asked.clock,
            limit_bytes=asked.limit_bytes,
            seed=seed,
            workers=workers,
            options={n: value for n, value in given.items() if value is not None} | dict(options or {}),
        )
        with Ledger(study, trials, seed, asked.limit_bytes) as ledger:
            tell = partial(_tell, reporter(progress, trials), metric)
            Workers(ledger, asked.proposals, setting, workers, prune, timeout_seconds, tell).run()
            done = [trial for one in ledger.begun() if (trial := read(one, rows)) is not None]
    return Study(tuple(done), asked.proposals, setting)


def _tell(report: Callable[[str | None], None], metric: str, number: int, proposal: Proposal, found: Found) -> None:
    value = f", {metric} {found.metrics[metric]:.4g}" if metric in found.metrics else ""
    memory = "" if found.memory_bytes is None else f", {format_bytes(found.memory_bytes)}"
    report(f"trial {number} {found.state}: {label(proposal.row)}{value}{memory}")


def _direction(metric: str, higher_is_better: bool | None) -> bool:
    if higher_is_better is None:
        if not metric.endswith(("loss", "accuracy")):
            raise ValueError(f"metric={metric!r}: say whether higher_is_better, True or False.")
        return metric.endswith("accuracy")
    return higher_is_better


def _check(
    trials: int,
    epochs: int,
    schedules: int,
    workers: int,
    seed: int,
    learning_rates: tuple[float, float] | None,
    max_warmup: int | None,
    timeout_seconds: float,
) -> None:
    counts = {"trials": (trials, 1), "epochs": (epochs, 1), "schedules": (schedules, 1), "workers": (workers, 0)}
    counts |= {"seed": (seed, 0)} | ({} if max_warmup is None else {"max_warmup": (max_warmup, 0)})
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: give a whole number >= {least}.")
    if (max_warmup is not None and max_warmup >= epochs > 1) or (max_warmup or 0) > epochs:
        raise ValueError(f"max_warmup={max_warmup}: it is part of the epochs; give less than epochs={epochs}.")
    if learning_rates is not None:
        rates = tuple(learning_rates)
        if len(rates) != 2 or not all(isinstance(r, int | float) and math.isfinite(r) for r in rates):
            raise ValueError(f"learning_rates={learning_rates!r}: give the least and the largest, or None.")
        if not 0 < rates[0] <= rates[1]:
            raise ValueError(f"learning_rates={learning_rates!r}: give 0 < least <= largest.")
    if not 0 < timeout_seconds < math.inf:
        raise ValueError(f"timeout_seconds={timeout_seconds!r}: give a positive, finite number of seconds.")
