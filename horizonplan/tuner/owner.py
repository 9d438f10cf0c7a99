"""Who runs a trial, and whether they still do.

An owner is a call in a process on a machine. On its own machine a dead process is seen at once; elsewhere an owner is
taken for dead when the number that it counts up (its beat) has stood still for a while by the clock of the one who
looks, so that the clocks of two machines are never compared.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from uuid import uuid4

BEAT_SECONDS = 20.0
GRACE_SECONDS = 120.0

_calls: set[str] = set()  # those of this process that are under way


def begin() -> str:
    """A new owner, alive until :func:`end` or the process's end."""
    call = uuid4().hex
    _calls.add(call)
    return f"{socket.gethostname()} {os.getpid()} {_started(os.getpid())} {call}"


def end(owner: str) -> None:
    """The call is over; what it still runs is nobody's."""
    _calls.discard(owner.split()[-1])


def dead(owner: str) -> bool:
    """Whether an owner on this machine is known to have ended."""
    host, number, started, call = owner.rsplit(maxsplit=3)
    if host != socket.gethostname():
        return False
    pid = int(number)
    if pid == os.getpid():
        return call not in _calls
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return _started(pid) != started  # the number is another process's now, or that of a zombie


@dataclass
class Watchman:
    """Sees whether beats go on.

    Attributes:
        seen: trial -> its beat, and when it was first seen.
    """

    seen: dict[int, tuple[object, float]] = field(default_factory=dict)

    def still(self, trial: int, beat: object) -> bool:
        """Whether a trial's beat has been the same for too long."""
        last, since = self.seen.setdefault(trial, (beat, monotonic()))
        if last != beat:
            self.seen[trial] = (beat, monotonic())
            return False
        return monotonic() - since > GRACE_SECONDS


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; ``"-"`` where nobody tells, ``"zombie"`` for one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "-"
    return "zombie" if fields[0] in "ZX" else fields[19]
