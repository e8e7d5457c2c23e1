"""Transfer: the handle of a running load or save.

Two moments matter to a caller. *done*: every block has its outcome. *released*: no thread touches the
caller's buffers any more. They differ only when a deadline passes while the medium does not answer: the
verdict LATE is given at once, but a read that is already in the kernel may still write into its target,
so the target must not be reused before *released*.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum

from kvstrata.transfer.plan import Direction
from kvstrata.types import Outcome


class Start(Enum):
    """Answer of `Transfer.begin`."""

    GO = "go"
    CANCELLED = "cancelled"


class Transfer:
    """blocks: how many outcomes there will be. deadline_seconds: from now, measured on time.monotonic.

    on_late is called once, outside the lock, with the positions that the deadline cut off.
    """

    def __init__(
        self,
        direction: Direction,
        blocks: int,
        deadline_seconds: float,
        on_late: Callable[[Sequence[int]], None] = lambda positions: None,
        on_done: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.direction = direction
        self._changed = threading.Condition()
        self._outcomes: list[Outcome | None] = [None] * blocks
        self._open = blocks
        self._running = 0
        self._claimed: set[int] = set()
        self._started = time.monotonic()
        self._deadline = self._started + deadline_seconds
        self._on_late = on_late
        self._on_done = on_done
        self._announced = False

    def begin(self) -> Start:
        """A worker is about to touch the buffers. CANCELLED: the deadline has passed, do not."""
        self.poll()
        with self._changed:
            if self._open == 0:
                return Start.CANCELLED
            self._running += 1
            return Start.GO

    def late(self, position: int) -> bool:
        """Has the deadline cut this block off? Then the caller may have changed its buffer already."""
        self.poll()
        with self._changed:
            return self._outcomes[position] is Outcome.LATE

    def claim(self, position: int) -> bool:
        """From here on the deadline leaves this block alone: its worker is about to finish it.

        False if the verdict was LATE before; the worker then has to undo what it did.
        """
        with self._changed:
            if self._outcomes[position] is not None:
                return False
            self._claimed.add(position)
            return True

    def unclaim(self, position: int) -> None:
        """The deadline holds again for this block: what is left to do may hang."""
        with self._changed:
            self._claimed.discard(position)

    def finish(self, position: int, outcome: Outcome) -> bool:
        """The worker that began is through with one block; False if the verdict was LATE before."""
        with self._changed:
            self._running -= 1
            self._claimed.discard(position)
            stands = self._set(position, outcome)
            self._changed.notify_all()
        self._announce()
        return stands

    def settle(self, position: int, outcome: Outcome) -> None:
        """Give the outcome of a block that no worker has to touch."""
        with self._changed:
            self._set(position, outcome)
            self._changed.notify_all()
        self._announce()

    def _set(self, position: int, outcome: Outcome) -> bool:
        if self._outcomes[position] is not None:
            return False
        self._outcomes[position] = outcome
        self._open -= 1
        return True

    def poll(self) -> bool:
        """Is every outcome known? Never blocks; gives the verdict LATE when the deadline has passed."""
        late: list[int] = []
        with self._changed:
            if self._open and time.monotonic() >= self._deadline:
                late = [
                    position
                    for position, outcome in enumerate(self._outcomes)
                    if outcome is None and position not in self._claimed
                ]
                for position in late:
                    self._set(position, Outcome.LATE)
                self._changed.notify_all()
            done = self._open == 0
        if late:
            self._on_late(late)
        if done:
            self._announce()
        return done

    def _announce(self) -> None:
        with self._changed:
            if self._open or self._announced:
                return
            self._announced = True
            seconds = time.monotonic() - self._started
        self._on_done(seconds)

    def wait(self, seconds: float | None = None) -> bool:
        """Block until done, the deadline, or `seconds`; returns whether done."""
        until = self._deadline if seconds is None else min(self._deadline, time.monotonic() + seconds)
        with self._changed:
            while self._open and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
        return self.poll()

    def wait_released(self, seconds: float) -> bool:
        """Block until no thread touches the buffers; False if that took longer than `seconds`."""
        until = time.monotonic() + seconds
        with self._changed:
            while self._running and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return not self._running

    @property
    def done(self) -> bool:
        return self.poll()

    @property
    def released(self) -> bool:
        """Done, and the caller may do with the buffers what it likes."""
        with self._changed:
            return self._open == 0 and self._running == 0

    @property
    def outcomes(self) -> list[Outcome]:
        """One per block. Only when done."""
        with self._changed:
            known = [outcome for outcome in self._outcomes if outcome is not None]
        assert len(known) == len(self._outcomes), "outcomes were read before the transfer was done"
        return known

    @property
    def started_monotonic(self) -> float:
        return self._started
