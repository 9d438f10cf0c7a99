"""The run's log, one JSON object a line. A resumed run goes on with it from where its checkpoint was written."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from horizonplan.training.checkpoint import CheckpointError

NAME = "log.jsonl"


class Log:
    """Events of a run in ``folder/log.jsonl``; without a folder they go nowhere.

    Args:
        folder: the run's folder, which exists.
        keep_bytes: how much of a log that is there already to keep.
    """

    def __init__(self, folder: Path | None = None, keep_bytes: int = 0) -> None:
        self.path = None if folder is None else folder / NAME
        self.file: IO[bytes] | None = None
        if self.path is not None:
            self.file = self.path.open("r+b" if keep_bytes else "wb")
            self.file.truncate(keep_bytes)
            self.file.seek(keep_bytes)

    def event(self, kind: str, **values: Any) -> None:
        """Write one event.

        Raises:
            CheckpointError: it cannot be written; the checkpoints are intact.
        """
        if self.file is None:
            return
        line = json.dumps({"time": time.time(), "event": kind, **values}, default=str) + "\n"
        try:
            self.file.write(line.encode())
            self.file.flush()
        except OSError as error:
            raise self._lost(error) from error

    def sync(self) -> int:
        """Put the log on the disk for good; returns its bytes."""
        if self.file is None:
            return 0
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._lost(error) from error
        return self.file.tell()

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            try:
                self.file.close()
            except OSError as error:
                raise self._lost(error) from error

    def _lost(self, error: OSError) -> CheckpointError:
        with suppress(OSError):
            if self.file is not None:
                self.file.close()
        self.file = None
        reason = (error.strerror or str(error)).lower()
        return CheckpointError(
            f"{self.path}: {reason}; the checkpoints beside it are intact: make room, then go on with resume=True."
        )


def read(folder: Path, upto_bytes: int) -> list[dict[str, Any]]:
    """The events in the first bytes of a log.

    Raises:
        CheckpointError: the log is shorter than that, or no log.
    """
    path = folder / NAME
    try:
        with path.open("rb") as file:
            data = file.read(upto_bytes)
        events = [json.loads(line) for line in data.splitlines()]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; a run is resumed with the log beside its checkpoints.") from error
    if len(data) < upto_bytes:
        raise CheckpointError(
            f"{path}: {len(data)} bytes, the checkpoint knows of {upto_bytes}; bring the whole log back."
        )
    return events
