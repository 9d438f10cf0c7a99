"""The loop over epochs and steps: what is done when, and what is done when a step fails."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
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
from horizonplan.training.step import samples
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
        while run.epoch < self.epochs and not self._to_stop():
            self._steps()
            self._end_epoch()
        run.stepper.clear()
        run.call("on_train_end")

    def _steps(self) -> None:
        run, taken = self.run, 0
        started = time.perf_counter()
        method = run.algorithm
        run.log.event("epoch_begin", epoch=run.epoch, algorithm=str(method), horizon=run.horizon)
        for turns, shares in self._rounds():
            taken += 1
            self._step(turns, shares)
            self.report.step(run)
            if self.save_every is not None and run.step % self.save_every == 0:
                state.save(run)
        self.spent += time.perf_counter() - started
        if not taken and not any(entry["epoch"] == run.epoch for entry in run.history[-1:]):
            raise ValueError("data has no batches: give at least one.")

    def _rounds(self) -> Iterator[tuple[list[Turn], list[float]]]:
        """This process's batches of each step and their shares, until the epoch's end or until some process stops.

        Before a step the processes tell each other what they have for it and whether one is to stop or to end.

        Raises:
            Terminated: SIGTERM has come to one of them, and the run is saved.
            ValueError: some have a batch left and some have none.
        """
        run, team = self.run, self.run.stepper.team
        batches = run.stream.batches(run.epoch) if run.stream.epoch == run.epoch else iter(())  # saved at its very end
        while True:
            here = run.stream.state_dict() if team.world > 1 else None  # another one may end, which has to be saved
            stops, ends = run.stop_reason is not None, self.asked.to_end
            turns = [] if stops or ends else list(islice(batches, run.stepper.accumulate))
            sizes, counts = samples(turns), [int(turn.counts) for turn in turns]
            said = team.each(stops, ends, len(turns), math.nan if sizes is None else sum(sizes), sum(counts))
            any_stops, any_ends, _, told, counted = (sum(column) for column in zip(*said, strict=True))
            if any_ends:
                state.save(run, here)
                run.log.event("terminated", step=run.step)
                raise Terminated(f"SIGTERM: {run.step} steps are made and saved; go on with resume=True.")
            if any_stops and self._to_stop():
                return
            if len({row[2] for row in said}) > 1:
                left = ", ".join(f"{row[2]:.0f}" for row in said)
                raise ValueError(f"data: for step {run.step} the processes have {left} batches; give all the same.")
            if not turns:
                return
            own, total = (counts, counted) if sizes is None or math.isnan(told) else (sizes, told)
            yield turns, [size / total for size in own]

    def _to_stop(self) -> bool:
        """Whether a callback on some process has asked to stop; all take over its reason."""
        run = self.run
        run.stop_reason = next((why for why in run.stepper.team.gather(run.stop_reason) if why is not None), None)
        return run.stop_reason is not None

    def _step(self, turns: list[Turn], shares: list[float]) -> None:
        run = self.run
        run.watch.cosine(run.step, run.algorithm, turns[0].batch, autocast(run.stepper.precision, run.stepper.place))
        self.undo.note()
        loss, wrong = self._made(turns, shares)
        if wrong is not None:
            self._fault(wrong)
        entry = {"epoch": run.epoch, "step": run.step, "loss": loss}
        run.history.append(entry)
        run.log.event("step", **entry, seconds=run.seconds[-1], lr=run.learning_rate, updated=run.stepper.updated)
        if self.scheduler_every == "step" and run.scheduler is not None and run.stepper.updated:
            run.scheduler.step()
        run.step += 1
        run.call("on_step_end", entry)

    def _made(self, turns: list[Turn], shares: list[float]) -> tuple[float, str | None]:
        """Make the step, in thriftier ways if memory runs out."""
        run = self.run
        cuda = run.stepper.place.type == "cuda"
        while True:
            method = run.algorithm
            if cuda:
                torch.cuda.synchronize(run.stepper.place)
            start = time.perf_counter()
            found, message = attempt(lambda: self._watched(method, turns, shares), run.stepper.place)  # noqa: B023
            if found is not None:
                run.seconds.append(time.perf_counter() - start)
                return found
            self._thriftier(method, str(message))

    def _watched(self, method: Algorithm, turns: list[Turn], shares: list[float]) -> tuple[float, str | None]:
        run = self.run
        updated = False

        def make() -> tuple[float, str | None]:
            nonlocal updated
            loss = run.stepper.gradient(method, turns, shares)
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
            found = state.find(run.run_dir, run.stepper.team)
            if found is None:
                raise FloatingPointError(f"{where}: there is no checkpoint yet to roll back to; set save_every lower.")
            state.restore_weights(run, found)
            run.log.event("rollback", step=run.step, to=found.step)
        if run.rank == 0:
            warnings.warn(f"{where}; {self.nonfinite}.", TrainingWarning, 2)

    def _end_epoch(self) -> None:
        run = self.run
        own = [entry["loss"] for entry in run.history if entry["epoch"] == run.epoch]
        epoch: dict[str, Any] = {"epoch": run.epoch, "step": run.step, "loss": mean(own), "lr": run.learning_rate}
        stepper = run.stepper
        stepper.team.alike([*run.model.buffers(), *run.extra.buffers()])
        if self.val_data is not None:
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
        stops = self._to_stop()
        if run.run_dir is not None and (self.save_every is None or stops or run.epoch >= self.epochs):
            state.save(run)


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
