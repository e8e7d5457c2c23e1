"""Fields of JSON records, checked: a value of the right kind, or ValueError with the reason.

For the readers of JSON traces, which turn the reason into an error that names file and record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_COUNT = 1 << 53
"""Larger counts are no counts."""

Record = Mapping[str, Any]
_ABSENT = object()


def parse_json(text: bytes) -> Any:
    """Like `json.loads`; nesting without end is a ValueError too."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as why:
        raise ValueError(f"no JSON ({why.msg} at line {why.lineno}, column {why.colno})") from why
    except UnicodeDecodeError as why:
        raise ValueError(f"no JSON (byte {why.start} is no UTF-8)") from why
    except RecursionError as why:
        raise ValueError("JSON that is nested too deeply") from why


def parse_record(value: object) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{_shown(value)} where a JSON object belongs")
    return value


def number(record: Record, name: str) -> float:
    """A finite number."""
    value = record.get(name, _ABSENT)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_COUNT:
        return float(value)
    raise ValueError(_wrong(name, value, "a number"))


def count(record: Record, name: str) -> int | None:
    """A whole number from 0; None where it is absent or null."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT:
        whole = math.floor(value)
        if whole == value:
            return whole
    raise ValueError(_wrong(name, value, "a whole number from 0"))


def label(record: Record, name: str) -> str | None:
    """A string; None where it is absent or null."""
    value = record.get(name)
    if value is None or isinstance(value, str):
        return value
    raise ValueError(_wrong(name, value, "a string"))


def items(record: Record, name: str) -> list[Any]:
    value = record.get(name, _ABSENT)
    if not isinstance(value, list):
        raise ValueError(_wrong(name, value, "a list"))
    return value


def block_ids(record: Record, name: str) -> NDArray[np.int64] | NDArray[np.uint64]:
    """A list of integers of 64 bits, none of them twice: a chain cannot come back to a block."""
    values = items(record, name)
    if not values:
        return np.zeros(0, np.int64)
    if not set(map(type, values)) <= {int}:
        raise ValueError(f"{name} is no list of integers")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} has a block twice")
    try:
        if max(values) >= 1 << 63:
            return np.array(values, np.uint64)
        return np.array(values, np.int64)
    except OverflowError as why:
        raise ValueError(f"{name} is no list of integers of 64 bits") from why


def _wrong(name: str, value: object, wanted: str) -> str:
    return f"no {name}" if value is _ABSENT else f"{name} is {_shown(value)}, not {wanted}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
