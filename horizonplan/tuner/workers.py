"""The processes that make trials: each trial has its own, and what ends one ends no study."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from statistics import median
from threading import Event, Thread
from time import sleep

import optuna
from optuna.trial import FrozenTrial, TrialState

from horizonplan.probes.isolated import CannotTravel, ChildFailed, IsolationError, isolated
from horizonplan.rows import Row
from horizonplan.tuner.ledger import FOUND, Ledger
from horizonplan.tuner.proposals import SCHEDULE, Proposal, Proposals
from horizonplan.tuner.setting import Setting
from horizonplan.tuner.work import Found, Work, perform

POLL_SECONDS = 0.2
PEERS = 3  # finished trials that a median is taken of, at least


@dataclass
class Workers:
    """Make the trials of a study.

    Attributes:
        ledger: where trials are taken from.
        proposals: what they choose from.
        setting: what they have in common.
        count: processes side by side; 0: in this process, one after another.
        prune: whether a trial may be ended early.
        timeout_seconds: for a trial.
        tell: called after each trial, with its number, proposal and what came of it.
    """

    ledger: Ledger
    proposals: Proposals
    setting: Setting
    count: int
    prune: bool
    timeout_seconds: float
    tell: Callable[[int, Proposal, Found], None]
    _stop: Event = field(default_factory=Event)

    def run(self) -> None:
        """Make trials until there are enough, and all are over, those of other processes included.

        Raises:
            ValueError: a trial cannot go to another process.
        """
        if self.count <= 1:
            self._work()
            return
        ended: SimpleQueue[BaseException | None] = SimpleQueue()

        def work() -> None:
            try:
                self._work()
                ended.put(None)
            except BaseException as error:
                ended.put(error)

        try:
            for _ in range(self.count):
                # Should this process be interrupted and end, daemons do not hold it up, and the trials end with it.
                Thread(target=work, daemon=True).start()
            for _ in range(self.count):
                if (error := ended.get()) is not None:
                    raise error
        finally:
            self._stop.set()

    def _work(self) -> None:
        while not self._stop.is_set():
            taken = self.ledger.take(self.proposals.suggest)
            if taken is not None:
                self._make(*taken)
            elif self.ledger.settled():
                return
            else:
                sleep(POLL_SECONDS)

    def _make(self, trial: optuna.Trial, proposal: Proposal) -> None:
        try:
            work = self.setting.work(proposal, self._bars(proposal.row))
            found = self._here(work) if self.count == 0 else self._elsewhere(work)
            values = self.setting.values(proposal, found) if found.state == "finished" else None
        except BaseException:
            self.ledger.put_back(trial)
            raise
        self.ledger.finish(trial, found, values)
        self.tell(trial.number, proposal, found)

    def _here(self, work: Work) -> Found:
        try:
            return perform(work)
        except Exception as error:
            return Found(state="failed", reason=_one_line(f"{type(error).__name__}: {error}"))

    def _elsewhere(self, work: Work) -> Found:
        try:
            return isolated(perform, work, timeout_seconds=self.timeout_seconds).value
        except CannotTravel as error:
            raise ValueError(_cannot_travel(work, error)) from error
        except ChildFailed as error:
            return Found(state="failed", reason=_one_line(str(error)))
        except IsolationError as error:
            return Found(state="failed", reason=_one_line(f"{type(error).__name__}: {error}"))

    def _bars(self, row: Row) -> list[float | None]:
        """What a trial with this schedule must not be worse than, by epoch.

        The median of finished trials whose schedules need no more memory and time: a cheap schedule may well be worse
        than dear ones and not be dominated, so it is not held against them.
        """
        if not self.prune:
            return []
        histories = [
            trial.user_attrs[FOUND]["validations"]
            for trial in self.ledger.begun()
            if trial.state == TrialState.COMPLETE and self._as_cheap(trial, row)
        ]
        if len(histories) < PEERS:
            return []
        return [median(epoch[self.setting.metric] for epoch in epochs) for epochs in zip(*histories, strict=True)][:-1]

    def _as_cheap(self, trial: FrozenTrial, row: Row) -> bool:
        other = self.proposals.rows[trial.params[SCHEDULE]]
        clocks = [one.step_seconds if one.step_seconds is not None else 0.0 for one in (other, row)]
        return other.memory_bytes <= row.memory_bytes and clocks[0] <= clocks[1]


def _cannot_travel(work: Work, error: CannotTravel) -> str:
    """Which argument it is."""
    for name in ("model", "data", "val_data", "optimizer", "options", "model_arguments"):
        try:
            pickle.dumps(getattr(work, name))
        except Exception as reason:
            return (
                f"{name}: it cannot go to a trial's process ({type(reason).__name__}: {reason}); define classes and "
                "functions at the top of a module, or set workers=0 to train in this process."
            )
    return f"{error}; or set workers=0 to train in this process."


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
