"""Journals: what each member says it published, written by it alone and read by all, piece by piece."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvstrata.tiers.shared.batches import (
    Added,
    Batch,
    BatchKind,
    Tail,
    decode_batches,
    encode_batch,
    find_batch,
)
from kvstrata.tiers.shared.format import ExtentId, journal_name
from kvstrata.tiers.shared.medium import Medium

GONE_KEPT = 16_384
"""A compacted journal repeats so many of the extents that this member declared gone, the latest ones."""
COMPACT_BYTES = 2**20
"""A smaller journal is not worth compacting."""


class JournalWriter:
    """One member's journal. on_durable hears of every batch in order, as soon as it cannot be lost.

    Threads may share it. A batch whose write failed stays, and is written before the next one: readers may
    have seen it already.
    """

    def __init__(
        self, medium: Medium, member: int, on_durable: Callable[[Batch], object] = lambda batch: None
    ) -> None:
        self._medium = medium
        self._member = member
        self._on_durable = on_durable
        self._number = 0
        self._offset = 0
        self._batches = 0
        self._published_bytes = 0
        self._book = threading.Lock()
        self._writing = threading.Lock()
        """Only one may write; whoever waits for it waits for the medium."""
        self._pending: deque[tuple[Batch, bytes]] = deque()
        self._gone: dict[ExtentId, None] = {}

    @property
    def published_bytes(self) -> int:
        """All that this member has published itself, what is still to be written down included."""
        return self._published_bytes

    @property
    def bytes(self) -> int:
        """Size of the journal's file."""
        return self._offset

    @property
    def pending(self) -> int:
        """Batches that are not durable yet."""
        return len(self._pending)

    def add(self, added: Sequence[Added]) -> Batch:
        """Tell of extents, `published_bytes` growing by those that are not adopted. Raises OSError: the
        batch waits then for the next call of any kind."""
        return self._say(BatchKind.ADD, added=tuple(added))

    def gone(self, extents: Sequence[ExtentId]) -> Batch:
        """Tell that extents are not there any more. As `add`."""
        return self._say(BatchKind.GONE, gone=tuple(extents))

    def has_said_gone(self, extent: ExtentId) -> bool:
        """Of the latest that it said of."""
        with self._book:
            return extent in self._gone

    def flush(self) -> None:
        """Write what waits. Raises OSError."""
        with self._writing:
            self._write_pending()

    def _say(
        self, kind: BatchKind, *, added: tuple[Added, ...] = (), gone: tuple[ExtentId, ...] = ()
    ) -> Batch:
        with self._book:
            self._published_bytes += sum(one.file_bytes for one in added if not one.adopted)
            batch = Batch(kind, self._batches, self._published_bytes, added, gone)
            self._batches += 1
            self._pending.append((batch, encode_batch(batch)))
            for extent in gone:
                self._gone.pop(extent, None)
                self._gone[extent] = None
            while len(self._gone) > GONE_KEPT:
                self._gone.pop(next(iter(self._gone)))
        self.flush()
        return batch

    def _write_pending(self) -> None:
        """Under `_writing`."""
        while self._pending:
            batch, data = self._pending[0]
            self._medium.append(journal_name(self._member, self._number), self._offset, data)
            self._offset += len(data)
            self._pending.popleft()
            self._on_durable(batch)

    def compact(self, live: Callable[[], Iterable[Added]], known_members: Iterable[int]) -> None:
        """Begin the next journal with what this member stands for now, then remove the old one.

        live: asked when all that was said is durable. known_members: who still has a folder: what they
        wrote and this member declared gone is repeated. Raises OSError; the old journal is valid then.
        """
        with self._writing:
            self._write_pending()
            members = set(known_members)
            with self._book:
                gone = tuple(extent for extent in self._gone if extent.member in members)
                number, published = self._batches, self._published_bytes
                self._batches += 2
            data = encode_batch(Batch(BatchKind.SNAPSHOT, number, published, tuple(live())))
            if gone:
                data += encode_batch(Batch(BatchKind.GONE, number + 1, published, gone=gone))
            self._medium.append(journal_name(self._member, self._number + 1), 0, data)
            old, self._number, self._offset = self._number, self._number + 1, len(data)
            self._medium.remove(journal_name(self._member, old))


@dataclass(frozen=True, slots=True)
class Heard:
    """What was new in a journal. damaged: something cannot be read, for the first time; footers can."""

    batches: list[Batch] = field(default_factory=list)
    damaged: bool = False


class JournalReader:
    """Another member's journal. patience_seconds: what is not whole after so long is damaged."""

    def __init__(self, member: int, patience_seconds: float) -> None:
        self.member = member
        self._patience_seconds = patience_seconds
        self._number = -1
        self._offset = 0
        self._stuck: tuple[int, int] | None = None
        self._stuck_since = 0.0
        self._reported = False

    @property
    def position(self) -> tuple[str, int]:
        """Name of the file that is read, and how far."""
        return journal_name(self.member, max(0, self._number)), self._offset

    def wants(self, number: int) -> bool:
        """May this file of the member have something new?"""
        return number >= self._number

    def take(self, tails: Mapping[int, bytes], now: float) -> Heard:
        """tails: by number, what is behind `position`, or all of a later journal. now: of any clock."""
        heard: list[Batch] = []
        unread: tuple[int, int] | None = None
        for number in sorted((n for n in tails if n > self._number), reverse=True):
            batches, end, tail = decode_batches(tails[number])
            if batches and (number == 0 or batches[0].kind is BatchKind.SNAPSHOT):
                self._number, self._offset = number, end
                self._stuck = None
                return self._judge(batches, tails[number], end, tail, now)
            unread = (number, len(tails[number]))
        data = tails.get(self._number, b"") if self._number >= 0 else b""
        heard, end, tail = decode_batches(data)
        self._offset += end
        if tail is Tail.NOTHING and unread is not None:
            return self._wait(heard, unread, now)
        return self._judge(heard, data, end, tail, now)

    def _judge(self, batches: list[Batch], data: bytes, end: int, tail: Tail, now: float) -> Heard:
        """offset is where `end` of data is."""
        if tail is Tail.NOTHING:
            self._stuck = None
            self._reported = False
            return Heard(batches)
        if batches:
            self._stuck = None
        heard = self._wait(batches, (self._number, self._offset), now)
        if self._reported and (place := find_batch(data, end + 1)) is not None:
            more, after, _ = decode_batches(data, place)
            self._offset += after - end
            self._stuck = None
            self._reported = False
            return Heard([*batches, *more], heard.damaged)
        return heard

    def _wait(self, batches: list[Batch], where: tuple[int, int], now: float) -> Heard:
        """What is there now cannot be read: perhaps it can soon."""
        if self._stuck != where:
            self._stuck, self._stuck_since, self._reported = where, now, False
        late = now - self._stuck_since >= self._patience_seconds and not self._reported
        self._reported |= late
        return Heard(batches, late)
