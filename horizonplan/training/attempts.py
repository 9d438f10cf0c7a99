"""One step, made in spite of what can go wrong in it: memory that runs out, a loss or gradient that is not finite."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import torch

from horizonplan.algorithms import Algorithm, GradientMethod
from horizonplan.probes.child import out_of_memory
from horizonplan.probes.memory import attempt
from horizonplan.training import state
from horizonplan.training.data import Turn
from horizonplan.training.options import Options
from horizonplan.training.run import Run
from horizonplan.training.thrift import reduced
from horizonplan.training.undo import Undo


class TrainingWarning(UserWarning):
    """A training run changed its course."""


@dataclass
class Attempts:
    """Makes steps.

    Attributes:
        run: the run.
        options: ``nonfinite``, ``max_nonfinite`` and ``oom_retries`` count here.
        undo: takes back what a failed step did.
    """

    run: Run
    options: Options
    undo: Undo

    def step(self, turns: list[Turn], shares: list[float]) -> float:
        """Make a step, in thriftier ways if memory runs out; returns its loss.

        Raises:
            torch.OutOfMemoryError: no thriftier way is left, or allowed.
            FloatingPointError: the loss or a gradient is not finite, and that is not to be borne.
        """
        run, place = self.run, self.run.stepper.place
        self.undo.note()
        while True:
            method = run.algorithm
            if place.type == "cuda":
                torch.cuda.synchronize(place)
            start = time.perf_counter()
            found, message = attempt(lambda: self._watched(method, turns, shares), place)  # noqa: B023
            if found is not None:
                break
            self._thriftier(method, str(message))
        run.seconds.append(time.perf_counter() - start)
        loss, wrong = found
        if wrong is not None:
            self._fault(method, wrong)
        return loss

    def _watched(self, method: Algorithm, turns: list[Turn], shares: list[float]) -> tuple[float, str | None]:
        run = self.run
        updates = run.stepper.fuse or not isinstance(method, GradientMethod)

        def make() -> tuple[float, str | None]:
            nonlocal updates
            loss = run.stepper.gradient(method, turns, shares)
            updates = True
            return loss.item(), run.stepper.update(method, loss)

        try:
            return run.watch.measured(run.step, make, run.stepper.clear, run.optimizer, turns[0].batch)
        except RuntimeError as error:
            if updates and out_of_memory(error):
                self.undo.restore()
                run.stepper.clear()
                words = "in an update, which cannot be taken back: give a smaller batch, horizon or optimizer"
                raise MemoryError(f"step {run.step}: {error} ({words}).") from error
            raise

    def _thriftier(self, method: Algorithm, message: str) -> None:
        """After running out of memory: take the step back, and go on with recompute or half the horizon."""
        run = self.run
        run.stepper.clear()
        self.undo.restore()
        thriftier = reduced(method, run.chain.depth, 1)
        if run.thrift >= self.options.oom_retries or thriftier is None or run.stepper.team.world > 1:
            raise torch.OutOfMemoryError(
                f"step {run.step}: {message}; give a smaller batch, a smaller horizon or recompute."
            )
        run.thrift += 1
        run.watch.plan = None
        run.log.event("out_of_memory", step=run.step, message=message, algorithm=str(thriftier), horizon=run.horizon)
        warnings.warn(
            f"step {run.step} ran out of memory with {method}; going on with {thriftier}.", TrainingWarning, 2
        )

    def _fault(self, method: Algorithm, wrong: str) -> None:
        """Raise, skip the step, or go back to the last checkpoint's weights."""
        run, policy = self.run, self.options.nonfinite
        run.stepper.clear()
        self.undo.restore(rng=False)
        where = f"epoch {run.epoch}, step {run.step}: {wrong}"
        run.log.event("nonfinite", step=run.step, what=wrong, policy=policy)
        run.faults += 1
        clip = " or clip" if "max_grad_norm" in method.honours else ""
        remedy = f"check the data, lower the learning rate{clip}"
        if policy == "raise":
            late = run.stepper.fuse or not isinstance(method, GradientMethod)
            done = "weights may have been updated before it was known" if late else "the weights were not updated"
            raise FloatingPointError(f"{where}: {remedy}; {done}.")
        if run.faults > self.options.max_nonfinite:
            bound = f"fault {run.faults} with max_nonfinite={self.options.max_nonfinite}"
            raise FloatingPointError(f"{where}, which is {bound}: {remedy}.")
        if policy == "rollback":
            assert run.run_dir is not None
            found = state.find(run.run_dir, run.stepper.team)
            assert found is not None
            state.restore_weights(run, found)
            run.log.event("rollback", step=run.step, to=found.step)
        if run.rank == 0:
            warnings.warn(f"{where}; {policy}.", TrainingWarning, 2)
