"""SIGTERM, which clusters send before they take a machine away: finish the step, save, end the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_TERMINATED = 128 + signal.SIGTERM  # 143, as shells have it


class Terminated(SystemExit):
    """SIGTERM came and the run is saved; the process exits with code 143 unless this is caught."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_TERMINATED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Asked:
    """Whether SIGTERM has come."""

    def __init__(self) -> None:
        self.to_end = False


@contextmanager
def terminable(active: bool) -> Iterator[Asked]:
    """Note the first SIGTERM, and exit at once on a second one (code 143).

    Only a process's main thread can take signals; in another one, or if not ``active``, nothing is changed.
    """
    asked = Asked()

    def note(number: int, frame: FrameType | None) -> None:
        if asked.to_end:
            os._exit(EXIT_TERMINATED)
        asked.to_end = True

    if not active or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
