"""Jobs over HTTP: submit one, read it, list them, follow one live, cancel one."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field, WithJsonSchema
from sqlalchemy import Row, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.concurrency import run_in_threadpool

from horizonplan.api import architectures, database, queue
from horizonplan.api.architectures import JobRequest
from horizonplan.api.database import Database, now
from horizonplan.api.paging import cursor_of, cursor_query, iso, number_of
from horizonplan.api.problems import Problem, responses
from horizonplan.api.security import JsonRoute
from horizonplan.api.watching import Watcher

Cursor = Annotated[str | None, cursor_query("job")]
router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=JsonRoute)
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Time = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
_RETRY_SECONDS = 10
_EVENTS_AT_ONCE = 500
_SILENT_SECONDS = 15.0  # after which a stream says that it is still there, so that nothing between takes it for dead


class JobError(BaseModel):
    """Why a job failed."""

    kind: Literal["infeasible", "invalid", "out-of-memory", "timeout", "killed", "lost", "disk-full", "fault"]
    message: str


class Job(BaseModel):
    """A job. It ends in exactly one of `succeeded`, `failed` and `cancelled`."""

    id: str
    state: State
    created: Time
    updated: Time
    request: JobRequest
    plan_id: str | None = Field(description="Of a job that succeeded: its plan is at /v1/plans/{plan_id}.")
    error: JobError | None
    attempts: int = Field(description="How often a worker has taken it.")
    cancel_requested: bool


class JobList(BaseModel):
    """Jobs, the newest first."""

    items: list[Job]
    next_cursor: str | None = Field(description="For the next ones; null: these were the last.")


ACCEPTED: dict[str, Any] = {
    "model": Job,
    "description": "The job waits for a worker.",
    "headers": {"Location": {"description": "Where it can be read.", "schema": {"type": "string"}}},
}
EVENTS = "text/event-stream"
EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string", "description": "The state that begins, `progress`, `requeued` or `cancelling`."},
        "data": {"type": "string", "contentMediaType": "application/json"},
        "id": {"type": "string", "pattern": "^[1-9][0-9]*$", "description": "Its number."},
    },
    "required": ["event", "data", "id"],
}
STREAM: dict[str, Any] = {
    "description": "The job's events, in order, until its end.",
    "content": {EVENTS: {"itemSchema": EVENT}},  # a word of OpenAPI 3.2
}


@router.post("", status_code=202, responses={202: ACCEPTED, **responses(415, 422, 429, 507)}, response_model=None)
def submit(asked: JobRequest, request: Request) -> Response:
    """Have a network measured, and a horizon chosen for it."""
    settings = request.app.state.settings.jobs
    architectures.check(asked, settings)
    with request.app.state.database.write() as connection:
        try:
            job_id = queue.submit(connection, asked.model_dump_json(), settings.max_queued, now())
        except queue.QueueFull:
            detail = f"{settings.max_queued} jobs are waiting, and no more are taken; come again in {_RETRY_SECONDS} s."
            raise Problem(429, detail, "queue-full", headers={"Retry-After": str(_RETRY_SECONDS)}) from None
        row = queue.find(connection, job_id)
    assert row is not None
    return Response(json.dumps(_shown(row)), 202, {"Location": f"/v1/jobs/{job_id}"}, "application/json")


@router.get("", responses={200: {"model": JobList}, **responses(422)}, response_model=None)
def list_jobs(
    request: Request,
    state: Annotated[State | None, Query(description="Only these.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="The most to answer with.")] = 20,
    cursor: Cursor = None,
) -> Response:
    """The jobs, the newest first. Those submitted in between move nothing."""
    table = database.jobs
    asked = select(table).order_by(table.c.number.desc())
    if state is not None:
        asked = asked.where(table.c.state == state)
    if cursor is not None:
        asked = asked.where(table.c.number < number_of(cursor))
    with request.app.state.database.read() as connection:
        found = connection.execute(asked.limit(limit + 1)).all()
    after = cursor_of("job", found[limit - 1].number) if len(found) > limit else None
    shown = {"items": [_shown(row) for row in found[:limit]], "next_cursor": after}
    return Response(json.dumps(shown), media_type="application/json")


@router.get("/{job_id}", responses={200: {"model": Job}, **responses(404, 422)}, response_model=None)
def get_job(job_id: str, request: Request) -> Response:
    """A job as it stands."""
    return Response(json.dumps(_shown(_find(job_id, request))), media_type="application/json")


@router.post("/{job_id}/cancel", responses={200: {"model": Job}, **responses(404, 422, 507)}, response_model=None)
def cancel(job_id: str, request: Request) -> Response:
    """End a job: at once where it waits, within seconds where it runs. After its end this changes nothing."""
    _find(job_id, request)
    with request.app.state.database.write() as connection:
        queue.cancel(connection, job_id, now())
        row = queue.find(connection, job_id)
    assert row is not None
    return Response(json.dumps(_shown(row)), media_type="application/json")


def _find(job_id: str, request: Request) -> Row[Any]:
    """The job of a path.

    Raises:
        Problem: 404, there is none.
    """
    row = None
    if job_id.isascii() and job_id.isalnum():
        with request.app.state.database.read() as connection:
            row = queue.find(connection, job_id)
    if row is None:
        raise Problem(404, "There is no job of this id.")
    return row


@router.get(
    "/{job_id}/events",
    dependencies=[Depends(_find)],
    responses={200: STREAM, **responses(404, 422)},
    response_model=None,
)
async def follow(
    job_id: str,
    request: Request,
    last_event_id: Annotated[int, Header(ge=0, lt=2**31, description="The last number that was read.")] = 0,
) -> Response:
    """A job's events from the beginning, or after `Last-Event-ID`, until its end."""
    unbuffered = {"X-Accel-Buffering": "no"}  # for nginx
    return StreamingResponse(_stream(request, job_id, last_event_id), headers=unbuffered, media_type=EVENTS)


async def _stream(request: Request, job_id: str, after: int) -> AsyncIterator[str]:
    stopping, watcher = request.app.state.stopping, request.app.state.watcher
    assert isinstance(watcher, Watcher)
    with watcher.watch(job_id) as bell:
        while not stopping.is_set():
            bell.clear()
            try:
                rows, over = await run_in_threadpool(_events, request.app.state.database, job_id, after)
            except (DBAPIError, PoolTimeoutError):  # busy or away
                await asyncio.sleep(request.app.state.settings.jobs.poll_seconds)
                continue
            for row in rows:
                data = {"time": iso(row.time)} | json.loads(row.data)
                yield f"event: {row.kind}\ndata: {json.dumps(data)}\nid: {row.number}\n\n"
                after = row.number
            if over:
                return
            if len(rows) < _EVENTS_AT_ONCE:
                try:
                    await asyncio.wait_for(bell.wait(), _SILENT_SECONDS)
                except TimeoutError:
                    yield ": still here\n\n"


def _events(store: Database, job_id: str, after: int) -> tuple[Sequence[Row[Any]], bool]:
    """Events that follow, and whether they are the last."""
    with store.read() as connection:
        row = queue.find(connection, job_id)  # first: a job that has ended by now has all its events
        rows = queue.events(connection, job_id, after, _EVENTS_AT_ONCE)
    return rows, row is not None and row.state in queue.FINAL and len(rows) < _EVENTS_AT_ONCE


def _shown(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id,
        "state": row.state,
        "created": iso(row.created),
        "updated": iso(row.updated),
        "request": json.loads(row.request),
        "plan_id": row.plan_id,
        "error": None if row.error is None else json.loads(row.error),
        "attempts": row.attempts,
        "cancel_requested": row.cancel_requested,
    }
