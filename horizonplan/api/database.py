"""The database: tables, connections and migrations. SQLite by default, PostgreSQL by URL.

A SQLite file is kept in WAL mode, so readers never wait for a writer. Writers take turns: within a process by a lock,
between processes by ``BEGIN IMMEDIATE`` and ``busy_timeout``. Every time is in seconds since 1970 (UTC).
"""

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.exc import DBAPIError, OperationalError

STATES = ("queued", "running", "succeeded", "failed", "cancelled")  # of a job

metadata = MetaData()

plans = Table(
    "plans",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("created", Float, nullable=False),
    Column("parent", String(32), nullable=True),  # the plan that this one was replanned from
    Column("summary", Text, nullable=False),  # JSON: what lists show
    Column("data", Text, nullable=False),  # JSON: Plan.to_dict() and the id
    sqlite_autoincrement=True,
)
jobs = Table(
    "jobs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
    Column("state", String(16), nullable=False, index=True),  # queued, running, succeeded, failed, cancelled
    Column("request", Text, nullable=False),  # JSON
    Column("plan_id", String(32), ForeignKey("plans.id"), nullable=True),
    Column("error", Text, nullable=True),
    Column("attempts", Integer, nullable=False, default=0),
    Column("lease_owner", String(64), nullable=True),
    Column("lease_expires", Float, nullable=True),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    sqlite_autoincrement=True,
)
job_events = Table(
    "job_events",
    metadata,
    Column("job_id", String(32), ForeignKey("jobs.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),  # 1, 2, ... within the job
    Column("time", Float, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("data", Text, nullable=False),  # JSON
)
workers = Table(
    "workers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("seen", Float, nullable=False),
)
api_keys = Table(
    "api_keys",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("name", String(100), nullable=False, unique=True),
    Column("hash", String(64), nullable=False, unique=True),  # SHA-256 of the key, in hexadecimal
    Column("created", Float, nullable=False),
)

_MIGRATION_LOCK = 0x68706C616E  # any number that nobody else locks


class Database:
    """Connections to one database.

    Args:
        url: as SQLAlchemy writes it; of a SQLite file the folder is made.
        busy_seconds: how long to wait for somebody else's writing.
    """

    def __init__(self, url: str, busy_seconds: float = 5.0) -> None:
        self.url = make_url(url)
        self.sqlite = self.url.get_backend_name() == "sqlite"
        self.busy_seconds = busy_seconds
        if self.url.get_backend_name() == "postgresql" and "+" not in self.url.drivername:
            self.url = self.url.set(drivername="postgresql+psycopg")
        self._writing = threading.Lock()
        self.engine = self._sqlite_engine() if self.sqlite else self._server_engine()

    @property
    def file(self) -> Path | None:
        """The file of a SQLite database."""
        return Path(self.url.database) if self.sqlite and self.url.database else None

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for reading."""
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction, committed at the end. On SQLite one at a time.

        Raises:
            OperationalError: somebody else has been writing for ``busy_seconds``, or the disk is full.
        """
        if not self.sqlite:
            with self.engine.begin() as connection:
                yield connection
            return
        if not self._writing.acquire(timeout=self.busy_seconds):
            raise OperationalError("BEGIN IMMEDIATE", None, sqlite3.OperationalError("database is locked"))
        try:
            with self.engine.connect().execution_options(immediate=True) as connection, connection.begin():
                yield connection
        finally:
            self._writing.release()

    def upgrade(self) -> None:
        """Bring the tables to this version; at the same time from several processes, too."""
        config = _alembic()
        with self.write() as connection:
            if not self.sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def revisions(self) -> tuple[str | None, str | None]:
        """The revision of the tables, and the one that this version wants."""
        with self.read() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        return current, ScriptDirectory.from_config(_alembic()).get_current_head()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def _sqlite_engine(self) -> Engine:
        if self.file is None or self.url.database == ":memory:":
            raise ValueError(
                f"database_url={self.url.render_as_string()!r}: give a file, such as sqlite:///plans.sqlite3"
            )
        self.file.parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(self.url, pool_size=8, max_overflow=40, connect_args={"timeout": self.busy_seconds})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine

    def _server_engine(self) -> Engine:
        waiting = f"-c lock_timeout={round(self.busy_seconds * 1000)}"
        arguments = {"connect_timeout": max(1, round(self.busy_seconds)), "options": waiting}
        return create_engine(self.url, pool_size=8, max_overflow=8, pool_pre_ping=True, connect_args=arguments)


def now() -> float:
    """The time that is written into the tables."""
    return time.time()


def is_full(error: DBAPIError) -> bool:
    """Whether the disk is full, or the database as large as it may be."""
    cause = error.orig
    full = getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return full or getattr(cause, "sqlstate", None) == "53100"


def _prepare_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # transactions begin where we say, see _begin_sqlite
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config
