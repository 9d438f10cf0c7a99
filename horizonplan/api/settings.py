"""What an operator sets: by environment variables ``HORIZONPLAN_...``, or as options of ``horizonplan serve``."""

import ipaddress
import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from horizonplan.api.job_settings import JobSettings


def default_database_url() -> str:
    """A SQLite file in the user's data folder, the same from whatever folder the service is started."""
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return f"sqlite:///{home / 'horizonplan' / 'horizonplan.sqlite3'}"


class Settings(BaseSettings):
    """The settings of a service.

    Attributes:
        database_url: as SQLAlchemy writes it: ``sqlite:////srv/plans.sqlite3``, ``postgresql://user@host/name``.
        host: the address listened on. Beyond this machine every request needs a key.
        port: the port listened on.
        require_keys: whether requests from this machine need a key too.
        max_body_bytes: the largest request body.
        max_depth: the most blocks that a plan may have.
        busy_seconds: how long a request waits for a locked database.
        min_free_bytes: with less free disk than that the service is not ready.
        shutdown_seconds: how long open requests may go on after a signal to stop.
        jobs: limits of jobs, and who runs them.
    """

    model_config = SettingsConfigDict(env_prefix="HORIZONPLAN_", env_nested_delimiter="__", frozen=True)

    database_url: str = Field(default_factory=default_database_url)
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    require_keys: bool = False
    max_body_bytes: int = Field(1024**2, ge=1024)
    max_depth: int = Field(1024, ge=2, le=10_000)
    busy_seconds: float = Field(3.0, gt=0, le=60)
    min_free_bytes: int = Field(64 * 1024**2, ge=0)
    shutdown_seconds: int = Field(3, ge=1, le=60)
    jobs: JobSettings = JobSettings()

    @property
    def local(self) -> bool:
        """Whether the service listens on this machine only."""
        return is_loopback(self.host)

    @property
    def keys_required(self) -> bool:
        """Whether a request needs a key."""
        return self.require_keys or not self.local


def is_loopback(host: str) -> bool:
    """Whether a host name or address stands for this machine alone."""
    name = host.strip("[]").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
