"""What a trial does, in a process of its own or in this one: make the model, see that it fits, train, measure."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from horizonplan.algorithms import Fixed, Windows
from horizonplan.batch import as_loader, take
from horizonplan.chain.calls import rng_devices
from horizonplan.devices import parse_device
from horizonplan.fits import fits
from horizonplan.plan import Plan
from horizonplan.schedule import Schedule
from horizonplan.training import Callback, PlanWarning, Result, Run, train
from horizonplan.training.random_state import seeded_all
from horizonplan.training.warmup import warm_up
from horizonplan.units import format_bytes

Model = nn.Module | Callable[..., nn.Module]


@dataclass(frozen=True)
class Work:
    """A trial as it travels to its process; all of it can be pickled.

    Attributes:
        model: a module, of which each trial trains a copy, or what makes one.
        data: to train on, or what makes it.
        val_data: to validate on, or what makes it.
        plan: what to train with.
        optimizer: from parameters to an optimiser.
        model_arguments: for the factory.
        options: further arguments of :func:`horizonplan.train`.
        metric: a name in the validation's metrics.
        higher_is_better: of that metric.
        bars: after each epoch, what the metric must not be worse than; ``None``: anything goes.
        limit_bytes: what a step may need.
        seed: of the weights and of the training.
        threads: of torch; ``None``: as they are.
    """

    model: Model
    data: Any
    val_data: Any
    plan: Plan
    optimizer: Callable[[Any], Optimizer]
    metric: str
    higher_is_better: bool
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    bars: Sequence[float | None] = ()
    limit_bytes: int | None = None
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came of a trial, JSON-ready. The fields are those of :class:`horizonplan.tuner.Trial`."""

    state: str
    reason: str | None = None
    memory_bytes: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    validations: Sequence[Mapping[str, float]] = ()
    step_seconds: float | None = None
    seconds: float | None = None


def perform(work: Work) -> Found:
    """Make the trial.

    Raises:
        Exception: what making the model or training it raises; that a loss is not finite is no error here.
    """
    if work.threads is not None:
        torch.set_num_threads(work.threads)
    data, val_data = made(work.data), made(work.val_data)
    with _own_generator(data), _own_generator(val_data), seeded_all(work.seed, _cuda(work)), warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)  # the trial tells what it needed
        model = built(work.model, work.model_arguments)
        if (misfit := _misfit(work, model, data)) is not None:
            return misfit
        bar = _Bar(work.metric, work.higher_is_better, work.bars)
        growing = bool(work.options.get("warmup"))  # from one epoch to the next, so the first step of each is looked at
        every = _steps(data, work.options.get("accumulate", 1)) if growing else None
        try:
            result = train(
                model,
                data,
                plan=work.plan,
                val_data=val_data,
                optimizer=work.optimizer,
                callbacks=[bar],
                seed=work.seed,
                oom_retries=0,  # a thriftier schedule is another trial
                progress=False,
                watch_every=100 if every is None else every,
                **work.options,
            )
        except FloatingPointError as error:
            return Found(state="pruned", reason=f"diverged: {error}", validations=bar.seen)
    return _found(work, result, bar)


def made(data: Any) -> Any:
    """The data, or what the function given for them returns."""
    return data() if callable(data) else data


def built(model: Model, arguments: Mapping[str, Any]) -> nn.Module:
    """A copy of the module, or what the factory makes.

    Raises:
        ValueError: the factory returns no module.
    """
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    found = model(**arguments)
    if not isinstance(found, nn.Module):
        raise ValueError(f"model: the factory returned a {type(found).__name__}; let it return an nn.Module.")
    return found


def _misfit(work: Work, model: nn.Module, data: Any) -> Found | None:
    """The end of a trial that is predicted not to fit."""
    if work.limit_bytes is None:
        return None
    plan, options = work.plan, work.options
    how = {name: options[name] for name in ("loss", "compute_loss", "projection") if name in options}
    needed = 0
    for schedule in _unweighed(work):
        assert schedule.pair is not None
        verdict = fits(
            model,
            take(as_loader(data), 1)[0],
            work.limit_bytes,
            schedule.pair[0],
            stride=schedule.pair[1],
            recompute=schedule.recompute,
            optimizer=work.optimizer,
            blocks=list(plan.blocks) if isinstance(plan.blocks, tuple) else plan.blocks,
            **how,
        )
        needed = max(needed, verdict.predicted_bytes + (verdict.margin_bytes if _cuda(work, model) else 0))
    if needed <= work.limit_bytes:
        return None
    words = f"predicted to need {format_bytes(needed)} of {format_bytes(work.limit_bytes)}, so it was not trained"
    return Found(state="pruned", reason=words, memory_bytes=needed)


def _unweighed(work: Work) -> list[Schedule]:
    """The trial's schedules whose memory the plan has not weighed: a warm-up's, and all for a model of its own."""
    final = work.plan.schedule
    smaller = warm_up(Fixed(final), work.plan.depth, work.options.get("warmup", 0)).values()
    found = [method.schedule(work.plan.depth) for method in smaller if isinstance(method, Windows)]
    return [schedule for schedule in found if work.model_arguments or schedule != final]


def _steps(data: Any, accumulate: int) -> int | None:
    """Steps of an epoch, if that is known before."""
    try:
        return -(-len(as_loader(data)) // accumulate)  # type: ignore[arg-type]
    except TypeError:
        return None


def _found(work: Work, result: Result, bar: _Bar) -> Found:
    metrics = result.val_metrics
    kept: dict[str, Any] = {
        "memory_bytes": result.peak_bytes or work.plan.row.memory_bytes,  # compiled blocks are not tracked
        "metrics": metrics,
        "validations": bar.seen,
        "step_seconds": result.step_seconds,
        "seconds": result.seconds,
    }
    if not math.isfinite(metrics[work.metric]):
        return Found(state="pruned", reason=f"diverged: {work.metric} is {metrics[work.metric]}")
    if bar.missed is not None:
        return Found(state="pruned", reason=bar.missed, **kept)
    return Found(state="finished", **kept)


class _Bar(Callback):
    """Ends a run whose metric is worse, after an epoch that is not the last, than half of the trials before it."""

    def __init__(self, metric: str, higher_is_better: bool, bars: Sequence[float | None]) -> None:
        self.metric, self.sign, self.bars = metric, 1.0 if higher_is_better else -1.0, bars
        self.seen: list[dict[str, float]] = []
        self.missed: str | None = None

    def on_epoch_end(self, run: Run, epoch: Mapping[str, Any]) -> None:
        """Compare."""
        self.seen.append({name.removeprefix("val_"): v for name, v in epoch.items() if name.startswith("val_")})
        bar = self.bars[epoch["epoch"]] if epoch["epoch"] < len(self.bars) else None
        value = self.seen[-1][self.metric]
        if bar is not None and not self.sign * value >= self.sign * bar:
            words = f"after epoch {epoch['epoch']}, {self.metric} {value:.4g} is worse than {bar:.4g}"
            self.missed = f"{words}, the median of trials with schedules as cheap"
            run.stop(self.missed)


def _cuda(work: Work, model: nn.Module | None = None) -> list[int]:
    """The CUDA devices a trial draws on."""
    given = work.options.get("device")
    if given is not None and parse_device(given) is None:
        device = torch.device(given)
        return [device.index or 0] if device.type == "cuda" else []
    known = model if model is not None else work.model
    return list(rng_devices(known)) if isinstance(known, nn.Module) else []


@contextmanager
def _own_generator(loader: Any) -> Iterator[None]:
    """A loader's own generator brought back, so that each trial in this process sees the same order."""
    own = getattr(loader, "generator", None)
    state = None if own is None else own.get_state()
    try:
        yield
    finally:
        if own is not None:
            own.set_state(state)
