"""The server and the workers beside it, from the start to a signal."""

import signal
import socket
import sys
from contextlib import suppress
from functools import partial

import uvicorn

from horizonplan.api import create_app, worker
from horizonplan.api.beside import beside
from horizonplan.api.settings import Settings

_SWITCH_SECONDS = 0.001  # after which a thread that computes lets the one go on that answers


class Server(uvicorn.Server):
    """A server that tells open streams to end before it waits for them."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop."""
        self.config.app.state.stopping.set()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def run(settings: Settings) -> None:
    """Serve, with workers beside the server, until SIGTERM or Ctrl-C.

    Raises:
        ValueError: nobody can listen at that address and port.
    """
    _refuse_taken(settings.host, settings.port)
    sys.setswitchinterval(_SWITCH_SECONDS)
    app = create_app(settings)
    app.state.checks["worker"] = partial(worker.check, app.state.database, settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=settings.shutdown_seconds,
        server_header=False,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server gives a signal on when it has stopped
    with suppress(KeyboardInterrupt), beside(settings):
        Server(config).run()


def _refuse_taken(host: str, port: int) -> None:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        words = f"cannot be listened on at {host} ({error.strerror}); choose another with --port or --host"
        raise ValueError(f"port={port} {words}") from error
