"""Recency: which blocks a member's requests touched, written by it and read by the collector. Never atime.

A lost piece costs the collector some knowledge and nobody a block, so nothing here is tried for long: what
does not fit is dropped and counted, what cannot be read is passed over.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from kvstrata.tiers.shared.batches import (
    BATCH_BYTES,
    Batch,
    BatchKind,
    Tail,
    Touched,
    decode_batches,
    encode_batch,
)
from kvstrata.tiers.shared.format import MEMBERS, access_name, parse_member_file
from kvstrata.tiers.shared.medium import Medium

TRIES = 5
"""So often is something read that makes no sense, then the rest of its file is passed over."""
WORD = 8
TOUCHED_BYTES = 8
"""What a request takes beside its words."""


class AccessLog:
    """A member's files access-<n>: at most two, each of at most access_bytes, the older one goes first.

    dropped: words that found no room in memory. Thread-safe; `touch` waits for nothing but memory.
    """

    def __init__(self, medium: Medium, member: int, access_bytes: int) -> None:
        self.access_bytes = access_bytes
        self.dropped = 0
        self._medium = medium
        self._member = member
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._pending: deque[tuple[int, list[NDArray[np.uint64]]]] = deque()
        self._pending_bytes = 0
        self._number = 0
        self._offset = 0
        self._batches = 0
        self._unwritten: tuple[int, int, bytes] | None = None

    @property
    def pending_bytes(self) -> int:
        """What waits for `flush`; at most access_bytes."""
        return self._pending_bytes

    def touch(self, request: int, words: NDArray[np.uint64]) -> None:
        """words: the first 8 bytes of a request's keys, root first. Calls of one request may follow."""
        if not len(words):
            return
        with self._lock:
            size = WORD * len(words)
            again = bool(self._pending) and self._pending[-1][0] == request
            size += 0 if again else TOUCHED_BYTES
            if self._pending_bytes + size > self.access_bytes - BATCH_BYTES:
                self.dropped += len(words)
                return
            self._pending_bytes += size
            if again:
                self._pending[-1][1].append(words)
            else:
                self._pending.append((request, [words]))

    def flush(self) -> None:
        """Write what waits. Raises OSError: the same is tried again at the next call."""
        with self._writing:
            self._write()
            with self._lock:
                pending, self._pending, self._pending_bytes = self._pending, deque(), 0
            if not pending:
                return
            touched = tuple(Touched(request, np.concatenate(parts)) for request, parts in pending)
            data = encode_batch(Batch(BatchKind.ACCESS, self._batches, 0, touched=touched))
            self._batches += 1
            number, offset = self._number, self._offset
            if offset and offset + len(data) > self.access_bytes:
                number, offset = number + 1, 0
            self._unwritten = (number, offset, data)
            self._write()

    def _write(self) -> None:
        if self._unwritten is None:
            return
        number, offset, data = self._unwritten
        if number > 1 and not offset:
            self._medium.remove(access_name(self._member, number - 2))
        self._medium.append(access_name(self._member, number), offset, data)
        self._number, self._offset = number, offset + len(data)
        self._unwritten = None


class AccessReader:
    """The collector's reader of all members' files. damaged: files of which a piece made no sense.

    known: how far somebody has read before.
    """

    def __init__(self, known: Mapping[str, int] | None = None) -> None:
        self.damaged = 0
        self._known = {name: offset for name, offset in (known or {}).items() if _is_access(name)}
        self._wrong: dict[str, int] = {}

    def read(self, medium: Medium, members: Iterable[int]) -> list[Touched]:
        """What these members' requests have touched since the last call; a member's in its order.

        Raises OSError.
        """
        there = set(members)

        def wanted(name: str) -> bool:
            return _is_access(name) and _file_order(name)[0] in there and self._wrong.get(name, 0) < TRIES

        tails = medium.tails(self._known, MEMBERS, wanted)
        found: list[Touched] = []
        for name in sorted(tails, key=_file_order):
            batches, end, tail = decode_batches(tails[name])
            self._known[name] = self._known.get(name, 0) + end
            # It may be half written, as other machines see it.
            self._wrong[name] = 0 if end or tail is not Tail.WRONG else self._wrong.get(name, 0) + 1
            self.damaged += self._wrong[name] == TRIES
            for batch in batches:
                found += batch.touched
        self._forget(there)
        return found

    @property
    def known(self) -> dict[str, int]:
        """How far each file was read."""
        return dict(self._known)

    def _forget(self, there: set[int]) -> None:
        """Files that are no more: of members that left, and older than the last two."""
        newest: dict[int, int] = {}
        for name in self._known:
            member, number = _file_order(name)
            newest[member] = max(number, newest.get(member, 0))

        def kept(name: str) -> bool:
            member, number = _file_order(name)
            return member in there and number >= newest[member] - 1

        self._known = {name: offset for name, offset in self._known.items() if kept(name)}
        self._wrong = {name: tries for name, tries in self._wrong.items() if name in self._known}


def _is_access(name: str) -> bool:
    file = parse_member_file(name)
    return file is not None and file.kind == "access"


def _file_order(name: str) -> tuple[int, int]:
    file = parse_member_file(name)
    assert file is not None, "only names that were wanted are read"
    return file.member, file.number
