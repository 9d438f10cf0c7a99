"""What a trial is made with: a schedule, a learning rate, epochs of warm-up, what the user's function suggests."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
import torch
from optuna.trial import FixedTrial
from torch.optim import Optimizer

from horizonplan.rows import Row

Space = Callable[[Any], Mapping[str, Mapping[str, Any]]]
SCHEDULE, RATE, WARMUP = "schedule", "lr", "warmup"
PARTS = ("model", "optimizer", "train")
TRAIN_OPTIONS = (
    "accumulate",
    "compile",
    "fused",
    "max_grad_norm",
    "metrics",
    "precision",
    "scheduler",
    "scheduler_every",
)


@dataclass(frozen=True)
class Proposal:
    """What was suggested for a trial.

    Attributes:
        row: the schedule.
        optimizer: from parameters to an optimiser, with the suggested arguments.
        warmup: epochs of smaller horizons.
        model_arguments: for the model's factory.
        train_arguments: for :func:`horizonplan.train`.
    """

    row: Row
    optimizer: Callable[[Any], Optimizer]
    warmup: int
    model_arguments: Mapping[str, Any]
    train_arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Proposals:
    """What trials choose from.

    Attributes:
        rows: schedules by name.
        optimizer: ``callable(params, lr=...) -> Optimizer``.
        rates: least and largest learning rate; ``None``: not tuned.
        warmup: the most epochs of warm-up.
        space: the user's function, see :func:`horizonplan.tune_horizon`.
        factory: whether the model is made by a function, which can take arguments.
    """

    rows: Mapping[str, Row]
    optimizer: Callable[..., Optimizer]
    rates: tuple[float, float] | None
    warmup: int
    space: Space | None
    factory: bool

    def suggest(self, trial: optuna.Trial | FixedTrial) -> Proposal:
        """Have a trial's parameters drawn (or, for a :class:`optuna.trial.FixedTrial`, read off).

        Raises:
            ValueError: the user's function returns what is of no use, or takes a name of ours.
        """
        own = self._own(trial)
        warmup = trial.suggest_int(WARMUP, 0, self.warmup) if self.warmup else 0
        rate = {} if self.rates is None else {"lr": trial.suggest_float(RATE, *self.rates, log=True)}
        row = self.rows[trial.suggest_categorical(SCHEDULE, list(self.rows))]
        optimizer = partial(self.optimizer, **rate, **own["optimizer"])
        return Proposal(row, optimizer, warmup, own["model"], own["train"])

    def first(self) -> list[dict[str, Any]]:
        """The parameters of the trials to begin with: each schedule at the middle rate, the plan's own first."""
        rate = {} if self.rates is None else {RATE: self.middle_rate}
        warmup = {WARMUP: 0} if self.warmup else {}
        return [{SCHEDULE: name, **rate, **warmup} for name in self.rows]

    @property
    def middle_rate(self) -> float:
        """The geometric mean of the least and the largest learning rate."""
        assert self.rates is not None
        return math.sqrt(self.rates[0] * self.rates[1])

    def plain_optimizer(self) -> Callable[[Any], Optimizer]:
        """The optimiser of the first trials, to plan with."""
        return self.optimizer if self.rates is None else partial(self.optimizer, lr=self.middle_rate)

    def _own(self, trial: optuna.Trial | FixedTrial) -> dict[str, dict[str, Any]]:
        """The user's part."""
        if self.space is None:
            return {part: {} for part in PARTS}
        found = self.space(trial)
        taken = {SCHEDULE, *([] if self.rates is None else [RATE]), *([WARMUP] if self.warmup else [])}
        if isinstance(trial, optuna.Trial) and (both := sorted(taken & trial.params.keys())):
            raise ValueError(f"space: it suggests {both[0]!r}, which the tuner does; take another name.")
        if not isinstance(found, Mapping) or not all(isinstance(v, Mapping) for v in found.values()):
            raise ValueError(f"space returned {found!r}: let it return a dict of dicts for {', '.join(PARTS)}.")
        if unknown := [name for name in found if name not in PARTS]:
            raise ValueError(f"space returned {unknown[0]!r}: the parts are {', '.join(PARTS)}.")
        if found.get("model") and not self.factory:
            raise ValueError("space returned arguments for the model: give a function that makes one, not a module.")
        check_options("space", found.get("train", {}))
        if self.rates is not None and RATE in found.get("optimizer", {}):
            raise ValueError("space: it gives the optimizer an lr, which the tuner does; set learning_rates=None.")
        return {part: dict(found.get(part, {})) for part in PARTS}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """See that they are arguments of :func:`horizonplan.train` that the tuner leaves to the user.

    Raises:
        ValueError: one is not.
    """
    for option in options:
        if option not in TRAIN_OPTIONS:
            raise ValueError(f"{name}: {option!r} is none of what training is given here, {', '.join(TRAIN_OPTIONS)}.")


def check_optimizer(optimizer: object, tuned: bool) -> Callable[..., Optimizer]:
    """The optimiser's maker.

    Raises:
        ValueError: it is an optimiser that was made already, or takes no learning rate.
    """
    if optimizer is None:
        return torch.optim.AdamW
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        raise ValueError(f"optimizer={optimizer!r}: give a class or function: (params, lr=...) -> Optimizer.")
    try:
        inspect.signature(optimizer).bind([], **({"lr": 1.0} if tuned else {}))
    except TypeError as error:
        raise ValueError(
            f"optimizer: it cannot be called as optimizer(params{', lr=...' if tuned else ''}) ({error}); let it take "
            "lr, or set learning_rates=None."
        ) from error
    return optimizer
