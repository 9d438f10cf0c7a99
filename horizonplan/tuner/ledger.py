"""The study as Optuna keeps it: who makes which trial, what came of it, and that there are as many as asked for.

Many processes, on many machines, may work on one ledger. Three rules make that safe:

- a trial's number is given by the storage, once. One that finds, when it begins, ``total`` others with smaller numbers
  begun is one too many, made in a race, and struck out (*void*) by who made it. What is queued has not begun.
- a trial whose owner has died is void, and the same parameters are queued again; from the third death on it has failed.
- what a sampler draws for a trial depends on the study's seed, the trial's number and the finished trials only, so
  that a study that was broken off goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from threading import Event, RLock, Thread
from time import monotonic, sleep
from typing import Any, Literal

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from horizonplan.tuner import owner
from horizonplan.tuner.storage import stable
from horizonplan.tuner.work import Found

RECORD, FOUND, VOID, OWNER, BEAT, DEATHS = "horizonplan", "found", "void", "owner", "beat", "deaths"
Direction = Literal["minimize", "maximize"]
MOST_DEATHS = 3
_CREATION_SECONDS = 10.0
STATES = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


def join(
    storage: BaseStorage,
    name: str,
    directions: Sequence[Direction],
    record: Callable[[], tuple[dict[str, Any], list[Any]]],
) -> tuple[optuna.Study, dict[str, Any]]:
    """The study of this name with its record, made if it is not there.

    Args:
        storage: where.
        name: which.
        directions: of its values.
        record: makes what is kept with a new study, and the parameters of its first trials.
    """
    known = _recorded(storage, name)
    if known is not None:
        return known
    made, queue = record()  # before there is a study, for it may take long, and fail
    try:
        study = optuna.create_study(storage=storage, study_name=name, directions=list(directions))
    except DuplicatedStudyError:  # somebody else was faster, or died between these lines
        until = monotonic() + _CREATION_SECONDS
        while monotonic() < until:
            if (known := _recorded(storage, name)) is not None:
                return known
            sleep(0.1)
        study = optuna.load_study(storage=storage, study_name=name)
    with stable():
        study.set_metric_names(made["values"])
    for params in queue:
        study.enqueue_trial(params, skip_if_exists=True)
    study.set_user_attr(RECORD, made)
    return study, made


def _recorded(storage: BaseStorage, name: str) -> tuple[optuna.Study, dict[str, Any]] | None:
    if name not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(storage=storage, study_name=name)
    record = study.user_attrs.get(RECORD)
    return None if record is None else (study, record)


@dataclass
class Ledger:
    """A study that trials are taken from.

    Attributes:
        study: Optuna's.
        total: trials that there are to be.
        seed: of the sampler.
        limit_bytes: what a trial may need; more is no error, but not feasible.
        me: this call, as an owner.
        running: the trials of this call that are under way, by number.
    """

    study: optuna.Study
    total: int
    seed: int
    limit_bytes: int | None
    me: str = field(default_factory=owner.begin)
    running: dict[int, optuna.Trial] = field(default_factory=dict)
    _lock: Any = field(default_factory=RLock)
    _over: Event = field(default_factory=Event)
    _watchman: owner.Watchman = field(default_factory=owner.Watchman)

    def __enter__(self) -> Ledger:
        Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        owner.end(self.me)

    def take(self, suggest: Callable[[optuna.Trial], Any]) -> tuple[optuna.Trial, Any] | None:
        """A trial to make, with what ``suggest`` says of it; ``None``: there is none to be had now."""
        with self._lock:
            self._bury()
            if len(self.begun()) >= self.total:
                return None
            trial = self.study.ask()
            trial.set_user_attr(OWNER, self.me)
            if sum(other.number < trial.number for other in self.begun()) >= self.total:
                self.put_back(trial)
                return None
            self.study.sampler = TPESampler(seed=(self.seed * 1_000_003 + trial.number) % 2**32)
            self.running[trial.number] = trial
            try:
                return trial, suggest(trial)
            except BaseException:
                self.put_back(trial)
                raise

    def finish(self, trial: optuna.Trial, found: Found, values: Sequence[float] | None) -> None:
        """Write down what came of a trial; nothing is done if others have taken this process for dead meanwhile."""
        with suppress(UpdateFinishedTrialError), self._lock:
            self.running.pop(trial.number, None)
            trial.set_user_attr(FOUND, asdict(found))
            if self.limit_bytes is not None and found.memory_bytes is not None:
                trial.set_constraint("memory", found.memory_bytes - self.limit_bytes)
            self.study.tell(trial, values, STATES[found.state], skip_if_finished=True)

    def put_back(self, trial: optuna.Trial) -> None:
        """Give up a trial that this process does not finish, for another to make."""
        with self._lock:
            self.running.pop(trial.number, None)
            asked = _asked(self.study._storage.get_trial(trial._trial_id))
            if self._strike(trial._trial_id, "given up") and asked:
                self.study.enqueue_trial(asked)

    def begun(self) -> list[FrozenTrial]:
        """All trials that have begun and are not void."""
        trials = self.study.get_trials(deepcopy=False)
        return [t for t in trials if t.state != TrialState.WAITING and VOID not in t.user_attrs]

    def settled(self) -> bool:
        """Whether there are enough trials, and all are over."""
        trials = self.begun()
        return len(trials) >= self.total and all(trial.state.is_finished() for trial in trials)

    def _bury(self) -> None:
        """Strike out the trials whose owners are dead, and queue them again."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            attrs = trial.user_attrs
            if attrs.get(OWNER) == self.me:
                continue
            gone = OWNER in attrs and owner.dead(attrs[OWNER])
            if not gone and not self._watchman.still(trial.number, attrs.get(BEAT)):
                continue
            deaths = attrs.get(DEATHS, 0) + 1
            if deaths >= MOST_DEATHS:
                self._fail(trial, f"the process died {deaths} times that was to make it")
            elif self._strike(trial._trial_id, "its process died"):
                self.study.enqueue_trial(_asked(trial), user_attrs={DEATHS: deaths})

    def _strike(self, trial_id: int, why: str) -> bool:
        """Make a trial void; whether this process was the one to do it."""
        return self._end(trial_id, VOID, why)

    def _fail(self, trial: FrozenTrial, why: str) -> None:
        self._end(trial._trial_id, FOUND, asdict(Found(state="failed", reason=why)))

    def _end(self, trial_id: int, name: str, value: str | Mapping[str, Any]) -> bool:
        storage = self.study._storage
        try:
            storage.set_trial_user_attr(trial_id, name, value)
            return storage.set_trial_state_values(trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return False

    def _beat(self) -> None:
        """Tell, as long as this call goes on, that it does."""
        beat = 0
        while not self._over.wait(owner.BEAT_SECONDS):
            beat += 1
            for trial in list(self.running.values()):
                with suppress(Exception):  # a database that is away may come back; a trial may just have ended
                    trial.set_user_attr(BEAT, beat)


def _asked(trial: FrozenTrial) -> dict[str, Any]:
    """What a trial was to be made with, as far as that was known."""
    return dict(trial.system_attrs.get("fixed_params", {})) | trial.params
