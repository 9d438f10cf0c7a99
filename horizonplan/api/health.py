"""Whether the service lives, whether it is ready, and what it has done (Prometheus)."""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict
from sqlalchemy import func, select, text
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from horizonplan.api.database import STATES, Database, jobs
from horizonplan.api.problems import Problem, responses
from horizonplan.api.settings import Settings
from horizonplan.units import format_bytes

Check = Callable[[], str | None]

router = APIRouter(tags=["health"])
metrics_router = APIRouter(tags=["health"])


class Alive(BaseModel):
    """The process answers."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    """All checks passed."""

    model_config = ConfigDict(extra="forbid")

    status: Literal["ready"] = "ready"
    checks: dict[str, Literal["ok"]]


class Metrics:
    """What the service has done since it started."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ["method", "route", "status"]
        self.requests = Counter("horizonplan_requests", "Requests.", labels, registry=self.registry)
        self.seconds = Histogram(
            "horizonplan_request_seconds", "Seconds to the last byte.", ["route"], registry=self.registry
        )
        self.plans = Counter("horizonplan_plans", "Plans made.", ["how"], registry=self.registry)
        self.jobs = Gauge("horizonplan_jobs", "Jobs in the database.", ["state"], registry=self.registry)

    def text(self, states: Mapping[str, int]) -> bytes:
        """All of it in Prometheus' format, with the jobs of each state."""
        for state in STATES:
            self.jobs.labels(state).set(states.get(state, 0))
        return generate_latest(self.registry)


class Measure:
    """Counts and times every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other"
            self.metrics.requests.labels(method, route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)


@router.get("/livez", response_model=Alive)
async def livez() -> Alive:
    """The process answers."""
    return Alive()


@router.get("/readyz", response_model=Ready, responses=responses(503))
def readyz(request: Request) -> Ready:
    """Whether the service can do its work, check by check."""
    found = {name: _outcome(check) for name, check in request.app.state.checks.items()}
    if bad := {name: outcome for name, outcome in found.items() if outcome != "ok"}:
        detail = "; ".join(f"{name}: {outcome}" for name, outcome in bad.items())
        raise Problem(503, detail, "not-ready", headers={"Retry-After": "5"}, checks=found)
    return Ready(checks=dict.fromkeys(found, "ok"))


@metrics_router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}}},
)
def metrics(request: Request) -> Response:
    """Requests by route and status, their seconds, plans made, jobs by state."""
    database: Database = request.app.state.database
    with database.read() as connection:
        counted = connection.execute(select(jobs.c.state, func.count().label("count")).group_by(jobs.c.state)).all()
    states: dict[str, int] = {row[0]: row[1] for row in counted}
    return Response(request.app.state.metrics.text(states), media_type=CONTENT_TYPE_LATEST)


def checks(settings: Settings, database: Database) -> dict[str, Check]:
    """What /readyz looks at: name -> function that returns a complaint, or None."""

    def reachable() -> str | None:
        with database.read() as connection:
            connection.execute(text("SELECT 1"))
        return None

    def migrated() -> str | None:
        current, wanted = database.revisions()
        return None if current == wanted else f"the tables are at revision {current}, this version wants {wanted}"

    def disk() -> str | None:
        folder = tempfile.gettempdir() if database.file is None else database.file.parent
        free = shutil.disk_usage(folder).free
        return None if free >= settings.min_free_bytes else f"{format_bytes(free)} free in {folder}"

    return {"database": reachable, "migrations": migrated, "disk": disk}


def _outcome(check: Check) -> str:
    try:
        return check() or "ok"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
