"""Strikes: which blocks could not be read. An error of the medium costs no block that is well after it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kvstrata.types import BlockKey

REMEMBERED = 65_536
"""So many blocks are remembered, the oldest are forgotten first."""


class Strikes:
    """A block is lost when its read fails again, not sooner than pause_seconds after the first time.

    Those that fail together, before the tier is taken out of service, have failed once. Thread-safe.
    """

    def __init__(self, pause_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._pause_seconds = pause_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._since: dict[BlockKey, float] = {}

    def out(self, key: BlockKey) -> bool:
        """Its read failed just now: is it lost?"""
        now = self._clock()
        with self._lock:
            since = self._since.setdefault(key, now)
            if now - since > self._pause_seconds:
                del self._since[key]
                return True
            while len(self._since) > REMEMBERED:
                self._since.pop(next(iter(self._since)))
            return False
