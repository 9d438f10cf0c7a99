"""A job's process as its worker sees it: started with little, read as it goes, ended with all that it started."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from time import monotonic
from typing import IO, Any, Self

from horizonplan.api import child
from horizonplan.api.job_settings import JobSettings
from horizonplan.api.queue import Failure
from horizonplan.units import format_bytes

PROGRAM = Path(child.__file__)
MOST_ANSWER_BYTES = 32 * 1024**2
_INHERITED = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")
_END_SECONDS = 5.0  # from the end of its answer to its own
_OUTPUT_BYTES = 4096  # the end of what it printed, for the log


class Sandbox:
    """The process of one job, as a context: at its end the process group has ended, and its folder is gone.

    Args:
        request: of the job, JSON.
        settings: limits.
        program: what to run; it is called as ``horizonplan.api.child`` is.
    """

    def __init__(self, request: str, settings: JobSettings, program: Path = PROGRAM) -> None:
        self._settings, self._program = settings, program
        limits = {
            "memory_bytes": settings.memory_bytes,
            "cpu_seconds": max(1, int(settings.seconds * settings.threads)),
            "file_bytes": settings.file_bytes,
        }
        self._letter = json.dumps({"request": request, "settings": settings.model_dump_json(), "limits": limits})
        self._begun, self._end = b"", b""
        self._bytes = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = stack.enter_context(TemporaryDirectory(prefix="horizonplan-job-", ignore_cleanup_errors=True))
            if self._settings.user is not None:
                _give(folder, self._settings.user)
            letter, self._output = stack.enter_context(TemporaryFile()), stack.enter_context(TemporaryFile())
            letter.write(self._letter.encode())
            letter.seek(0)
            self._answer, theirs = os.pipe()
            stack.callback(os.close, self._answer)
            lifeline, ours = os.pipe()
            stack.callback(os.close, ours)
            try:
                self._process = self._start(letter, folder, theirs, lifeline)
            finally:
                os.close(theirs)
                os.close(lifeline)
            stack.callback(self.end)
            os.set_blocking(self._answer, False)
            self._deadline = monotonic() + self._settings.seconds
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def late(self) -> bool:
        """Whether the job has had its time."""
        return monotonic() > self._deadline

    @property
    def output(self) -> str:
        """The end of what the process printed."""
        self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - _OUTPUT_BYTES))
        return self._output.read().decode(errors="replace")

    def read(self, seconds: float) -> tuple[list[dict[str, Any]], bool]:
        """The records that have come, after waiting so long at most for the first; and whether that was all.

        Raises:
            ValueError: what came is no record, or too much.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self._answer, selectors.EVENT_READ)
            selector.select(seconds)
        came, over = self._drain()
        *lines, self._begun = (self._begun + came).split(b"\n")
        if self._process.poll() is not None and not over:  # something it started holds the pipe
            self.end()
            more, over = self._drain()[0], True
            *rest, self._begun = (self._begun + more).split(b"\n")
            lines += rest
        return [_record(line) for line in lines if line], over

    def end(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def why(self) -> Failure:
        """Why a process that said nothing of how it ended did."""
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return Failure("fault", "the job's process closed its answer without a result, and went on")
        if code >= 0:
            return Failure("fault", f"the job's process ended with code {code} and no result")
        limits = self._settings
        match -code:
            case signal.SIGKILL:
                meaning = "which the system sends when memory runs out; ask for something smaller"
                return Failure("killed", f"the job's process was killed by SIGKILL, {meaning}")
            case signal.SIGXCPU:
                return Failure("timeout", f"the job took more than {limits.seconds * limits.threads:g} s of CPU time")
            case number:
                name = next((known.name for known in signal.Signals if known == number), f"signal {number}")
                allowed = format_bytes(limits.memory_bytes)
                return Failure("killed", f"the job's process was killed by {name}; it may allocate {allowed}")

    def _start(self, letter: IO[bytes], folder: str, answer: int, lifeline: int) -> subprocess.Popen[bytes]:
        more: dict[str, Any] = {}
        if self._settings.user is not None:
            more = {"user": self._settings.user, "group": _group(self._settings.user), "extra_groups": []}
        return subprocess.Popen(
            # -P: its folder is no place to import from
            [sys.executable, "-P", "-X", "faulthandler", str(self._program), str(answer), str(lifeline)],
            stdin=letter,
            stdout=self._output,
            stderr=self._output,
            pass_fds=(answer, lifeline),
            cwd=folder,
            env=_environment(folder, self._settings.threads),
            start_new_session=True,
            umask=0o077,
            **more,
        )

    def _drain(self) -> tuple[bytes, bool]:
        """What is in the pipe, and whether its other end is closed."""
        parts: list[bytes] = []
        while True:
            try:
                part = os.read(self._answer, 65_536)
            except BlockingIOError:
                return b"".join(parts), False
            if not part:
                return b"".join(parts), True
            parts.append(part)
            self._bytes += len(part)
            if self._bytes > MOST_ANSWER_BYTES:
                raise ValueError(f"the job's process wrote more than {format_bytes(MOST_ANSWER_BYTES)}")


def openings() -> str | None:
    """What jobs may do here that Landlock would forbid them; ``None``: nothing."""
    version = child.landlock_version()
    if version >= child.TCP_VERSION:
        return None
    return "open TCP connections" if version >= 1 else "write wherever their user may, and open TCP connections"


def _environment(folder: str, threads: int) -> dict[str, str]:
    """Little of the worker's, so none of its secrets; and nothing that reaches for the network or for cards."""
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    count = str(threads)
    return kept | {
        "PYTHONPATH": os.pathsep.join([path for path in sys.path if path] + [os.getcwd()]),
        "TMPDIR": folder,
        "HOME": folder,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def _record(line: bytes) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict) or len(record) != 1:
        raise ValueError("the job's process wrote something that is no record")
    return record


def _group(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid


def _give(folder: str, user: str) -> None:
    import pwd

    found = pwd.getpwnam(user)
    os.chown(folder, found.pw_uid, found.pw_gid)
