"""Run a function in a fresh process, under a time limit, with nothing left of it afterwards.

A fresh process has its own CUDA context and allocator, so its peak is its own, and its end is the best recovery from
running out of memory. It is a new interpreter, prepared as ``multiprocessing``'s spawned children are, but started and
read through files without names: neither side ever waits for the other to read, so a child that dies or hangs cannot
hold its parent, and no helper process or named semaphore outlives it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import spawn
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from time import monotonic, sleep
from typing import IO, Any, Generic, TypeVar

from horizonplan.probes import child

T = TypeVar("T")
_GRACE_SECONDS = 1.0  # between asking a group to end and ending it


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came back.

    Attributes:
        value: the function's result.
        seconds: from the process's start to its end, imports included.
        environment: names of environment variables that this process changed since it began. The child has them as
            they are now, and libraries that read them when they were imported (torch) may differ from it in that.
    """

    value: T
    seconds: float
    environment: tuple[str, ...]


class IsolationError(RuntimeError):
    """No result came back.

    Attributes:
        out_of_memory: whether the child said that memory ran out.
        output: the end of what it printed.
    """

    out_of_memory = False
    output = ""


class CannotTravel(IsolationError):
    """The function did not begin: it or its arguments cannot go to another process. Running it in this one may do."""


class ChildFailed(IsolationError):
    """The function raised, or ended its process.

    Attributes:
        type_name: of the exception, ``"SystemExit"`` and the like included.
        message: the exception's.
        traceback: of the child, as text.
    """

    def __init__(self, type_name: str, message: str, out_of_memory: bool = False, traceback: str = "") -> None:
        super().__init__(f"{type_name}: {message}")
        self.type_name, self.message, self.out_of_memory, self.traceback = type_name, message, out_of_memory, traceback


class ChildKilled(IsolationError):
    """A signal ended the child.

    Attributes:
        signal_name: ``"SIGKILL"``, ``"SIGSEGV"``, ...
    """

    def __init__(self, number: int) -> None:
        self.signal_name = next((known.name for known in signal.Signals if known == number), f"signal {number}")
        kernel = number == signal.SIGKILL
        hint = ", which the kernel sends when the host runs out of memory; use less of it" if kernel else ""
        super().__init__(f"the child process was killed by {self.signal_name}{hint}")


class ChildTimeout(IsolationError):
    """The function took longer than its limit, and its process was ended."""


def isolated(function: Callable[..., T], *args: Any, timeout_seconds: float) -> Outcome[T]:
    """Call ``function(*args)`` in a fresh process.

    Function, arguments and result are pickled: functions and classes go by name, one object given twice arrives as one
    (an optimiser keeps its model's parameters), tensors go by value, a view with all of its storage. The child has
    this process's working directory, import path and environment variables as they are now; what this process set in
    libraries (threads, default dtype, seeds) it has not. Its standard input is empty, what it prints is kept back, and
    its temporary folder is its own.

    Afterwards, also on KeyboardInterrupt, the child's process group has ended, grandchildren included, and its
    temporary folder is gone; should this process be killed, the group ends by itself.

    Args:
        function: importable by name in another process.
        args: what to call it with.
        timeout_seconds: a hard limit, imports included; ending the process takes at most two seconds more.

    Raises:
        ValueError: ``timeout_seconds`` is not positive and finite.
        CannotTravel: a lambda, a local class, a main script that cannot be imported, a system without POSIX.
        ChildFailed: the function raised; ``out_of_memory`` tells whether memory ran out.
        ChildKilled: a signal ended the child.
        ChildTimeout: the limit passed.

    Example:
        >>> isolated(divmod, 7, 2, timeout_seconds=60).value
        (3, 1)
    """
    if not 0 < timeout_seconds < math.inf:
        raise ValueError(f"timeout_seconds={timeout_seconds!r}: give a positive, finite number of seconds.")
    if os.name != "posix":
        raise CannotTravel("isolated processes need POSIX (process groups, open files that pass to a child)")
    with ExitStack() as files:
        letter, answer, output = (files.enter_context(TemporaryFile()) for _ in range(3))
        _write(letter, function, args)
        begin = monotonic()
        code = _run(letter, answer, output, timeout_seconds)
        seconds = monotonic() - begin
        try:
            return Outcome(_value(answer, code, timeout_seconds), seconds, _changed_environment())
        except IsolationError as error:
            output.seek(max(0, output.seek(0, os.SEEK_END) - 4096))
            error.output = output.read().decode(errors="replace")
            raise


def _write(letter: IO[bytes], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    unset = multiprocessing.get_start_method(allow_none=True) is None
    setting = spawn.get_preparation_data("horizonplan probe")
    if unset:  # asking has set it, and a program may set it once only
        multiprocessing.set_start_method(None, force=True)
    setting.pop("authkey")  # a secret between this process and children of multiprocessing
    setting.pop("start_method")  # the child's own business
    pickle.dump(setting, letter)
    try:
        pickle.dump((function, args), letter)
    except Exception as error:  # each type of object has its own way to refuse
        raise CannotTravel(
            f"function or arguments cannot be pickled ({type(error).__name__}: {error}); define classes and functions "
            "at the top of a module"
        ) from error
    letter.seek(0)  # the child shares this position


def _run(letter: IO[bytes], answer: IO[bytes], output: IO[bytes], timeout_seconds: float) -> int | None:
    """The child's exit code, or ``None`` if the time was up; when this returns or raises, its group has ended."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as pipe:
        theirs, ours = os.pipe()  # the lifeline
        for end in (theirs, ours):
            pipe.callback(os.close, end)
        numbers = letter.fileno(), answer.fileno(), theirs
        running = subprocess.Popen(
            # -P: this folder, with a time.py in it, is no place to import from
            [sys.executable, "-P", "-X", "faulthandler", child.__file__, *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=numbers,
            env=os.environ | {"TMPDIR": folder},
            start_new_session=True,
        )
        try:
            return running.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end_group(running)


def _end_group(leader: subprocess.Popen[bytes]) -> None:
    """End all processes of the child's group: asked first, so that helpers of theirs clean up what has a name."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = monotonic() + _GRACE_SECONDS
        with suppress(ProcessLookupError, PermissionError):  # nobody is left (macOS: or only zombies)
            os.killpg(leader.pid, number)
            while monotonic() < until:
                leader.poll()
                os.killpg(leader.pid, 0)
                sleep(0.01)
    leader.wait()


def _value(answer: IO[bytes], code: int | None, timeout_seconds: float) -> Any:
    """The result in an answer, or what its records and the exit code mean, raised."""
    records: list[tuple[Any, ...]] = [()]
    answer.seek(0)
    with suppress(EOFError, pickle.UnpicklingError):  # its end, or the middle of what a dying child wrote
        while True:
            records.append(pickle.load(answer))
    match records[-1]:
        case ("value", pickled):  # even if the process was ended after it
            return pickle.loads(pickled)
        case ("raised", *rest):
            raise ChildFailed(*rest)
        case ("unread", why):
            raise CannotTravel(
                f"a fresh process could not have the function or its arguments ({why}); define them in a module, and "
                'guard what the main script runs with if __name__ == "__main__":'
            )
        case () if code is None:
            raise CannotTravel(
                f"the function had not begun after timeout_seconds={timeout_seconds:g}; guard what the main script "
                'runs with if __name__ == "__main__":, or allow more time'
            )
        case _ if code is None:
            raise ChildTimeout(f"no result after timeout_seconds={timeout_seconds:g}; allow more time, or do less")
        case _ if code < 0:
            raise ChildKilled(-code)
        case ():
            raise CannotTravel(f"a fresh process ended with code {code} before the function began")
        case _:
            raise ChildFailed("exit", f"the function ended its process with code {code}")


def _changed_environment() -> tuple[str, ...]:
    """Names of the variables that differ from what this process began with, where the system tells (Linux)."""
    try:
        began = Path("/proc/self/environ").read_bytes()
    except OSError:
        return ()
    then = {name: value for name, found, value in (entry.partition(b"=") for entry in began.split(b"\0")) if found}
    return tuple(sorted({os.fsdecode(name) for name, _ in then.items() ^ os.environb.items()}))
