"""RemoteTransfer: a load or save that `kvstrata serve` runs for this process. The same handle as a local
one.

The server gives the outcomes. If the connection is lost first, they are UNAVAILABLE as soon as it is
certain that the server no longer touches the buffers, and LATE at the deadline if it still may: as with a
read that hangs in the kernel, such buffers are not released before that is over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from kvstrata.serving.connection import Connection
from kvstrata.serving.protocol import Kind, ProtocolError, unpack_outcomes
from kvstrata.transfer.handle import Positions, Transfer
from kvstrata.transfer.plan import Direction
from kvstrata.types import Outcome

AWAITED_SECONDS = 0.05
"""How long a lost connection is waited for at a time, before the deadline is looked at again."""

Settled = Callable[[Positions, list[Outcome]], None]
"""Hears outcomes that stand, before the caller does: what was loaded elsewhere still has to be fetched."""


class RemoteTransfer(Transfer):
    """blocks: of the whole call; `begin` says which of them the server gets.

    on_settled: see Settled. on_released: nobody of the server touches the buffers any more.
    """

    def __init__(
        self,
        direction: Direction,
        blocks: int,
        deadline_seconds: float,
        on_late: Callable[[Sequence[int]], None] = lambda positions: None,
        on_done: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        super().__init__(direction, blocks, deadline_seconds, on_late, on_done)
        self._connection: Connection | None = None
        self._number = 0
        self._with_server: Positions = np.zeros(0, dtype=np.int64)
        self._ending = threading.Lock()
        self._ended = False
        self._on_settled: Settled = _ignore
        self._on_released: Callable[[], None] = _do_nothing

    def begin(
        self,
        connection: Connection,
        kind: Kind,
        payload: bytes,
        positions: Positions,
        on_settled: Settled,
        on_released: Callable[[], None],
    ) -> None:
        """Hand these blocks to the server."""
        self._with_server = positions
        self._on_settled, self._on_released = on_settled, on_released
        self.hold(len(positions))
        self._connection = connection
        self._number = connection.start(kind, payload, self._hear)
        if not self._number:
            self._give_up()

    def _hear(self, payload: bytes, released: bool) -> None:
        with self._ending:
            if payload or not self._ended:
                if self._ended:
                    raise ProtocolError("a transfer that ended twice")
                self._end(unpack_outcomes(payload, len(self._with_server)))
            if released:
                self._release_server()

    def _end(self, outcomes: list[Outcome]) -> None:
        positions = self._with_server
        self._ended = True
        stands = self.claim(positions)
        rows = np.flatnonzero(stands)
        self._on_settled(positions[rows], [outcomes[row] for row in rows.tolist()])
        for outcome in set(outcomes):
            self.settle(positions[np.array([end is outcome for end in outcomes]) & stands], outcome)
        self.unclaim(positions)

    def _release_server(self) -> None:
        self._on_released()
        self._on_settled, self._on_released = _ignore, _do_nothing  # they hold the caller's buffers
        self.let_go(len(self._with_server))

    def _give_up(self) -> None:
        """Nothing more comes, and nobody else touches the buffers."""
        with self._ending:
            if not self._ended:
                self._end([Outcome.UNAVAILABLE] * len(self._with_server))
            self._release_server()

    def _look(self) -> None:
        """Take in what came; after a loss, ask whether the server has let go."""
        connection = self._connection
        if connection is None:
            return
        connection.take_in()
        if connection.lost and connection.gone() and connection.forget(self._number):
            self._give_up()

    @property
    def unfinished(self) -> int:
        """Blocks without an outcome."""
        return self._open

    def poll(self) -> bool:
        """Is every outcome known? Never blocks; gives the verdict LATE when the deadline has passed."""
        if self._open:
            self._look()
        return super().poll()

    def wait(self, seconds: float | None = None) -> bool:
        """Block until done, the deadline, or `seconds`; returns whether done."""
        until = self._deadline if seconds is None else min(self._deadline, time.monotonic() + seconds)
        self._await(lambda: not self._open, until)
        return self.poll()

    def wait_released(self, seconds: float) -> bool:
        """Block until no process touches the buffers; False if that took longer than `seconds`."""
        self._await(lambda: not self._held, time.monotonic() + seconds)
        return not self._held

    def _await(self, ready: Callable[[], bool], until: float) -> None:
        connection = self._connection
        while not ready() and (left := until - time.monotonic()) > 0:
            if connection is not None and not connection.lost:
                connection.read_until(ready, until)
            elif connection is not None:
                connection.gone(min(left, AWAITED_SECONDS))
                self._look()

    @property
    def released(self) -> bool:
        """Done, and the caller may do with the buffers what it likes."""
        if self._held:
            self._look()
        return super().released


def _ignore(positions: Positions, outcomes: list[Outcome]) -> None:
    pass


def _do_nothing() -> None:
    pass
