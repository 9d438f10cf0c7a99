"""The queue of jobs: who works on what, and how each job ends, once.

    queued --claim--> running --succeed, fail, cancel--> succeeded, failed, cancelled
       ^                 |
       +-- lost worker --+   at most so many times

A claim is a lease: the job is its owner's until a time that the owner keeps putting off. Every change of a running job
asks for the owner in the same transaction, so one who has lost the lease changes nothing. Each change writes an event,
also in the same transaction. Each function is a part of a transaction of ``Database.write`` (those that only read, of
``Database.read``), and takes the time ``now``, in seconds since 1970. Workers' clocks must agree well within a lease; a
clock that is set may cost jobs an attempt, and nothing else: an owner is who the row says, whatever the time.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, and_, delete, exists, func, insert, or_, select, update

from horizonplan.api import plans
from horizonplan.api.database import job_events, jobs, workers
from horizonplan.plan import Plan

FINAL = frozenset({"succeeded", "failed", "cancelled"})
MOST_PROGRESS = 200  # events of a job
_FORGET_SECONDS = 86_400.0  # after which a worker is taken off the list


class QueueFull(Exception):
    """So many jobs are waiting that no more are taken."""


@dataclass(frozen=True)
class Claim:
    """A job that is somebody's for now.

    Attributes:
        job_id: the job.
        request: what it asks for, JSON.
        attempt: 1, 2, ...
        owner: names this claim, and no other.
    """

    job_id: str
    request: str
    attempt: int
    owner: str


@dataclass(frozen=True)
class Failure:
    """Why a job failed.

    Attributes:
        kind: ``"infeasible"``, ``"invalid"``, ``"out-of-memory"``, ``"timeout"``, ``"killed"``, ``"lost"``,
            ``"disk-full"`` or ``"fault"``.
        message: in words.
    """

    kind: str
    message: str


def submit(connection: Connection, request: str, most: int, now: float) -> str:
    """Queue a job; its id.

    Raises:
        QueueFull: there are ``most`` already.
    """
    waiting = connection.scalar(select(func.count()).select_from(jobs).where(jobs.c.state == "queued"))
    if (waiting or 0) >= most:
        raise QueueFull
    job_id = uuid.uuid4().hex
    values = {"id": job_id, "created": now, "updated": now, "state": "queued", "request": request}
    connection.execute(insert(jobs).values(attempts=0, cancel_requested=False, **values))
    _tell(connection, job_id, "queued", now)
    return job_id


def find(connection: Connection, job_id: str) -> Row[Any] | None:
    """A job's row."""
    return connection.execute(select(jobs).where(jobs.c.id == job_id)).one_or_none()


def events(connection: Connection, job_id: str, after: int, most: int = 500) -> Sequence[Row[Any]]:
    """A job's events with numbers above ``after``, in order."""
    asked = select(job_events).where(job_events.c.job_id == job_id, job_events.c.number > after)
    return connection.execute(asked.order_by(job_events.c.number).limit(most)).all()


def latest_events(connection: Connection, job_ids: Sequence[str]) -> dict[str, int]:
    """The number of each job's latest event."""
    asked = select(job_events.c.job_id, func.max(job_events.c.number)).where(job_events.c.job_id.in_(job_ids))
    return {row[0]: row[1] for row in connection.execute(asked.group_by(job_events.c.job_id))}


def has_work(connection: Connection, lease_seconds: float, now: float) -> bool:
    """Whether a job waits, or its lease has run out."""
    wanted = or_(jobs.c.state == "queued", _orphaned(lease_seconds, now))
    return bool(connection.scalar(select(exists().where(wanted))))


def claim(connection: Connection, worker: str, lease_seconds: float, now: float) -> Claim | None:
    """Take the job that has waited longest, if there is one."""
    waiting = select(jobs).where(jobs.c.state == "queued").order_by(jobs.c.number).limit(1)
    row = connection.execute(waiting.with_for_update(skip_locked=True)).one_or_none()
    if row is None:
        return None
    taken = Claim(row.id, row.request, row.attempts + 1, f"{worker[:31]}:{uuid.uuid4().hex}")
    lease = {"lease_owner": taken.owner, "lease_expires": now + lease_seconds}
    _change(connection, row.id, now, state="running", attempts=taken.attempt, **lease)
    _tell(connection, row.id, "running", now, attempt=taken.attempt)
    return taken


def rescue(connection: Connection, requeues: int, lease_seconds: float, now: float) -> int:
    """Queue again what was lost with its worker; what was lost too often has failed. The number of such jobs."""
    orphaned = select(jobs).where(_orphaned(lease_seconds, now))
    lost = connection.execute(orphaned.with_for_update(skip_locked=True)).all()
    for row in lost:
        if row.cancel_requested:
            _finish(connection, row.id, "cancelled", now)
        elif row.attempts > requeues:
            message = f"its worker was lost {row.attempts} times, so the job is not tried again"
            _failed(connection, row.id, Failure("lost", message), now)
        else:
            _requeue(connection, row.id, now, reason="its worker was lost")
    return len(lost)


def standing(connection: Connection, mine: Claim) -> Literal["held", "cancel", "lost"]:
    """How a claim stands: go on, end it because somebody wants that, or end it because the job is no longer ours."""
    wanted = connection.scalar(select(jobs.c.cancel_requested).where(_owned(mine)))
    return "lost" if wanted is None else "cancel" if wanted else "held"


def renew(connection: Connection, mine: Claim, lease_seconds: float, now: float) -> bool:
    """Put off the end of a lease; whether it is still ours."""
    changed = update(jobs).where(_owned(mine)).values(lease_expires=now + lease_seconds, updated=now)
    return connection.execute(changed).rowcount == 1


def progress(connection: Connection, mine: Claim, data: dict[str, Any], now: float) -> bool:
    """Write down how far a job is; whether it is still ours. After ``MOST_PROGRESS`` events nothing is added."""
    if connection.execute(update(jobs).where(_owned(mine)).values(updated=now)).rowcount != 1:
        return False
    if _next_number(connection, mine.job_id) <= MOST_PROGRESS:
        _tell(connection, mine.job_id, "progress", now, **data)
    return True


def succeed(connection: Connection, mine: Claim, plan: Plan, now: float) -> bool:
    """Store a job's plan and end the job; whether it was still ours. Where a cancel was asked for, that is done."""
    row = _locked(connection, mine)
    if row is None:
        return False
    if row.cancel_requested:
        _finish(connection, mine.job_id, "cancelled", now)
    else:
        plan_id = plans.store(connection, plan)
        _finish(connection, mine.job_id, "succeeded", now, {"plan_id": plan_id}, plan_id=plan_id)
    return True


def fail(connection: Connection, mine: Claim, why: Failure, now: float) -> bool:
    """End a job without a plan; whether it was still ours. Where a cancel was asked for, that is done."""
    row = _locked(connection, mine)
    if row is None:
        return False
    if row.cancel_requested:
        _finish(connection, mine.job_id, "cancelled", now)
    else:
        _failed(connection, mine.job_id, why, now)
    return True


def hand_back(connection: Connection, mine: Claim, now: float) -> bool:
    """Give a job to the next worker because this one stops, which is no failed attempt; whether it was still ours."""
    row = _locked(connection, mine)
    if row is None:
        return False
    if row.cancel_requested:
        _finish(connection, mine.job_id, "cancelled", now)
    else:
        _requeue(connection, mine.job_id, now, reason="its worker stops", attempts=row.attempts - 1)
    return True


def cancel(connection: Connection, job_id: str, now: float) -> bool:
    """End a job that nobody runs, or ask the worker that runs it to; again, or after the end, it changes nothing.

    Returns:
        Whether there is such a job.
    """
    row = connection.execute(select(jobs).where(jobs.c.id == job_id).with_for_update()).one_or_none()
    if row is None:
        return False
    if row.state == "queued" or (row.state == "running" and row.lease_expires < now):
        _finish(connection, job_id, "cancelled", now)
    elif row.state == "running" and not row.cancel_requested:
        _change(connection, job_id, now, cancel_requested=True)
        _tell(connection, job_id, "cancelling", now)
    return True


def cancelled(connection: Connection, mine: Claim, now: float) -> bool:
    """End a job whose process was ended because somebody wanted that; whether it was still ours."""
    if _locked(connection, mine) is None:
        return False
    _finish(connection, mine.job_id, "cancelled", now)
    return True


def seen(connection: Connection, worker: str, now: float) -> None:
    """A worker lives."""
    if connection.execute(update(workers).where(workers.c.id == worker).values(seen=now)).rowcount == 0:
        connection.execute(insert(workers).values(id=worker, seen=now))
        connection.execute(delete(workers).where(workers.c.seen < now - _FORGET_SECONDS))


def leave(connection: Connection, worker: str) -> None:
    """A worker stops."""
    connection.execute(delete(workers).where(workers.c.id == worker))


def last_seen(connection: Connection) -> float | None:
    """When a worker was last seen; ``None``: there is none."""
    last: float | None = connection.scalar(select(func.max(workers.c.seen)))
    return last


def _owned(mine: Claim) -> Any:
    return and_(jobs.c.id == mine.job_id, jobs.c.state == "running", jobs.c.lease_owner == mine.owner)


def _orphaned(lease_seconds: float, now: float) -> Any:
    """A lease that is over, or that ends later than any could: the clock was set back after it was taken."""
    over = or_(jobs.c.lease_expires < now, jobs.c.lease_expires > now + 2 * lease_seconds)
    return and_(jobs.c.state == "running", over)


def _locked(connection: Connection, mine: Claim) -> Row[Any] | None:
    return connection.execute(select(jobs).where(_owned(mine)).with_for_update()).one_or_none()


def _change(connection: Connection, job_id: str, now: float, **values: Any) -> None:
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(updated=now, **values))


def _requeue(connection: Connection, job_id: str, now: float, reason: str, **values: Any) -> None:
    _change(connection, job_id, now, state="queued", lease_owner=None, lease_expires=None, **values)
    _tell(connection, job_id, "requeued", now, reason=reason)


def _failed(connection: Connection, job_id: str, why: Failure, now: float) -> None:
    error = {"kind": why.kind, "message": why.message}
    _finish(connection, job_id, "failed", now, {"error": error}, error=json.dumps(error))


def _finish(
    connection: Connection, job_id: str, state: str, now: float, told: dict[str, Any] | None = None, **values: Any
) -> None:
    _change(connection, job_id, now, state=state, lease_owner=None, lease_expires=None, **values)
    _tell(connection, job_id, state, now, **(told or {}))


def _next_number(connection: Connection, job_id: str) -> int:
    highest = connection.scalar(select(func.max(job_events.c.number)).where(job_events.c.job_id == job_id))
    return (highest or 0) + 1


def _tell(connection: Connection, job_id: str, kind: str, now: float, **data: Any) -> None:
    """Write an event; the transaction holds the job's row, so numbers are not taken twice."""
    values = {"number": _next_number(connection, job_id), "time": now, "kind": kind}
    connection.execute(insert(job_events).values(job_id=job_id, data=json.dumps(data, allow_nan=False), **values))
