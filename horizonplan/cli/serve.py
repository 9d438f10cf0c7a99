"""``horizonplan serve``: recommendations over HTTP."""

from typing import Annotated, Any

import typer
from typer import Option

from horizonplan.api import Settings, security, server
from horizonplan.api.database import Database
from horizonplan.cli import options as opt

HOST = "Address to listen on. Beyond this machine (0.0.0.0) every request needs a key."
NEW_KEY = "Make a key of this name, print it once, and end."
WORKERS = "Processes beside the server that run jobs, one at a time each. 0: they run elsewhere. Default: 1."
DATABASE = "Where plans are kept, such as sqlite:////srv/plans.sqlite3. Default: HORIZONPLAN_DATABASE_URL, else a file."


def serve(
    host: Annotated[str | None, Option(help=HOST)] = None,
    port: Annotated[int | None, Option(min=0, max=65535, help="Port to listen on. Default: 8000.")] = None,
    database_url: Annotated[str | None, Option(help=DATABASE)] = None,
    new_key: Annotated[str | None, Option(help=NEW_KEY)] = None,
    drop_key: Annotated[str | None, Option(help="Forget the key of this name, and end.")] = None,
    workers: Annotated[int | None, Option(min=0, max=64, help=WORKERS)] = None,
    debug: opt.Debug = False,
) -> None:
    """Answer POST /v1/plans and its companions until a signal comes; /openapi.json describes them.

    Settings come from options, else from environment variables HORIZONPLAN_HOST, HORIZONPLAN_PORT, ...

    Example: horizonplan serve --port 8000
    """
    opt.exclude(new_key=new_key, drop_key=drop_key)
    given: dict[str, Any] = {"host": host, "port": port, "database_url": database_url}
    if workers is not None:
        given["jobs"] = {"workers": workers}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    database = Database(settings.database_url, settings.busy_seconds)
    try:
        database.upgrade()
        if new_key is not None:
            typer.echo(security.new_key(database, new_key))
            return
        if drop_key is not None:
            security.drop_key(database, drop_key)
            return
        if settings.keys_required and not security.has_keys(database):
            raise ValueError(f"host={settings.host!r}: requests need keys there, and there is none; --new-key NAME.")
    finally:
        database.close()
    server.run(settings)
