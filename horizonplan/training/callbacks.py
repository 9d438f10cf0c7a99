"""What a user adds to a training run: an object whose methods are called as the run goes on.

A callback has any of the methods of :class:`Callback`; it need not be a subclass. One with a ``state_dict`` and a
``load_state_dict`` is saved in checkpoints and restored with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from horizonplan.training.run import Run

EVENTS = ("on_train_begin", "on_step_end", "on_epoch_end", "on_save", "on_train_end")


class Callback:
    """Called as a run goes on, on every process. All methods do nothing here.

    ``run`` is the :class:`horizonplan.training.Run`: ``run.model``, ``run.optimizer``, ``run.epoch``, ``run.step``,
    ``run.history``, ...; ``run.stop(reason)`` ends the training after the present step or epoch.
    """

    def on_train_begin(self, run: Run) -> None:
        """Before the first step, after a resume."""

    def on_step_end(self, run: Run, step: Mapping[str, Any]) -> None:
        """After each step; ``step`` is its entry in ``run.history``."""

    def on_epoch_end(self, run: Run, epoch: Mapping[str, Any]) -> None:
        """After each epoch and its validation: ``epoch``, mean training ``loss``, ``val_...`` metrics, ``lr``."""

    def on_save(self, run: Run, path: Path) -> None:
        """After a checkpoint was written (on the process that wrote it)."""

    def on_train_end(self, run: Run) -> None:
        """After the last step of a run that was not broken off."""

    def close(self) -> None:
        """At the end in any case, however the run ended."""


def check_callback(callback: object) -> None:
    """See that an object has one of the methods.

    Raises:
        ValueError: it has none of them, or is a class.
    """
    if isinstance(callback, type):
        raise ValueError(f"callbacks: {callback.__name__} is a class; give an object, {callback.__name__}(...).")
    if not any(callable(getattr(callback, event, None)) for event in EVENTS):
        raise ValueError(f"callbacks: {callback!r} has none of the methods {', '.join(EVENTS)}.")


class EarlyStopping(Callback):
    """Stop when a number of an epoch has not improved for ``patience`` epochs.

    Args:
        patience: epochs without an improvement that are borne.
        metric: a key of the epoch: ``"val_loss"``, ``"val_accuracy"``, ``"loss"``, ...
        higher_is_better: ``None``: True for names that end in "accuracy", False for those that end in "loss"; for
            others it has to be said.
        min_delta: what counts as an improvement.

    The weights are those of the last epoch, not of the best one.

    Raises:
        ValueError: a bad argument; in use, a metric that is not measured.
    """

    def __init__(
        self,
        patience: int = 3,
        metric: str = "val_loss",
        higher_is_better: bool | None = None,
        min_delta: float = 0.0,
    ) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience={patience!r}: give a whole number of epochs >= 1.")
        if not min_delta >= 0:
            raise ValueError(f"min_delta={min_delta!r}: give a number >= 0.")
        if higher_is_better is None:
            if not metric.endswith(("loss", "accuracy")):
                raise ValueError(f"metric={metric!r}: say whether higher_is_better, True or False.")
            higher_is_better = metric.endswith("accuracy")
        self.patience, self.metric, self.min_delta = patience, metric, min_delta
        self.sign = 1.0 if higher_is_better else -1.0
        self._begin()

    def _begin(self) -> None:
        self.best, self.waited = -math.inf, 0

    def __repr__(self) -> str:
        values = self.patience, self.metric, self.sign > 0, self.min_delta
        return f"EarlyStopping{values}"

    def on_train_begin(self, run: Run) -> None:
        """See that the metric will be measured; a resumed run that had been stopped is stopped again."""
        known = ["loss", *(f"val_{name}" for name in run.metrics)]
        if self.metric not in known:
            raise ValueError(f"metric={self.metric!r}: an epoch has {', '.join(known)}; val_... needs val_data.")
        if not run.resumed:
            self._begin()

    def on_epoch_end(self, run: Run, epoch: Mapping[str, Any]) -> None:
        """Compare with the best epoch so far."""
        value = self.sign * epoch[self.metric]
        if value > self.best + self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            run.stop(f"{self.metric} has not improved for {self.waited} epochs (best {self.sign * self.best:.6g})")

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and the epochs since."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s state."""
        self.best, self.waited = state["best"], state["waited"]


class TensorBoard(Callback):
    """Write losses, metrics, learning rate, peak memory and steps a second for TensorBoard.

    Args:
        folder: where; ``None``: ``tensorboard`` in the run's folder.

    Raises:
        ImportError: the package is not installed.
        ValueError: neither a folder nor a ``run_dir``.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard is not installed: pip install 'horizonplan[tensorboard]'.") from error
        self.folder, self.make = folder, SummaryWriter
        self.writer: Any = None

    def on_train_begin(self, run: Run) -> None:
        """Open the file; what a resumed run writes again replaces what was there."""
        folder = self.folder if self.folder is not None else run.run_dir and run.run_dir / "tensorboard"
        if folder is None:
            raise ValueError("TensorBoard: give it a folder, or the run a run_dir.")
        if run.rank == 0:
            self.writer = self.make(str(folder), purge_step=run.step)

    def on_step_end(self, run: Run, step: Mapping[str, Any]) -> None:
        """Loss, learning rate and seconds of a step."""
        numbers = {"loss": step["loss"], "lr": run.learning_rate, "steps_per_second": 1 / max(run.seconds[-1], 1e-9)}
        self._write({**numbers, "peak_bytes": run.peak_bytes, "horizon": run.horizon}, step["step"])

    def on_epoch_end(self, run: Run, epoch: Mapping[str, Any]) -> None:
        """Everything an epoch has."""
        self._write({f"epoch/{n}": v for n, v in epoch.items() if n not in ("epoch", "step")}, epoch["step"])

    def close(self) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()

    def _write(self, numbers: Mapping[str, float | None], step: int) -> None:
        for name, value in numbers.items():
            if self.writer is not None and value is not None:
                self.writer.add_scalar(name, value, step)
