"""Breaker: takes a tier out of service when its medium fails, and says when to ask it again.

One breaker guards one direction (read or write) of one tier. It opens after a number of consecutive
errors, or when any operation has not answered within the deadline. While open, the tier counts as not
there; after the retry time somebody is told to probe, and a good probe closes it.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kvstrata.telemetry import Telemetry

LOOKS_PER_DEADLINE = 50
"""So often does `closed` ask for what hangs, at most."""


class Breaker:
    """tier, op: names for telemetry. failures: consecutive errors that open it."""

    def __init__(
        self,
        tier: str,
        op: str,
        *,
        failures: int,
        deadline_seconds: float,
        retry_seconds: float,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tier = tier
        self.op = op
        self._failures = failures
        self._deadline_seconds = deadline_seconds
        self._retry_seconds = retry_seconds
        self._telemetry = telemetry
        self._clock = clock
        self._lock = threading.Lock()
        self._oldest: Callable[[], float] = lambda: 0.0
        self._forgive: Callable[[], None] = lambda: None
        self._look_at = 0.0
        self._running: dict[int, float] = {}
        self._token = 0
        self._failed = 0
        self._open_reason = ""
        self._retry_at = 0.0
        self._probing = False

    def watch_engine(self, oldest: Callable[[], float], forgive: Callable[[], None]) -> None:
        """oldest: seconds since an engine began what it has been at for longest; forgive: forget those."""
        self._oldest = oldest
        self._forgive = forgive

    @property
    def closed(self) -> bool:
        """In service? Cheap: looks at the oldest running operation only, and not every time."""
        opened = ""
        with self._lock:
            now = self._clock()
            if not self._open_reason and now >= self._look_at:
                self._look_at = now + self._deadline_seconds / LOOKS_PER_DEADLINE
                oldest = self._oldest()
                if self._running:
                    oldest = max(oldest, now - next(iter(self._running.values())))
                if oldest > self._deadline_seconds:
                    opened = f"no answer for {self._deadline_seconds:g} s"
                    self._open(opened)
            closed = not self._open_reason
        if opened:
            self._announce(opened)
        return closed

    @property
    def reason(self) -> str:
        """Why it is open; empty while closed."""
        return self._open_reason

    @contextmanager
    def watch(self, *, count_errors: bool = True) -> Iterator[None]:
        """One operation on the medium; an OSError counts against it and goes on to the caller.

        count_errors: False where an error has an answer of its own, and only a hang counts.
        """
        with self._lock:
            self._token += 1
            token = self._token
            self._running[token] = self._clock()
        try:
            yield
        except OSError as error:
            if count_errors:
                self._end(token, error)
            else:
                self._end_silently(token)
            raise
        except BaseException:
            self._end(token, None)
            raise
        self._end(token, None)

    def _end_silently(self, token: int) -> None:
        with self._lock:
            self._running.pop(token, None)

    def _end(self, token: int, error: OSError | None) -> None:
        opened = ""
        with self._lock:
            self._running.pop(token, None)
            if error is None:
                self._failed = 0
            else:
                self._failed += 1
                if self._failed >= self._failures and not self._open_reason:
                    opened = f"{self._failed} errors in a row, the last: {error}"
                    self._open(opened)
        if error is not None:
            name = errno.errorcode.get(error.errno or 0, "unknown")
            self._telemetry.count("io_errors_total", self.tier, self.op, name)
        if opened:
            self._announce(opened)

    def saw(self, errors: Sequence[int]) -> None:
        """How operations of an engine ended, in their order: 0, or an errno."""
        if not any(errors):
            self._failed = 0 if errors else self._failed
            return
        for number in errors:
            self._end(-1, OSError(number, os.strerror(number)) if number else None)

    def trip(self, reason: str) -> None:
        """Open at once, for a reason seen from outside."""
        with self._lock:
            was_open = bool(self._open_reason)
            self._open(reason)
        if not was_open:
            self._announce(reason)

    def _open(self, reason: str) -> None:
        self._open_reason = reason
        self._retry_at = self._clock() + self._retry_seconds

    def _announce(self, reason: str) -> None:
        self._telemetry.count("breaker_opened_total", self.tier, self.op)
        self._telemetry.event(f"{self.tier} {self.op} unavailable", reason)

    def wants_probe(self) -> bool:
        """True once per retry time while open: the caller must then probe and call `probed`."""
        with self._lock:
            if not self._open_reason or self._probing or self._clock() < self._retry_at:
                return False
            self._probing = True
            return True

    def probed(self, error: Exception | None) -> None:
        """The medium answered a probe."""
        with self._lock:
            self._probing = False
            if error is None:
                self._open_reason = ""
                self._failed = 0
                # What still hangs from before says nothing about the medium now.
                self._running.clear()
                self._forgive()
            else:
                self._open(str(error))
        number = error.errno if isinstance(error, OSError) else None
        result = "good" if error is None else errno.errorcode.get(number or 0, "bad")
        self._telemetry.count("probes_total", self.tier, self.op, result)
        if error is None:
            self._telemetry.event(f"{self.tier} {self.op} available again", "a probe succeeded")
