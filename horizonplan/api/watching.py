"""Wakes the streams that follow jobs.

However many they are, one look into the database serves all, and between two looks no stream holds a connection.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.concurrency import run_in_threadpool

from horizonplan.api import queue
from horizonplan.api.database import Database

logger = logging.getLogger("horizonplan.api")

_AT_ONCE = 500  # jobs in one query


class Watcher:
    """Looks for new events of the jobs that somebody follows.

    Args:
        database: where the events are.
        stopping: set when the server stops, which wakes all.
        seconds: between two looks.
    """

    def __init__(self, database: Database, stopping: asyncio.Event, seconds: float) -> None:
        self._database, self._stopping, self._seconds = database, stopping, seconds
        self._bells: dict[str, set[asyncio.Event]] = {}
        self._latest: dict[str, int] = {}
        self._looking: asyncio.Task[None] | None = None

    @contextmanager
    def watch(self, job_id: str) -> Iterator[asyncio.Event]:
        """A bell that is rung when a job has new events, or the server stops."""
        bell = asyncio.Event()
        self._bells.setdefault(job_id, set()).add(bell)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            yield bell
        finally:
            bells = self._bells[job_id]
            bells.discard(bell)
            if not bells:
                del self._bells[job_id]
                self._latest.pop(job_id, None)

    async def _look(self) -> None:
        while self._bells and not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._seconds)
            try:
                latest = await run_in_threadpool(self._read, list(self._bells))
            except (DBAPIError, PoolTimeoutError) as error:
                logger.warning("streams of events: the database is busy or away: %s", error)
                continue
            for job_id, number in latest.items():
                if self._latest.get(job_id) != number and job_id in self._bells:
                    self._latest[job_id] = number
                    self._ring(job_id)
        for job_id in self._bells:
            self._ring(job_id)

    def _ring(self, job_id: str) -> None:
        for bell in self._bells[job_id]:
            bell.set()

    def _read(self, job_ids: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        with self._database.read() as connection:
            for begin in range(0, len(job_ids), _AT_ONCE):
                found |= queue.latest_events(connection, job_ids[begin : begin + _AT_ONCE])
        return found
