"""Sizes, counts and durations between people and numbers: ``"24GiB"`` at the edges, plain bytes inside.

Binary units (KiB, MiB, GiB, TiB) are powers of 1024, decimal ones (KB, MB, GB, TB) powers of 1000.
"""

import math
import re
from fractions import Fraction
from numbers import Integral, Real

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL = ("B", "KB", "MB", "GB", "TB")
_FACTOR = {unit.lower(): 1024**power for power, unit in enumerate(_BINARY)}
_FACTOR |= {unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL)}
_SIZE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def parse_bytes(size: int | float | str, name: str = "size", minimum: int = 1) -> int:
    """Turn a size into whole bytes; a fraction of a byte is dropped, so a limit is never widened.

    Args:
        size: A number of bytes, or a string such as ``"24GiB"``, ``"1.5 gb"``, ``"4096"``.
        name: The parameter to name in the error.
        minimum: The smallest size that makes sense, in bytes.

    Returns:
        The size in bytes.

    Raises:
        ValueError: If ``size`` is no size (a boolean, a negative number, NaN, an unknown unit) or below ``minimum``.

    Example:
        >>> parse_bytes("24GiB"), parse_bytes("1.5 kb"), parse_bytes(4096)
        (25769803776, 1500, 4096)
        >>> parse_bytes("24 apples", name="limit")
        Traceback (most recent call last):
        ValueError: limit='24 apples' is not a size; give whole bytes >= 1 or a string such as '24GiB' or '512MB'
    """
    value = _exact(size)
    if value is None or value < minimum:
        raise ValueError(
            f"{name}={size!r} is not a size; give whole bytes >= {minimum} or a string such as '24GiB' or '512MB'"
        )
    return value


def _exact(size: object) -> int | None:
    """Bytes by exact arithmetic, or None for what is no size."""
    if isinstance(size, bool):
        return None
    if isinstance(size, Integral):
        return int(size)
    if isinstance(size, Real):
        return math.floor(float(size)) if math.isfinite(size) else None
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None or (factor := _FACTOR.get(match[2].lower() or "b")) is None:
        return None
    return int(Fraction(match[1]) * factor)


def format_bytes(size_bytes: float) -> str:
    """Write bytes in the largest binary unit that leaves at least one of it.

    Example:
        >>> format_bytes(24 * 1024**3), format_bytes(512), format_bytes(-1536)
        ('24.0 GiB', '512 B', '-1.5 KiB')
    """
    return _scaled(size_bytes, 1024, _BINARY)


def format_count(flops: float) -> str:
    """Write a number of floating-point operations in powers of 1000.

    Example:
        >>> format_count(1_230_000_000), format_count(999)
        ('1.2 GFLOP', '999 FLOP')
    """
    return _scaled(flops, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def format_seconds(seconds: float) -> str:
    """Write a duration in the unit a reader would choose.

    Example:
        >>> format_seconds(0.0123), format_seconds(2.5), format_seconds(125), format_seconds(7300)
        ('12.3 ms', '2.5 s', '2 min 5 s', '2 h 1 min')
    """
    if not 59.95 <= seconds < math.inf:  # 59.95 s would print as 60.0 s
        return _scaled(seconds * 1e6, 1000, ("µs", "ms", "s"))
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while round(abs(value), 1 if power else 0) >= base and power < len(units) - 1:  # rounded: never "1024.0 MiB"
        value, power = value / base, power + 1
    return f"{value:.{1 if power else 0}f} {units[power]}"
