"""What a study remembers of how it was asked for, so that it is gone on with by the same and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any


def remembered(value: Any) -> Any:
    """A value as JSON keeps it: a function or class by its name, another object by that of its class.

    >>> remembered({"optimizer": partial(dict, lr=0.1), "scales": (1, math.inf), "limit": None})
    {'optimizer': ['dict', [], {'lr': 0.1}], 'scales': [1, 'inf'], 'limit': None}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): remembered(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [remembered(one) for one in value]
    if isinstance(value, partial):
        return remembered([value.func, value.args, value.keywords])
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def compare(record: Mapping[str, Any], settings: Mapping[str, Any], name: str) -> None:
    """See that a study is gone on with as it was begun.

    Args:
        record: what it keeps.
        settings: what is asked for now, as :func:`remembered` gives it.
        name: of the study.

    Raises:
        ValueError: it was made with other settings.
    """
    where = f"the study {name!r} in this storage"
    for key, value in settings.items():
        if key not in record["settings"]:
            raise ValueError(f"{key}={value!r}: {where} does not say what it was made with; give another name.")
        if (then := record["settings"][key]) != value:
            raise ValueError(f"{key}={value!r}: {where} was made with {then!r}; give that, or another name.")


def as_json(value: Any) -> Any:
    """The value as it comes back from a file."""
    return json.loads(json.dumps(value, allow_nan=False))
