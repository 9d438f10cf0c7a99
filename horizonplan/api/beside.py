"""Workers beside a server: processes that end with it, and are started again when they end without being told to."""

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from horizonplan.api.settings import Settings

logger = logging.getLogger("horizonplan.api")

_STOP_SECONDS = 3.0  # for a worker to hand its job back
_AGAIN_SECONDS = 1.0  # between the end of a worker and the start of the next


@contextmanager
def beside(settings: Settings) -> Iterator[None]:
    """Keep ``settings.jobs.workers`` worker processes as long as the context lasts.

    A worker's standard input is the settings, and after them nothing until this process is gone, however it goes; then
    the worker hands its job back and ends.
    """
    stop = threading.Event()
    keepers = [threading.Thread(target=_keep, args=(settings, stop)) for _ in range(settings.jobs.workers)]
    for keeper in keepers:
        keeper.start()
    try:
        yield
    finally:
        stop.set()
        for keeper in keepers:
            keeper.join()


def _keep(settings: Settings, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            worker = subprocess.Popen(
                [sys.executable, "-m", "horizonplan.api.worker", "--beside"],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            logger.warning("no worker process can be started: %s", error)
            stop.wait(_AGAIN_SECONDS)
            continue
        assert worker.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, see below
            worker.stdin.write(settings.model_dump_json().encode() + b"\n")
            worker.stdin.flush()
        while worker.poll() is None and not stop.wait(0.1):
            pass
        if worker.poll() is None:
            _end(worker)
        else:
            logger.warning("worker process %d ended with code %d", worker.pid, worker.returncode)
            stop.wait(_AGAIN_SECONDS)
        with suppress(BrokenPipeError):
            worker.stdin.close()


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Let a worker hand its job back; if that takes too long, its job's lease will run out."""
    worker.terminate()
    try:
        worker.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
