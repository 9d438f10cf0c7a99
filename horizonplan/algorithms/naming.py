"""A method's short name: its class, and the settings that are not the defaults."""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from horizonplan.algorithms.base import Algorithm

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def short_name(algorithm: Algorithm) -> str:
    """A method in short, the same in every process: for tables, where its whole ``repr`` would be too long.

    >>> from horizonplan.algorithms import SGR
    >>> short_name(SGR(modules=3)), short_name(SGR(modules=3, weight=0.0))
    ('SGR(modules=3)', 'SGR(modules=3, weight=0.0)')
    """
    kind = type(algorithm)
    if not is_dataclass(algorithm):
        return kind.__name__ if kind.__repr__ is object.__repr__ else str(algorithm)
    values = {f: getattr(algorithm, f.name) for f in fields(algorithm) if f.init}
    told = [f"{f.name}={in_words(value)}" for f, value in values.items() if value != _default(f)]
    return f"{kind.__name__}({', '.join(told)})"


def in_words(value: Any) -> str:
    """A setting in words that are the same in every process: functions by their names, nothing by its address.

    >>> in_words(object())
    '<object object>'
    """
    name = getattr(value, "__qualname__", None)
    return ADDRESS.sub("", repr(value)) if name is None else str(name)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
