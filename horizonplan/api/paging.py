"""How lists are read in parts, and how times are written."""

import base64
from datetime import UTC, datetime

from horizonplan.api.problems import Problem


def cursor_of(kind: str, number: int) -> str:
    """A cursor that stands after a row."""
    return base64.urlsafe_b64encode(f"{kind}:{number}".encode()).decode().rstrip("=")


def number_of(kind: str, cursor: str) -> int:
    """The row that a cursor stands after.

    Raises:
        Problem: 422, it is no cursor, or one of another list.
    """
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
        found, _, number = text.partition(":")
        if found == kind and number.isdecimal() and cursor_of(kind, int(number)) == cursor and int(number) < 2**31:
            return int(number)
    except ValueError:
        pass
    message = "this is no cursor of ours; send next_cursor of an answer, or none to begin"
    raise Problem(422, f"cursor: {message}", "invalid", [("cursor", message)])


def iso(seconds: float) -> str:
    """A time in UTC, such as ``2026-01-31T12:00:00.000Z``."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
