"""Recommendations over HTTP: plans from measurements, jobs that measure, and the health of the service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import Depends, FastAPI
from starlette.concurrency import run_in_threadpool

from horizonplan.api import health, jobs, page, plans, problems, security
from horizonplan.api.batches import Batches
from horizonplan.api.database import Database
from horizonplan.api.settings import Settings
from horizonplan.api.watching import Watcher

__all__ = ["Settings", "create_app"]

DESCRIPTION = "Plan how far ahead each block's gradient looks, from measurements of a network."
EVERYWHERE = (400, 403, 405, 413, 500, 503)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service as an ASGI application. Its tables are made, or brought to this version, when it starts.

    Its state: ``settings``; ``database``; ``metrics``; ``stopping``, an ``asyncio.Event`` that is set when the server
    is told to stop, and ends open streams; ``watcher``, which wakes these; ``new_plans``, which makes and stores plans;
    ``checks``, which /readyz looks at: name -> function that returns a complaint or ``None``.

    Args:
        settings: ``None``: from the environment.
    """
    settings = Settings() if settings is None else settings
    app = FastAPI(
        title="horizonplan", version="1", description=DESCRIPTION, lifespan=_lifespan, docs_url=None, redoc_url=None
    )
    app.state.settings = settings
    app.state.database = Database(settings.database_url, settings.busy_seconds)
    app.state.metrics = health.Metrics()
    app.state.stopping = asyncio.Event()
    app.state.watcher = Watcher(app.state.database, app.state.stopping, settings.jobs.poll_seconds)
    app.state.new_plans = Batches(plans.make_all, partial(plans.store_all, app.state.database))
    app.state.checks = health.checks(settings, app.state.database)
    problems.add_handlers(app)
    problems.document(app)
    app.add_middleware(security.Guard, settings=settings)
    app.add_middleware(health.Measure, metrics=app.state.metrics)
    app.include_router(health.router, responses=problems.responses(*EVERYWHERE))
    keys = [Depends(security.require_key)] if settings.keys_required else []
    statuses = (401, *EVERYWHERE) if keys else EVERYWHERE
    for router in (health.metrics_router, plans.router, jobs.router):
        app.include_router(router, dependencies=keys, responses=problems.responses(*statuses))
    page.add_to(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    await run_in_threadpool(app.state.database.upgrade)
    try:
        yield
    finally:
        app.state.stopping.set()
        app.state.database.close()
