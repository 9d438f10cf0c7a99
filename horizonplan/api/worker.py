"""Runs jobs: takes one by lease, measures it in a process of its own, stores what came of it, takes the next.

``horizonplan serve`` keeps workers beside the server (``beside``). Elsewhere, ``python -m horizonplan.api.worker`` runs
one, with the settings of the environment; it stops at SIGTERM or Ctrl-C, and hands its job back to the queue.

A worker may die at any time: the job's process ends with it, and another worker takes the job when the lease is over.
A database that is locked or away is waited for.
"""

import json
import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from horizonplan.api import queue
from horizonplan.api.database import Database, is_full, now
from horizonplan.api.queue import Claim, Failure
from horizonplan.api.sandbox import PROGRAM, Sandbox, openings
from horizonplan.api.settings import Settings
from horizonplan.plan import Plan
from horizonplan.units import format_seconds

logger = logging.getLogger("horizonplan.api")

_AWAY = (OperationalError, InterfaceError, PoolTimeoutError)  # a database that is locked, full or cannot be reached
_TICK_SECONDS = 0.1
_BEATS = 3  # in a lease
_DISK_FULL = Failure("disk-full", "the disk of the database is full, and the plan could not be stored")

Outcome = Plan | Failure | Literal["cancel", "lost", "stop"]


class Worker:
    """One worker, which runs one job at a time.

    Args:
        database: where the queue is.
        settings: limits and times.
        program: what a job's process runs.
    """

    def __init__(self, database: Database, settings: Settings, program: Path = PROGRAM) -> None:
        self.database, self.settings, self.program = database, settings.jobs, program
        self.name = f"{uuid.uuid4().hex[:12]}:{socket.gethostname()[:30]}:{os.getpid()}"
        self._beat_at = 0.0

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop."""
        if (open_to := openings()) is not None:
            logger.warning("worker %s: this kernel has no Landlock for it, so jobs may %s", self.name, open_to)
        while not stop.is_set():
            try:
                self._beat()
                worked = self.work(stop)
            except _AWAY as error:
                logger.warning("worker %s: the database is busy or away: %s", self.name, error)
                worked = False
            except Exception:  # its job's lease runs out, and the job is tried again so often as jobs are
                logger.exception("worker %s", self.name)
                worked = False
            if not worked:
                stop.wait(self.settings.poll_seconds)
        self._try(lambda: self._written(queue.leave, self.name))

    def work(self, stop: threading.Event) -> bool:
        """Run one job, if there is one."""
        lease = self.settings.lease_seconds
        with self.database.read() as connection:
            if not queue.has_work(connection, lease, now()):
                return False
        with self.database.write() as connection:
            queue.rescue(connection, self.settings.requeues, lease, now())
            mine = queue.claim(connection, self.name, lease, now())
        if mine is None:
            return False
        logger.info("job %s: attempt %d", mine.job_id, mine.attempt)
        told: list[dict[str, Any]] = []
        outcome = self._run(mine, stop, told)
        self._settle(mine, outcome, told, stop)
        return True

    def _run(self, mine: Claim, stop: threading.Event, told: list[dict[str, Any]]) -> Outcome:
        """What comes of a job. Progress that could not be stored yet is left in ``told``."""
        try:
            with Sandbox(mine.request, self.settings, self.program) as sandbox:
                outcome = self._follow(sandbox, mine, stop, told)
                logger.debug("job %s printed: %s", mine.job_id, sandbox.output)
                return outcome
        except (OSError, LookupError) as error:
            return Failure("fault", f"the job's process could not be started ({type(error).__name__}: {error})")

    def _follow(self, sandbox: Sandbox, mine: Claim, stop: threading.Event, told: list[dict[str, Any]]) -> Outcome:
        look_at = 0.0
        outcome: Plan | Failure | None = None
        while True:
            try:
                records, over = sandbox.read(_TICK_SECONDS)
                for record in records:
                    if "progress" in record:
                        told.append(_progress(record))
                    else:
                        outcome = _outcome(record)
            except (ValueError, KeyError, TypeError) as error:
                return Failure("fault", f"the job's process answered with something that is no result ({error})")
            if told:
                self._try(lambda: self._tell(mine, told))
            if over:
                return sandbox.why() if outcome is None else outcome
            if stop.is_set():
                return "stop"
            if sandbox.late:
                limit = format_seconds(self.settings.seconds)
                return Failure("timeout", f"the job took longer than {limit}; ask for something smaller")
            if monotonic() >= look_at:
                look_at = monotonic() + self.settings.poll_seconds
                if (found := self._look(mine)) is not None:
                    return found

    def _look(self, mine: Claim) -> Literal["cancel", "lost"] | None:
        """Keep the lease, and see whether the job is to be ended."""
        self._try(lambda: self._beat(mine))
        standing: list[Literal["held", "cancel", "lost"]] = []

        def look() -> None:
            with self.database.read() as connection:
                standing.append(queue.standing(connection, mine))

        self._try(look)
        return standing[0] if standing and standing[0] != "held" else None

    def _settle(self, mine: Claim, outcome: Outcome, told: list[dict[str, Any]], stop: threading.Event) -> None:
        """Write down how a job ended, whatever the database needs for that: time, or room."""
        while True:
            try:
                self._tell(mine, told)
                held = self._end(mine, outcome)
            except _AWAY as error:
                if isinstance(error, OperationalError) and is_full(error):
                    told.clear()
                    outcome = _DISK_FULL if isinstance(outcome, Plan) else outcome
                logger.warning("job %s: waiting to write how it ended: %s", mine.job_id, error)
                if stop.wait(self.settings.poll_seconds):
                    return  # the lease runs out, and the next worker takes the job
            else:
                how = "succeeded" if isinstance(outcome, Plan) else outcome
                logger.info("job %s: %s", mine.job_id, how if held else "lost to another worker")
                return

    def _end(self, mine: Claim, outcome: Outcome) -> bool:
        with self.database.write() as connection:
            match outcome:
                case Plan():
                    return queue.succeed(connection, mine, outcome, now())
                case Failure():
                    return queue.fail(connection, mine, outcome, now())
                case "cancel":
                    return queue.cancelled(connection, mine, now())
                case "stop":
                    return queue.hand_back(connection, mine, now())
                case "lost":
                    return False

    def _tell(self, mine: Claim, told: list[dict[str, Any]]) -> None:
        if told:
            with self.database.write() as connection:
                for data in told:
                    queue.progress(connection, mine, data, now())
            told.clear()

    def _beat(self, mine: Claim | None = None) -> None:
        """Say that this worker lives, and keep its job's lease, a few times in a lease."""
        if monotonic() < self._beat_at:
            return
        with self.database.write() as connection:
            queue.seen(connection, self.name, now())
            if mine is not None:
                queue.renew(connection, mine, self.settings.lease_seconds, now())
        self._beat_at = monotonic() + self.settings.lease_seconds / _BEATS

    def _written(self, function: Callable[..., Any], *args: Any) -> None:
        with self.database.write() as connection:
            function(connection, *args)

    def _try(self, function: Callable[[], Any]) -> None:
        """Do something with the database, if that goes now; it is tried again anyway."""
        try:
            function()
        except _AWAY as error:
            logger.warning("worker %s: the database is busy or away: %s", self.name, error)


def check(database: Database, settings: Settings) -> str | None:
    """A complaint of /readyz when no worker has been seen for a lease."""
    with database.read() as connection:
        last = queue.last_seen(connection)
    seconds = settings.jobs.lease_seconds
    if last is not None and abs(now() - last) <= seconds:  # seen later than now: the clock was set back
        return None
    return f"no worker has been seen for {format_seconds(seconds)}"


def _progress(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of how far a job is."""
    said = record["progress"]
    if not isinstance(said, dict):
        raise TypeError(f"progress is a {type(said).__name__}")
    json.dumps(said, allow_nan=False)  # as it will be stored
    return said


def _outcome(record: dict[str, Any]) -> Plan | Failure:
    """What a record says a job came to."""
    if "error" in record:
        return Failure(str(record["error"]["kind"]), str(record["error"]["message"]))
    return Plan.from_dict(record["plan"])


def main() -> None:
    """Run a worker until a signal, or, where standard input has the settings, until the server beside it is gone."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if sys.argv[1:] == ["--beside"]:
        settings = Settings.model_validate_json(sys.stdin.readline())

        def follow() -> None:
            sys.stdin.read()
            stop.set()

        threading.Thread(target=follow, daemon=True).start()
    else:
        settings = Settings()
    database = Database(settings.database_url, settings.busy_seconds)
    database.upgrade()
    try:
        Worker(database, settings).run(stop)
    finally:
        database.close()


if __name__ == "__main__":
    main()
