"""Which way blocks move."""

from __future__ import annotations

from enum import Enum


class Direction(Enum):
    """Loads are waited for by a request; stores are not. Engines run loads first."""

    LOAD = "load"
    STORE = "store"
