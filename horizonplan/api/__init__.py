"""Recommendations over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from horizonplan.api import health, plans, problems
from horizonplan.api.database import Database
from horizonplan.api.settings import Settings

__all__ = ["Settings", "create_app"]


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service as an ASGI application.

    Its state: ``settings``; ``database``; ``stopping``, an ``asyncio.Event`` that is set when the server is told to
    stop, which open streams must watch; ``checks``, of /readyz: name -> function that returns a complaint or None.

    Args:
        settings: ``None``: from the environment.
    """
    settings = Settings() if settings is None else settings
    app = FastAPI(title="horizonplan", lifespan=_lifespan)
    app.state.settings = settings
    app.state.database = Database(settings.database_url, settings.busy_seconds)
    app.state.stopping = asyncio.Event()
    app.state.checks = {}
    problems.add_handlers(app)
    for part in (health, plans):
        app.include_router(part.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    await run_in_threadpool(app.state.database.upgrade)
    try:
        yield
    finally:
        app.state.stopping.set()
        app.state.database.close()
