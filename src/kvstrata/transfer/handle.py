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
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvstrata.transfer.plan import Direction
from kvstrata.types import Outcome

Positions = NDArray[np.int64]
Mask = NDArray[np.bool_]

_OUTCOMES = list(Outcome)
_CODE = {outcome: code for code, outcome in enumerate(_OUTCOMES)}
_OPEN = -1
_LATE = _CODE[Outcome.LATE]


class Cancellable(Protocol):
    """Blocks of a transfer that wait in an engine's queue."""

    def cancel(self) -> Positions:
        """Take back those that nobody has begun: nobody will touch their buffers."""

    def help(self) -> None:
        """Take in what is done, if nobody else is at it."""

    def wait(self, until: float) -> None:
        """Wait for what an engine is at, to a moment of time.monotonic at most."""


@runtime_checkable
class Abandonable(Cancellable, Protocol):
    """A batch whose rows may read into a place of their own, and are copied to the caller from there."""

    def abandon(self, positions: Positions) -> Positions:
        """Which of these have begun, and will not be copied to the caller any more."""


class Batches:
    """Several as one."""

    def __init__(self, batches: Sequence[Cancellable]) -> None:
        self._batches = batches

    def cancel(self) -> Positions:
        return np.concatenate([batch.cancel() for batch in self._batches])

    def abandon(self, positions: Positions) -> Positions:
        """Of those that can; see `Abandonable`."""
        none = np.zeros(0, dtype=np.int64)
        parts = [batch.abandon(positions) for batch in self._batches if isinstance(batch, Abandonable)]
        return np.concatenate([none, *parts])

    def help(self) -> None:
        for batch in self._batches:
            batch.help()

    def wait(self, until: float) -> None:
        for batch in self._batches:
            batch.wait(until)


class Transfer:
    """blocks: how many outcomes there will be. deadline_seconds: from now, measured on time.monotonic.

    on_late is called once, outside the lock, with the positions that the deadline cut off; on_done with
    the seconds that it all took.
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
        self._codes = np.full(blocks, _OPEN, dtype=np.int8)
        self._claimed = np.zeros(blocks, dtype=np.bool_)
        self._open = blocks
        self._held = 0
        self._started = time.monotonic()
        self._deadline = self._started + deadline_seconds
        self._on_late = on_late
        self._on_done = on_done
        self._announced = False
        self._cut_off = False
        self._alarms: list[tuple[float, Callable[[], None]]] = []
        self._rang = False
        self._batches: list[tuple[Cancellable, Callable[[Positions], None]]] = []

    @property
    def deadline_ns(self) -> int:
        """When it passes, of time.monotonic_ns."""
        return int(self._deadline * 1e9)

    # What the store does with it

    def hold(self, blocks: int) -> None:
        """So many buffers are about to be handed to an engine; each is let go by `finish` or `let_go`."""
        with self._changed:
            self._held += blocks

    def let_go(self, blocks: int) -> None:
        """Nobody touches so many buffers any more; their outcomes are known already."""
        with self._changed:
            self._release(blocks)

    def attach(self, batch: Cancellable, on_cancel: Callable[[Positions], None]) -> None:
        """What to take back when the deadline passes; on_cancel hears which blocks were never begun."""
        with self._changed:
            if not self._open and not self._held:
                return  # all over already: nothing would let go of the batch
            self._batches.append((batch, on_cancel))
            cut_off = self._cut_off
        if cut_off:
            self._take_back()

    def after(self, seconds: float, alarm: Callable[[], None]) -> None:
        """Call this so long from now, if not all is known by then: by whoever polls or waits."""
        moment = time.monotonic() + seconds
        if moment < self._deadline:
            with self._changed:
                self._alarms.append((moment, alarm))

    def claim(self, positions: Positions) -> Mask:
        """From here on the deadline leaves these blocks alone: somebody is about to finish them.

        False where the verdict was LATE before: what was done for those has to be undone.
        """
        with self._changed:
            mine: Mask = self._codes[positions] == _OPEN
            self._claimed[positions[mine]] = True
            return mine

    def unclaim(self, positions: Positions) -> None:
        """The deadline holds again for these blocks: what is left to do may hang."""
        with self._changed:
            self._claimed[positions] = False

    def finish(self, positions: Positions, outcomes: Sequence[Outcome]) -> Mask:
        """The engine is through with these blocks; False where the verdict was LATE before."""
        codes = np.array([_CODE[outcome] for outcome in outcomes], dtype=np.int8)
        with self._changed:
            self._claimed[positions] = False
            stands = self._set(positions, codes)
            self._release(len(positions))
        self._announce()
        return stands

    def _release(self, blocks: int) -> None:
        self._held -= blocks
        if not self._open and not self._held:
            self._batches.clear()  # they hold the caller's buffers
            self._alarms.clear()
        self._changed.notify_all()

    def settle(self, positions: Sequence[int] | Positions, outcome: Outcome) -> None:
        """Give the outcome of blocks that no engine has to touch."""
        if not len(positions):
            return
        with self._changed:
            self._set(np.asarray(positions, dtype=np.int64), _CODE[outcome])
            self._changed.notify_all()
        self._announce()

    def _set(self, positions: Positions, codes: Any) -> Mask:
        fresh: Mask = self._codes[positions] == _OPEN
        self._codes[positions] = np.where(fresh, codes, self._codes[positions])
        self._open -= int(fresh.sum())
        return fresh

    def _announce(self) -> None:
        with self._changed:
            if self._open or self._announced:
                return
            self._announced = True
            seconds = time.monotonic() - self._started
        self._on_done(seconds)

    # What a caller asks

    def poll(self) -> bool:
        """Is every outcome known? Never blocks; gives the verdict LATE when the deadline has passed."""
        if self._open:
            for batch, _ in list(self._batches):
                batch.help()
        if self._alarms and self._open:
            self._ring()
        late: Positions = np.zeros(0, dtype=np.int64)
        with self._changed:
            if self._open and time.monotonic() >= self._deadline:
                late = np.flatnonzero((self._codes == _OPEN) & ~self._claimed)
                self._set(late, _LATE)
                self._cut_off |= len(late) > 0
                self._changed.notify_all()
            done = self._open == 0
        if len(late):
            self._on_late(late.tolist())
            self._take_back()
        if done:
            self._announce()
        return done

    def _ring(self) -> None:
        now = time.monotonic()
        with self._changed:
            due = [alarm for moment, alarm in self._alarms if moment <= now]
            self._alarms = [one for one in self._alarms if one[0] > now]
            self._rang |= len(due) > 0
        for alarm in due:
            alarm()

    def _take_back(self) -> None:
        for batch, on_cancel in list(self._batches):
            positions = batch.cancel()
            if len(positions):
                on_cancel(positions)
                self.let_go(len(positions))

    def wait(self, seconds: float | None = None) -> bool:
        """Block until done, the deadline, or `seconds`; returns whether done."""
        until = self._deadline if seconds is None else min(self._deadline, time.monotonic() + seconds)
        while self._alarms and self._open and time.monotonic() < until:
            alarms = [moment for moment, _ in list(self._alarms)]
            self._wait(min([until, *alarms]))
            self.poll()
        self._wait(until)
        return self.poll()

    def _wait(self, until: float) -> None:
        # When an alarm has rung, a batch may hang whose blocks come from elsewhere by now.
        for batch, _ in list(self._batches) if not self._rang else ():
            batch.wait(until)
        with self._changed:
            while self._open and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)

    def wait_released(self, seconds: float) -> bool:
        """Block until no thread touches the buffers; False if that took longer than `seconds`."""
        until = time.monotonic() + seconds
        with self._changed:
            while self._held and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return not self._held

    @property
    def done(self) -> bool:
        return self.poll()

    @property
    def released(self) -> bool:
        """Done, and the caller may do with the buffers what it likes."""
        with self._changed:
            return self._open == 0 and self._held == 0

    @property
    def outcomes(self) -> list[Outcome]:
        """One per block. Only when done."""
        with self._changed:
            assert not self._open, "outcomes were read before the transfer was done"
            return [_OUTCOMES[code] for code in self._codes.tolist()]
