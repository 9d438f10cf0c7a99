"""Where a study is kept: in memory, in a journal on one machine, or in a database for several.

Optuna's journal is one line of JSON a record, appended and synced. Two things are added so that it survives being
killed at any moment: the lock is the kernel's, which a dead process does not hold (Optuna's own is a link that the
next one waits 30 s for), and a last line that was cut off is cut away before anything is written behind it (Optuna
would never read past it).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from time import sleep
from typing import cast

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

Place = str | Path | BaseStorage | None


@contextmanager
def opened(place: Place) -> Iterator[BaseStorage]:
    """Open what keeps a study, and close it afterwards, if it was not opened before.

    Args:
        place: ``None``: memory; a path: a journal, made if it is not there; a URL (``postgresql://user@host/name``,
            ``sqlite:///study.db``): a database; or an Optuna storage.

    Raises:
        ValueError: the folder of a journal is not there, the file is none, or there is no such database.
    """
    if place is None:
        yield InMemoryStorage()
    elif isinstance(place, BaseStorage):
        yield place
    elif "://" in str(place):
        storage = _database(str(place))
        try:
            yield storage
        finally:
            storage.engine.dispose()
    else:
        yield _journal(Path(place).absolute())


def _database(url: str) -> RDBStorage:
    shown = url
    try:
        parsed = make_url(url)
        shown = parsed.render_as_string()  # without the password
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        return _connected(parsed.render_as_string(hide_password=False))
    except (ArgumentError, SQLAlchemyError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"storage={shown!r}: it cannot be opened ({reason}); give a URL such as postgresql://user@host/name, and "
            "for PostgreSQL: pip install 'horizonplan[postgresql]'."
        ) from error


def _connected(url: str, attempts: int = 10) -> RDBStorage:
    """The database with Optuna's tables, which two processes that come first at once both try to make."""
    for _ in range(attempts - 1):
        with suppress(IntegrityError, ProgrammingError):
            return RDBStorage(url)
        sleep(0.2)
    return RDBStorage(url)


def _journal(path: Path) -> BaseStorage:
    if not path.parent.is_dir():
        raise ValueError(f"storage={str(path)!r}: there is no folder {path.parent}; make it first.")
    if path.is_dir():
        raise ValueError(f"storage={str(path)!r}: it is a folder; give the path of a file.")
    lock = _KernelLock(path) if os.name == "posix" else JournalFileOpenLock(str(path))
    with _held(lock):
        _mend(path)
    try:
        # Optuna asks for a class that it keeps private; acquire and release are all it calls.
        return JournalStorage(JournalFileBackend(str(path), cast(JournalFileOpenLock, lock)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"storage={str(path)!r}: it is no journal of a study ({error}); give the path of one, or of a new file."
        ) from error


class _KernelLock:
    """A lock between threads and processes that ends with its holder."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(path.name + ".lock")
        self.threads = Lock()
        self.descriptor = -1

    def acquire(self) -> bool:
        """Wait until it is free."""
        import fcntl  # POSIX only

        self.threads.acquire()
        try:
            self.descriptor = os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o644)
            fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Let the next one have it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1
        self.threads.release()


@contextmanager
def _held(lock: _KernelLock | JournalFileOpenLock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _mend(path: Path) -> None:
    """Cut away a last line without an end."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            cut = file.read(end - start).rfind(b"\n")
            if cut >= 0:
                end = start + cut + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())


@contextmanager
def stable() -> Iterator[None]:
    """Optuna's warnings that a part of it may change are for its users, not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
