"""The loop over epochs and steps: what is done when."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from horizonplan.batch import ComputeLoss
from horizonplan.precision import autocast
from horizonplan.training import state
from horizonplan.training.attempts import Attempts
from horizonplan.training.data import Turn
from horizonplan.training.evaluate import evaluate
from horizonplan.training.options import Options
from horizonplan.training.progress import Reporter
from horizonplan.training.run import Run
from horizonplan.training.schedules import DecayOnGrowth
from horizonplan.training.shared import rounds
from horizonplan.training.signals import Asked, Terminated
from horizonplan.training.step import samples


@dataclass
class Loop:
    """Takes a run from where it is to its end.

    Attributes:
        run: the run.
        options: what the user asked for.
        compute: ``(model, batch) -> loss``, for validation.
        val_data: batches to validate on.
        attempts: makes steps.
        asked: whether to end.
        report: shows progress.
        spent: seconds in steps.
    """

    run: Run
    options: Options
    compute: ComputeLoss
    val_data: Iterable[Any] | None
    attempts: Attempts
    asked: Asked
    report: Reporter
    spent: float = 0.0

    def train(self) -> None:
        """Run to the end.

        A checkpoint is written before the end of an epoch (validation, schedule, callbacks), which a resumed run goes
        through again, so that an error there costs no epoch, and a callback may decide otherwise.
        """
        run = self.run
        run.call("on_train_begin")
        if run.run_dir is not None and (self.options.nonfinite == "rollback" or run.resumed) and run.saved is None:
            state.save(run)  # a place to go back to
        while run.epoch < self.options.epochs and not self._to_stop():
            taken = self._steps()
            last = run.epoch + 1 >= self.options.epochs
            if run.run_dir is not None and taken and (self.options.save_every is None or last or self._to_stop()):
                state.save(run)
            self._end_epoch()
        run.stepper.clear()
        run.call("on_train_end")

    def to_end(self) -> bool:
        """Whether SIGTERM has come to one of the processes."""
        return any(self.run.stepper.team.gather(self.asked.to_end))

    def _steps(self) -> int:
        """The steps of the present epoch that are left, or until a stop; returns how many there were."""
        run, before = self.run, self.run.step
        started = time.perf_counter()
        run.log.event("epoch_begin", epoch=run.epoch, algorithm=str(run.algorithm), horizon=run.horizon)
        layers = run.stepper.team.layers
        for turns, shares in rounds(run, self.asked, self._to_stop) if layers else self._rounds():
            self._step(turns, shares)
            self.report.step(run)
            if self.options.save_every is not None and run.step % self.options.save_every == 0:
                state.save(run)
        self.spent += time.perf_counter() - started
        if run.step == before and not any(entry["epoch"] == run.epoch for entry in run.history[-1:]):
            raise ValueError("data has no batches: give at least one.")
        return run.step - before

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
                raise Terminated(f"SIGTERM: {run.step} steps are made and saved; go on with resume=True (--resume).")
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
        run, scheduler = self.run, self.run.scheduler
        run.watch.cosine(run.step, run.algorithm, turns[0].batch, autocast(run.stepper.precision, run.stepper.place))
        loss = self.attempts.step(turns, shares)
        entry = {"epoch": run.epoch, "step": run.step, "loss": loss}
        run.history.append(entry)
        run.log.event("step", **entry, seconds=run.seconds[-1], lr=run.learning_rate, updated=run.stepper.updated)
        if scheduler is not None and self.options.scheduler_every == "step" and run.stepper.updated:
            scheduler.step()
        run.step += 1
        run.call("on_step_end", entry)

    def _end_epoch(self) -> None:
        run, stepper = self.run, self.run.stepper
        run.gather()
        own = [entry["loss"] for entry in run.history if entry["epoch"] == run.epoch]
        epoch: dict[str, Any] = {"epoch": run.epoch, "step": run.step, "loss": mean(own), "lr": run.learning_rate}
        stepper.team.alike([*run.model.buffers(), *run.extra.buffers()])
        if self.val_data is not None:
            with autocast(stepper.precision, stepper.place):
                metrics = evaluate(
                    run.model, self.val_data, self.compute, stepper.place, self.options.metrics, stepper.team
                )
            run.validations.append({"epoch": run.epoch, **metrics})
            run.log.event("validation", **run.validations[-1])
            epoch |= {f"val_{name}": value for name, value in metrics.items()}
        if run.scheduler is not None and self.options.scheduler_every == "epoch":
            _schedule(run.scheduler, epoch)
        run.log.event("epoch", **epoch)
        self.report.epoch(run, epoch)
        run.call("on_epoch_end", epoch)
        run.epoch += 1


def mean(losses: list[float]) -> float:
    """The mean of the losses that are finite (skipped steps have others); NaN if none is."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return statistics.fmean(finite) if finite else math.nan


def _schedule(scheduler: Any, epoch: Mapping[str, Any]) -> None:
    if isinstance(scheduler, DecayOnGrowth):
        if math.isfinite(epoch["loss"]):  # all its steps may have been skipped
            scheduler.step(epoch["loss"])
    elif isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(epoch.get("val_loss", epoch["loss"]))
    else:
        scheduler.step()
