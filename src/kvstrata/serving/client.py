"""RemoteStore: a BlockStore that lives in another process, `kvstrata serve`. Keeps no blocks itself.

Blocks go between the server's tiers and this process's memory without passing through the socket: memory
that was registered is read and written in place; the rest goes through a bounded arena that both map,
with one copy here. A server that dies or hangs is a miss, at once after the first call that notices; the
store comes back by itself, registers its memory again, and counts.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvstrata.config import Config
from kvstrata.errors import ConfigError, LayoutMismatchError
from kvstrata.serving.attachment import Attachment
from kvstrata.serving.connection import RefusedError
from kvstrata.serving.protocol import (
    AGAIN,
    AHEAD_BLOCKS,
    FRAME_BLOCKS,
    Kind,
    Move,
    ProtocolError,
    pack_end,
    pack_keys,
    pack_move,
    pack_seconds,
    pack_touch,
    unpack_count,
    unpack_json,
    unpack_states,
)
from kvstrata.serving.remote_transfer import RemoteTransfer
from kvstrata.serving.server_link import ServerLink
from kvstrata.store import Blocks, Buffer, TierStatus, block_buffers
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.base import OpenReport
from kvstrata.transfer.buffers import Buffers
from kvstrata.transfer.handle import Positions, Transfer
from kvstrata.transfer.plan import Direction
from kvstrata.types import BlockKey, BlockLayout, Lookup, Namespace, Outcome, PrefixMatch

TIER = "served"
"""Stands for all tiers of the server in this process's counters."""


class RemoteStore:
    """config: of this process; `serve.connect` names the socket. layout, namespace: as for BlockStore.

    memory: buffers to register from the start, such as an engine's host memory; what is not a shared
    mapping of a file is left to the arena. Raises ConfigError if the server refuses this client; a server
    that is not there is not an error: every look-up is a miss until it is.
    """

    def __init__(
        self,
        config: Config,
        layout: BlockLayout,
        namespace: Namespace,
        *,
        memory: Sequence[Any] = (),
        telemetry: Telemetry | None = None,
    ) -> None:
        self.config = config
        self.layout = layout
        self.namespace = namespace
        self.telemetry = telemetry or Telemetry(config.store.events)
        self._requests = itertools.count(1)
        self._link = ServerLink(config, layout, namespace, self.telemetry)
        for buffer in memory:
            self._link.remember(buffer)
        try:
            self._link.connect()
        except RefusedError as error:
            raise ConfigError(f"serve.connect {self.path}: {error}") from None

    @property
    def path(self) -> str:
        """Of the socket."""
        return self._link.path

    @property
    def connected(self) -> bool:
        """Is there a server that answers, as far as this process knows?"""
        return self._link.connected

    def register(self, buffer: Any) -> bool:
        """Let the server read and write this memory in place, now and after every reconnection.

        False for what is not one shared, writable mapping of a file: its blocks go through the arena. The
        buffer is borrowed until close().
        """
        return self._link.register(buffer)

    # Looking

    def lookup(self, keys: Sequence[BlockKey], *, again: bool = False) -> PrefixMatch:
        """As `BlockStore.lookup`; a server that does not answer has nothing."""
        states: list[Lookup] = []
        attached = self._link.live()
        for start in range(0, len(keys), FRAME_BLOCKS):
            part = keys[start : start + FRAME_BLOCKS]
            answer: bytes | None = None
            if attached is not None:
                flags = AGAIN if again else 0
                answer = self._link.call(attached, Kind.LOOKUP, pack_keys(part), flags=flags)
            if answer is None or attached is None:
                states += [Lookup.MISS] * len(part)
                continue
            try:
                states += unpack_states(answer, len(part))
            except ProtocolError:
                attached.connection.lose("protocol")
                states += [Lookup.MISS] * len(part)
        prefix = next((n for n, state in enumerate(states) if state is not Lookup.HIT), len(states))
        if not again:
            hits = len(states) if prefix == len(states) else states.count(Lookup.HIT)
            self.telemetry.count("lookups_total")
            self.telemetry.count("lookup_blocks_total", "hit", by=hits)
            self.telemetry.count("lookup_blocks_total", "miss", by=len(states) - hits)
        return PrefixMatch(tuple(keys), prefix, tuple(states))

    # Moving

    def load(self, match: PrefixMatch, targets: Sequence[Buffer] | Buffers) -> Transfer:
        """As `BlockStore.load`. Without a server every outcome is UNAVAILABLE."""
        attached = self._link.live()
        if len(targets) > len(match.keys):
            raise LayoutMismatchError(f"{len(targets)} targets for {len(match.keys)} keys")
        keys = match.keys[: len(targets)]
        buffers = block_buffers(targets, self.layout, writable=True)
        ahead = match.keys[len(keys) : len(keys) + AHEAD_BLOCKS]
        return self._move(attached, Direction.LOAD, keys, buffers, ahead=ahead)

    def save(self, keys: Sequence[BlockKey], sources: Blocks, *, request: int | None = None) -> Transfer:
        """As `BlockStore.save`. Without a server every outcome is UNAVAILABLE.

        Sources that lie in no registered memory are copied before this returns.
        """
        attached = self._link.live()
        if len(sources) != len(keys):
            raise LayoutMismatchError(f"{len(sources)} sources for {len(keys)} keys")
        most = self.config.store.batch_blocks if attached is None else attached.batch_blocks
        if len(keys) > most:
            raise LayoutMismatchError(
                f"{len(keys)} blocks in one save; store.batch_blocks of the server allows {most}"
            )
        buffers = block_buffers(sources, self.layout, writable=False)
        return self._move(attached, Direction.STORE, keys, buffers, request=request or 0)

    def _move(
        self,
        attached: Attachment | None,
        direction: Direction,
        keys: Sequence[BlockKey],
        buffers: Buffers,
        *,
        request: int = 0,
        ahead: Sequence[BlockKey] = (),
    ) -> RemoteTransfer:
        loads = direction is Direction.LOAD
        serve = self.config.serve
        deadline = serve.call_seconds + (attached.io_deadline_seconds if attached else 0.0)

        def late(positions: Sequence[int]) -> None:
            self._count(loads, Outcome.LATE, len(positions))
            if attached is not None:
                attached.connection.lose("late")

        transfer = RemoteTransfer(
            direction,
            len(keys),
            deadline,
            on_late=late,
            on_done=lambda seconds: self.telemetry.observe(
                "load_seconds" if loads else "save_seconds", seconds
            ),
        )
        if attached is None or len(keys) > FRAME_BLOCKS:
            outcome = Outcome.UNAVAILABLE if attached is None else Outcome.REJECTED
            self._count(loads, outcome, len(keys))
            transfer.settle(np.arange(len(keys)), outcome)
            return transfer
        if not len(keys):
            return transfer
        placing = attached.place(buffers)
        op = "load" if loads else "save"
        self.telemetry.count("serve_staged_bytes_total", op, by=placing.staged_bytes)
        self.telemetry.count("serve_staging_full_total", op, by=len(placing.refused))
        self._count(loads, Outcome.REJECTED, len(placing.refused))
        transfer.settle(placing.refused, Outcome.REJECTED)
        going = np.delete(np.arange(len(keys)), placing.refused)
        if not len(going):
            return transfer
        if not loads:
            placing.put()

        def settled(positions: Positions, outcomes: list[Outcome]) -> None:
            if loads:
                placing.fetch(positions, outcomes)
            for outcome in set(outcomes):
                self._count(loads, outcome, outcomes.count(outcome))

        def released() -> None:
            placing.give_back()
            self._link.release(transfer)

        move = Move(
            request,
            [keys[position] for position in going.tolist()],
            placing.offsets[going],
            buffers.lengths[going],
            placing.regions[going],
            ahead,
        )
        self._link.begin(transfer)
        kind = Kind.LOAD if loads else Kind.SAVE
        transfer.begin(attached.connection, kind, pack_move(move), going, settled, released)
        return transfer

    def _count(self, loads: bool, outcome: Outcome, by: int) -> None:
        self.telemetry.count("blocks_total", "load" if loads else "save", TIER, outcome.value, by=by)
        if loads and outcome is not Outcome.LOADED:
            self.telemetry.count("misses_total", TIER, outcome.value, by=by)

    # Requests

    def new_request(self) -> int:
        """A number for the calls of one request: repeated touches under it count once."""
        return next(self._requests)

    def touch(self, keys: Sequence[BlockKey], *, request: int | None = None) -> None:
        """As `BlockStore.touch`."""
        attached = self._link.live()
        if attached is not None:
            for start in range(0, len(keys), FRAME_BLOCKS):
                part = keys[start : start + FRAME_BLOCKS]
                attached.connection.tell(Kind.TOUCH, pack_touch(request or 0, part))

    def end_request(
        self, request: int, *, input_tokens: int | None = None, output_tokens: int | None = None
    ) -> None:
        """As `BlockStore.end_request`."""
        attached = None if self._link.closed else self._link.live()
        if attached is not None:
            attached.connection.tell(Kind.END, pack_end(request, input_tokens, output_tokens))

    def discard(self, keys: Sequence[BlockKey]) -> int:
        """As `BlockStore.discard`; 0 without a server."""
        attached = self._link.live()
        total = 0
        for start in range(0, len(keys) if attached else 0, FRAME_BLOCKS):
            assert attached is not None
            part = keys[start : start + FRAME_BLOCKS]
            answer = self._link.call(attached, Kind.DISCARD, pack_keys(part))
            total += 0 if answer is None else unpack_count(answer)
        return total

    # Looking after it

    def flush(self, seconds: float | None = None) -> bool:
        """As `BlockStore.flush`, of everything that the server holds; False without a server."""
        attached = self._link.live()
        if attached is None:
            return False
        limit = self.config.store.close_seconds if seconds is None else seconds
        answer = self._link.call(attached, Kind.FLUSH, pack_seconds(limit), seconds=limit)
        return answer is not None and unpack_count(answer) == 1

    def status(self) -> list[TierStatus]:
        """The server's tiers, fastest first; none without a server."""
        attached = None if self._link.closed else self._link.live()
        answer = None if attached is None else self._link.call(attached, Kind.STATUS)
        if answer is None:
            return []
        with contextlib.suppress(ProtocolError, KeyError, TypeError):
            return [tier_status(tier) for tier in unpack_json(answer)["tiers"]]
        return []

    @property
    def queued(self) -> dict[str, int]:
        """As `BlockStore.queued`, of what this process has with the server: nothing waits here itself."""
        running = self._link.running
        loads = sum(transfer.unfinished for transfer in running if transfer.direction is Direction.LOAD)
        stores = sum(transfer.unfinished for transfer in running if transfer.direction is Direction.STORE)
        return {"queued_loads": loads, "queued_stores": stores, "held_blocks": 0, "held_bytes": 0}

    @property
    def capture_held_bytes(self) -> int:
        """0: the server captures."""
        return 0

    @property
    def tiers(self) -> list[Any]:
        """None of its own."""
        return []

    def close(self) -> None:
        """Wait for what was begun, at most store.close_seconds, and let go. May be called again."""
        self._link.close(self.config.store.close_seconds)

    def __enter__(self) -> RemoteStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def tier_status(described: dict[str, Any]) -> TierStatus:
    """A tier as the server described it in JSON. Raises KeyError, TypeError."""
    report = described["open_report"]
    opened = None if report is None else OpenReport(**report)
    return TierStatus(**(described | {"open_report": opened}))
