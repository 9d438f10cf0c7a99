"""A training run under way: what a step, a checkpoint and a callback need of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from horizonplan.algorithms import Algorithm, LayerParallel, Windows
from horizonplan.chain import Chain
from horizonplan.plan import Plan
from horizonplan.training.data import Stream
from horizonplan.training.log import Log
from horizonplan.training.step import Stepper
from horizonplan.training.thrift import reduced
from horizonplan.training.warmup import by_epoch
from horizonplan.training.watch import Watch


@dataclass
class Run:
    """The state of a run.

    Attributes:
        stepper: makes steps.
        methods: first epoch -> method.
        extra: the modules that methods train besides the model's.
        scheduler: of the learning rate.
        stream: the data.
        watch: measures.
        log: the log; of rank 0 only.
        callbacks: the user's.
        run_dir: the run's folder.
        plan: what is trained with.
        epoch: the present epoch, from 0.
        step: steps made.
        history: one dict a step: ``epoch``, ``step``, ``loss``.
        validations: one dict an epoch: ``epoch`` and its metrics.
        seconds: of each step of this process.
        thrift: how often the method has been made thriftier because memory ran out.
        faults: steps so far that were not finite.
        stop_reason: why to stop, once that is clear.
        metrics: the names of what validation measures; none without validation data.
        resumed: whether the run goes on from a checkpoint.
        saved: the last checkpoint in the run's folder.
        settings: what must be the same when the run is resumed.
    """

    stepper: Stepper
    methods: Mapping[int, Algorithm]
    extra: nn.ModuleList
    scheduler: Any
    stream: Stream
    watch: Watch
    log: Log
    callbacks: Sequence[Any] = ()
    run_dir: Path | None = None
    plan: Plan | None = None
    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    thrift: int = 0
    faults: int = 0
    stop_reason: str | None = None
    metrics: tuple[str, ...] = ()
    resumed: bool = False
    saved: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def chain(self) -> Chain:
        """The model as a chain."""
        return self.stepper.chain

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.chain.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser."""
        return self.stepper.optimizer

    @property
    def rank(self) -> int:
        """This process's number among those that train together."""
        return self.stepper.team.rank

    @property
    def peak_bytes(self) -> int:
        """The largest peak of a step that was measured."""
        return self.watch.peak_bytes

    @property
    def learning_rate(self) -> float:
        """That of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def algorithm(self) -> Algorithm:
        """The method of the present epoch, as thrifty as it had to become."""
        method = reduced(by_epoch(self.methods, self.epoch), self.chain.depth, self.thrift)
        assert method is not None
        return method

    @property
    def horizon(self) -> int | None:
        """Blocks of the longest window; ``None`` for methods without windows."""
        method = self.algorithm
        return method.schedule(self.chain.depth).longest if isinstance(method, Windows) else None

    def gather(self) -> None:
        """Let every process have all weights and states, where the processes share the layers."""
        method = self.algorithm
        if isinstance(method, LayerParallel):
            method.gather(self.chain, self.optimizer)

    def stop(self, reason: str) -> None:
        """End the training after the present step, with the end of its epoch."""
        self.stop_reason = reason

    def call(self, event: str, *values: Any) -> None:
        """Call a method of all callbacks that have it."""
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(self, *values)
