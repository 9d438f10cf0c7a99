"""The other side of a job: a process of its own, within limits, that measures and writes what comes of it.

It starts before anything of horizonplan or torch is there, and limits itself first, so it imports the standard library
only. On standard input is the letter, one JSON object; its arguments are the numbers of two open files:

- the answer: JSON objects, one a line: ``{"progress": ...}``, then ``{"plan": ...}`` or ``{"error": ...}``;
- the lifeline, a pipe that breaks when the worker is gone, however it went.

What it may do is less than the worker may: no core files, no file larger than so much, no more memory, CPU time and
open files than so much, no new privileges, and where Linux has Landlock no writing outside of its own temporary folder
and no TCP.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import struct
import sys
from threading import Thread
from typing import Any

_NO_NEW_PRIVILEGES = 38  # of prctl
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock's system calls, on every kind of machine
_WRITES = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))  # of the first version: write, remove, make
_LATER_WRITES = ((2, 1 << 13), (3, 1 << 14))  # version that brought it: link or rename elsewhere; truncate
_TCP, TCP_VERSION = 0b11, 4  # bind and connect
_LIBRARY_BYTES = 16 * 1024**3  # of address space, for files that are mapped


def main(answer: int, lifeline: int) -> None:
    """Do what the letter says, and answer."""
    folder = os.environ["TMPDIR"]
    for number in (answer, lifeline):
        os.set_inheritable(number, False)
    letter = json.load(sys.stdin)
    limit(letter["limits"])
    # before Landlock, which holds for a thread and those that it starts: this one removes the folder itself
    Thread(target=_end_with, args=(lifeline, folder), daemon=True).start()
    confine(folder)
    with open(answer, "w", encoding="ascii") as answered:

        def say(**record: Any) -> None:
            answered.write(json.dumps(record, allow_nan=False) + "\n")
            answered.flush()

        from horizonplan.api.measuring import measure  # only now, within the limits

        measure(letter, say)


def limit(limits: dict[str, int]) -> None:
    """Lower this process's limits, for good."""
    memory = limits["memory_bytes"]
    for what, most in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_AS, memory + _LIBRARY_BYTES),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        most = _allowed(what, most)
        resource.setrlimit(what, (most, most))
    seconds = limits["cpu_seconds"]
    last = _allowed(resource.RLIMIT_CPU, seconds + 5)
    resource.setrlimit(resource.RLIMIT_CPU, (min(seconds, last), last))  # told by SIGXCPU first, which says what it was


def _allowed(what: int, most: int) -> int:
    """A limit that is not above the one there is."""
    highest = resource.getrlimit(what)[1]
    return most if highest == resource.RLIM_INFINITY else min(most, highest)


def confine(folder: str) -> bool:
    """Give up new privileges, writing outside of ``folder``, and TCP, in this thread and those that it will start.

    Returns:
        Whether the system has what that takes.
    """
    system = ctypes.CDLL(None, use_errno=True)
    if not sys.platform.startswith("linux") or system.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    version = landlock_version()
    if version < 1:
        return False
    writes = _WRITES + sum(right for since, right in _LATER_WRITES if version >= since)
    handled = struct.pack("=QQ", writes, _TCP)[: 16 if version >= TCP_VERSION else 8]
    rules = system.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    if rules < 0:
        return False
    for path, rights in ((folder, writes), (os.devnull, 1 << 1)):
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        system.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", rights, beneath), 0)
        os.close(beneath)
    refused = system.syscall(_RESTRICT_SELF, rules, 0)
    os.close(rules)
    return not refused


def landlock_version() -> int:
    """Which Landlock the system has; below 1: none, below ``TCP_VERSION``: one that knows nothing of TCP."""
    if not sys.platform.startswith("linux"):
        return 0
    return int(ctypes.CDLL(None, use_errno=True).syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _end_with(lifeline: int, folder: str) -> None:
    os.read(lifeline, 1)
    shutil.rmtree(folder, ignore_errors=True)  # this process's own, which the worker would have removed
    os.kill(0, signal.SIGKILL)  # 0: the whole group


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
