"""Loads and saves that run for one client of `kvstrata serve`: begun within its bounds, and watched.

One thread tells the client of every end, through the session. No memory is mapped or unmapped here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvstrata.config import ServeConfig
from kvstrata.serving.protocol import RELEASED_TOO, Kind, Move, ProtocolError, pack, pack_outcomes
from kvstrata.store import BlockStore
from kvstrata.telemetry import Telemetry
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.handle import Mask, Transfer
from kvstrata.types import Lookup, Outcome, PrefixMatch

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.001
"""How long a transfer that is not the oldest may be over before its client hears of it."""


@dataclass(slots=True)
class _Running:
    """A transfer on behalf of the client. refused: positions that were over its bound."""

    number: int
    transfer: Transfer
    size: int
    refused: Mask
    blocks: int
    told: bool = False


class ClientTransfers:
    """serve: its bounds count. say: sends to the client. on_fault: the watching failed; hang up.

    pid: of the client, for the log. name: of the thread.
    """

    def __init__(
        self,
        serve: ServeConfig,
        telemetry: Telemetry,
        say: Callable[[bytes], None],
        on_fault: Callable[[], None],
        pid: int,
        name: str,
    ) -> None:
        self._serve = serve
        self._telemetry = telemetry
        self._say = say
        self._on_fault = on_fault
        self._pid = pid
        self._changed = threading.Condition()
        self._running: dict[int, _Running] = {}
        self._held_bytes = 0
        self._ended = False
        self._watcher = threading.Thread(target=self._watch, name=name, daemon=True)

    def start(self) -> None:
        self._watcher.start()

    @property
    def held(self) -> tuple[int, int]:
        """Transfers that are running, and their bytes."""
        with self._changed:
            return len(self._running), self._held_bytes

    def end(self) -> bool:
        """No more will begin: wait until all are over. False if the watching failed before that."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._watcher.ident is not None:
            self._watcher.join()
        return not self._running

    def begin(
        self,
        store: BlockStore,
        number: int,
        move: Move,
        buffers: Buffers,
        *,
        loads: bool,
        request: int | None,
    ) -> None:
        """What the client asked for under this number, as far as its bounds allow. Raises ProtocolError."""
        refused = self._over_bound(buffers)
        wanted = Buffers(np.where(refused, 0, buffers.addresses), buffers.lengths, buffers.owner)
        size = int(buffers.lengths[~refused & (buffers.addresses != 0)].sum())
        blocks = len(move.keys)
        if loads:
            leading = int(np.argmax(refused)) if refused.any() else blocks
            keys = (*move.keys[:leading], *(move.ahead if leading == blocks else ()))
            match = PrefixMatch(keys, leading, (Lookup.HIT,) * len(keys))
            transfer = store.load(match, wanted.take(np.arange(leading)))
        else:
            transfer = store.save(move.keys, wanted, request=request)
        with self._changed:
            if number in self._running:
                raise ProtocolError(f"transfer {number} twice")
            self._running[number] = _Running(number, transfer, size, refused, blocks)
            self._held_bytes += size
            self._changed.notify_all()

    def _over_bound(self, buffers: Buffers) -> Mask:
        """Which blocks pass what this client may have in flight: all behind the first that does."""
        with self._changed:
            room = self._serve.client_bytes - self._held_bytes
            if len(self._running) >= self._serve.client_transfers:
                room = -1
        refused: Mask = (np.cumsum(buffers.lengths) > room) & (buffers.addresses != 0)
        bound = "client_transfers" if room < 0 else "client_bytes"
        self._telemetry.count("serve_rejected_total", bound, by=int(refused.sum()))
        return refused

    # The thread that watches

    def _watch(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._running and not self._ended:
                        self._changed.wait()
                    if not self._running:
                        return
                    running = list(self._running.values())
                if not sum(self._look_at(one) for one in running):
                    _wait_for(running)
        except Exception:
            log.exception("kvstrata: watching the transfers of process %d failed", self._pid)
            self._on_fault()

    def _look_at(self, one: _Running) -> bool:
        """Tell the client what is new. True if something is."""
        transfer = one.transfer
        if not one.told:
            if not transfer.poll():
                return False
            released = transfer.released
            one.told = True
            flags = RELEASED_TOO if released else 0
            self._let_go(one, released)
            self._say(pack(Kind.DONE, one.number, pack_outcomes(_outcomes(one)), flags))
            return True
        if transfer.released:
            self._let_go(one, released=True)
            self._say(pack(Kind.RELEASED, one.number))
            return True
        return False

    def _let_go(self, one: _Running, released: bool) -> None:
        if released:
            with self._changed:
                del self._running[one.number]
                self._held_bytes -= one.size


def _outcomes(one: _Running) -> list[Outcome]:
    """In the order of the blocks that the client named."""
    outcomes = one.transfer.outcomes
    outcomes += [Outcome.REJECTED] * (one.blocks - len(outcomes))
    for position in np.flatnonzero(one.refused).tolist():
        if outcomes[position] is Outcome.ABSENT:
            outcomes[position] = Outcome.REJECTED
    return outcomes


def _wait_for(running: list[_Running]) -> None:
    """Until the oldest that is not over is, or for a moment."""
    for one in running:
        if not one.told:
            one.transfer.wait(WATCH_SECONDS)
            return
    running[0].transfer.wait_released(WATCH_SECONDS)
