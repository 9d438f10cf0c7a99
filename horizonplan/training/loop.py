"""The loop over epochs and steps: what is done when, and what is done when a step fails."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from horizonplan.algorithms import Algorithm, GradientMethod
from horizonplan.batch import ComputeLoss
from horizonplan.probes.memory import attempt
from horizonplan.training import state
from horizonplan.training.data import Turn
from horizonplan.training.evaluate import Metric, evaluate
from horizonplan.training.precision import autocast
from horizonplan.training.progress import Reporter
from horizonplan.training.run import Run
from horizonplan.training.schedules import DecayOnGrowth
from horizonplan.training.signals import Asked, Terminated
from horizonplan.training.thrift import reduced
from horizonplan.training.undo import Undo


class TrainingWarning(UserWarning):
    """A training run changed its course."""


@dataclass
class Loop:
    """Takes a run from where it is to its end.

    Attributes:
        run: the run.
        compute: ``(model, batch) -> loss``, for validation.
        epochs: passes over the data.
        val_data: batches to validate on.
        metrics: of the validation.
        save_every: steps between checkpoints; ``None``: one after each epoch.
        scheduler_every: ``"epoch"`` or ``"step"``.
        nonfinite: ``"raise"``, ``"skip"`` or ``"rollback"``.
        max_nonfinite: how many steps may be not finite.
        oom_retries: how often the method may be made thriftier.
        undo: takes back what a failed step did.
        asked: whether to end.
        report: shows progress.
    """

    run: Run
    compute: ComputeLoss
    epochs: int
    val_data: Iterable[Any] | None
    metrics: Mapping[str, Metric] | None
    save_every: int | None
    scheduler_every: str
    nonfinite: str
    max_nonfinite: int
    oom_retries: int
    undo: Undo
    asked: Asked
    report: Reporter
    spent: float = 0.0

    def train(self) -> None:
        """Run to the end."""
        run = self.run
        run.call("on_train_begin")
        while run.epoch < self.epochs and run.stop_reason is None:
            self._steps()
            self._end_epoch()
        run.stepper.clear()
        run.call("on_train_end")

    def _steps(self) -> None:
        run, taken = self.run, 0
        started = time.perf_counter()
        method = run.algorithm
        run.log.event("epoch_begin", epoch=run.epoch, algorithm=str(method), horizon=run.horizon)
        batches = run.stream.batches(run.epoch) if run.stream.epoch == run.epoch else iter(())  # saved at its very end
        while run.stop_reason is None and (turns := list(islice(batches, run.stepper.accumulate))):
            taken += 1
            self._step(turns)
            self.report.step(run)
            if self._to_end():
                state.save(run)
                run.log.event("terminated", step=run.step)
                raise Terminated(f"SIGTERM: {run.step} steps are made and saved; go on with resume=True.")
            if self.save_every is not None and run.step % self.save_every == 0:
                state.save(run)
        self.spent += time.perf_counter() - started
        if not taken and not any(entry["epoch"] == run.epoch for entry in run.history[-1:]):
            raise ValueError("data has no batches: give at least one.")

    def _step(self, turns: list[Turn]) -> None:
        run = self.run
        run.watch.cosine(run.step, run.algorithm, turns[0].batch, autocast(run.stepper.precision, run.stepper.place))
        self.undo.note()
        loss, wrong = self._made(turns)
        if wrong is not None:
            self._fault(wrong)
        entry = {"epoch": run.epoch, "step": run.step, "loss": loss}
        run.history.append(entry)
        run.log.event("step", **entry, seconds=run.seconds[-1], lr=run.learning_rate, updated=run.stepper.updated)
        if self.scheduler_every == "step" and run.scheduler is not None and run.stepper.updated:
            run.scheduler.step()
        run.step += 1
        run.call("on_step_end", entry)

    def _made(self, turns: list[Turn]) -> tuple[float, str | None]:
        """Make the step, in thriftier ways if memory runs out."""
        run = self.run
        cuda = run.stepper.place.type == "cuda"
        while True:
            method = run.algorithm
            if cuda:
                torch.cuda.synchronize(run.stepper.place)
            start = time.perf_counter()
            found, message = attempt(lambda: self._watched(method, turns), run.stepper.place)  # noqa: B023
            if found is not None:
                run.seconds.append(time.perf_counter() - start)
                return found
            self._thriftier(method, str(message))

    def _watched(self, method: Algorithm, turns: list[Turn]) -> tuple[float, str | None]:
        run = self.run
        updated = False

        def make() -> tuple[float, str | None]:
            nonlocal updated
            loss = run.stepper.gradient(method, turns)
            updated = True
            return loss.item(), run.stepper.update(method, loss)

        try:
            return run.watch.measured(run.step, make, run.stepper.clear, run.optimizer, turns[0].batch)
        except RuntimeError as error:
            if updated or run.stepper.fuse or not isinstance(method, GradientMethod):
                raise RuntimeError(f"step {run.step}: {error} (in an update, which cannot be taken back)") from error
            raise

    def _thriftier(self, method: Algorithm, message: str) -> None:
        """After running out of memory: take the step back, and go on with recompute or half the horizon."""
        run = self.run
        run.stepper.clear()
        self.undo.restore()
        next_method = reduced(method, run.chain.depth, 1)
        if run.thrift >= self.oom_retries or next_method is None or run.stepper.team.world > 1:
            raise torch.OutOfMemoryError(message)
        run.thrift += 1
        run.watch.plan = None
        run.log.event(
            "out_of_memory", step=run.step, message=message, algorithm=str(run.algorithm), horizon=run.horizon
        )
        warnings.warn(
            f"step {run.step} ran out of memory with {method}; going on with {run.algorithm}.", TrainingWarning, 2
        )

    def _fault(self, wrong: str) -> None:
        """A step whose loss or gradient is not finite: raise, skip it, or go back to the last checkpoint's weights."""
        run = self.run
        run.stepper.clear()
        self.undo.restore(rng=False)
        where = f"epoch {run.epoch}, step {run.step}: {wrong}"
        run.log.event("nonfinite", step=run.step, what=wrong, policy=self.nonfinite)
        run.faults += 1
        if self.nonfinite == "raise":
            done = "some weights were updated (fused)" if run.stepper.fuse else "the weights were not updated"
            raise FloatingPointError(f"{where}: check the data, lower the learning rate or clip; {done}.")
        if run.faults > self.max_nonfinite:
            raise FloatingPointError(
                f"{where}, which is fault {run.faults} with max_nonfinite={self.max_nonfinite}: check the data, lower "
                "the learning rate or clip."
            )
        if self.nonfinite == "rollback":
            assert run.run_dir is not None
            found = state.find(run.run_dir)
            if found is None:
                raise FloatingPointError(f"{where}: there is no checkpoint yet to roll back to; set save_every lower.")
            state.restore_weights(run, found)
            run.log.event("rollback", step=run.step, to=found.step)
        warnings.warn(f"{where}; {self.nonfinite}.", TrainingWarning, 2)

    def _to_end(self) -> bool:
        team = self.run.stepper.team
        return team.sum(self.asked.to_end)[0] > 0 if team.world > 1 else self.asked.to_end

    def _end_epoch(self) -> None:
        run = self.run
        own = [entry["loss"] for entry in run.history if entry["epoch"] == run.epoch]
        epoch: dict[str, Any] = {"epoch": run.epoch, "step": run.step, "loss": mean(own), "lr": run.learning_rate}
        if self.val_data is not None:
            stepper = run.stepper
            with autocast(stepper.precision, stepper.place):
                metrics = evaluate(run.model, self.val_data, self.compute, stepper.place, self.metrics, stepper.team)
            run.validations.append({"epoch": run.epoch, **metrics})
            run.log.event("validation", **run.validations[-1])
            epoch |= {f"val_{name}": value for name, value in metrics.items()}
        if run.scheduler is not None and self.scheduler_every == "epoch":
            _schedule(run.scheduler, epoch)
        run.log.event("epoch", **epoch)
        self.report.epoch(run, epoch)
        run.call("on_epoch_end", epoch)
        run.epoch += 1
        if run.run_dir is not None and (self.save_every is None or self._last()):
            state.save(run)

    def _last(self) -> bool:
        return self.run.epoch >= self.epochs or self.run.stop_reason is not None


def mean(losses: list[float]) -> float:
    """The mean of the losses that are finite (skipped steps have others); NaN if none is."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return statistics.fmean(finite) if finite else math.nan


def _schedule(scheduler: Any, epoch: Mapping[str, Any]) -> None:
    if isinstance(scheduler, DecayOnGrowth):
        scheduler.step(epoch["loss"])
    elif isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(epoch.get("val_loss", epoch["loss"]))
    else:
        scheduler.step()
