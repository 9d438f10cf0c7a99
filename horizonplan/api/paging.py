"""How lists are read in parts, and how times are written."""

from datetime import UTC, datetime
from typing import Any

from fastapi import Query


def cursor_query(kind: str) -> Any:
    """A query parameter that holds a cursor of one list."""
    return Query(pattern=f"^{kind}-[1-9][0-9]{{0,17}}$", description="`next_cursor` of the last answer.")


def cursor_of(kind: str, number: int) -> str:
    """A cursor that stands after a row, such as ``plan-12``."""
    return f"{kind}-{number}"


def number_of(cursor: str) -> int:
    """The row that a cursor stands after."""
    return int(cursor.rpartition("-")[2])


def iso(seconds: float) -> str:
    """A time in UTC, such as ``2026-01-31T12:00:00.000Z``."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
