"""What goes over the socket of `kvstrata serve`: frames, their kinds and their contents. Pure functions.

No block travels here: a frame names blocks by key and memory by (region, offset). Everything is bounded,
and what is not exactly as it should be raises ProtocolError, after which the connection is of no more
use.

A frame is a header of 16 bytes, little endian (payload bytes u32, kind u16, flags u16, number u64), and its
payload. number: of the call that it answers, or of the transfer that it is about.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.types import KEY_BYTES, BlockKey, Lookup, Outcome

VERSION = 1
"""Of the protocol. Both sides must have the same: they are of one machine, and can be of one release."""

FRAME_BLOCKS = 65_536
"""Most blocks that one frame names."""
HELLO_BYTES = 64 * 1024
"""Largest frame of a client that has not said who it is."""

_HEADER = struct.Struct("<IHHQ")
_MOVE_HEAD = struct.Struct("<QII")
_REGION = struct.Struct("<QQQ")
_END = struct.Struct("<Qqq")
_NUMBER = struct.Struct("<Q")
_COUNT = struct.Struct("<q")
_SECONDS = struct.Struct("<d")
_MOVE_BYTES = 8 + 8 + 4 + KEY_BYTES

AHEAD_BLOCKS = 1_024
"""Most keys of a load's chain that go along with it behind what is loaded."""
FRAME_BYTES = _MOVE_HEAD.size + FRAME_BLOCKS * _MOVE_BYTES + AHEAD_BLOCKS * KEY_BYTES
"""Largest payload of a frame."""

AGAIN = 1
"""Flag of LOOKUP: the same request has asked before."""
RELEASED_TOO = 1
"""Flag of DONE: nobody touches the buffers any more."""
NO_REGION = -1
"""Region of a block that has no buffer."""
UNKNOWN_TOKENS = -1


class ProtocolError(Exception):
    """The peer sent what no peer of this version sends."""


class Kind(IntEnum):
    """What a frame says. Up to STATUS a client says it, from WELCOME on the server."""

    HELLO = 1
    REGION = 2
    LOOKUP = 3
    LOAD = 4
    SAVE = 5
    TOUCH = 6
    END = 7
    DISCARD = 8
    FLUSH = 9
    STATUS = 10
    WELCOME = 32
    REFUSED = 33
    FOUND = 34
    DONE = 35
    RELEASED = 36
    COUNT = 37
    STATE = 38


_KINDS = {int(kind) for kind in Kind}
STATES = (Lookup.MISS, Lookup.HIT, Lookup.PENDING, Lookup.ASKING)
OUTCOMES = (
    Outcome.LOADED,
    Outcome.SAVED,
    Outcome.PRESENT,
    Outcome.REJECTED,
    Outcome.ABSENT,
    Outcome.CORRUPT,
    Outcome.IO_ERROR,
    Outcome.LATE,
    Outcome.UNAVAILABLE,
)
_STATE_CODE = {state: code for code, state in enumerate(STATES)}
_OUTCOME_CODE = {outcome: code for code, outcome in enumerate(OUTCOMES)}


@dataclass(frozen=True, slots=True)
class Frame:
    """One message."""

    kind: Kind
    number: int
    flags: int
    payload: bytes


def pack(kind: Kind, number: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    """A frame as it goes over the socket."""
    assert len(payload) <= FRAME_BYTES, "a frame above the limit"
    return _HEADER.pack(len(payload), kind, flags, number) + payload


class FrameDecoder:
    """Cuts what comes from a socket, in pieces of any size, into frames.

    limit_bytes: of a payload; may be raised once the peer is known.
    """

    def __init__(self, limit_bytes: int = FRAME_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._held = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[Frame]:
        """The frames that are whole now. Raises ProtocolError for a header that cannot be."""
        self._held += data
        while len(self._held) >= _HEADER.size:
            length, kind, flags, number = _HEADER.unpack_from(self._held)
            if kind not in _KINDS:
                raise ProtocolError(f"a frame of unknown kind {kind}")
            if length > self.limit_bytes:
                raise ProtocolError(f"a frame of {length} bytes where {self.limit_bytes} are allowed")
            end = _HEADER.size + length
            if len(self._held) < end:
                return
            payload = bytes(memoryview(self._held)[_HEADER.size : end])
            del self._held[:end]
            yield Frame(Kind(kind), number, flags, payload)


def _unpack(form: struct.Struct, payload: bytes) -> tuple[Any, ...]:
    if len(payload) != form.size:
        raise ProtocolError(f"{len(payload)} bytes where {form.size} are due")
    return form.unpack(payload)


# Contents


def pack_json(value: Mapping[str, Any]) -> bytes:
    """For what is said once: who is there, and how things stand."""
    return json.dumps(value, separators=(",", ":"), default=str).encode()


def unpack_json(payload: bytes) -> dict[str, Any]:
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolError("JSON that is not an object")
    return value


def pack_keys(keys: Sequence[bytes]) -> bytes:
    return b"".join(keys)


def unpack_keys(payload: bytes | memoryview) -> list[BlockKey]:
    data = bytes(payload)
    if len(data) % KEY_BYTES or len(data) > FRAME_BLOCKS * KEY_BYTES:
        raise ProtocolError(f"{len(data)} bytes are no batch of keys")
    return [BlockKey(data[at : at + KEY_BYTES]) for at in range(0, len(data), KEY_BYTES)]


@dataclass(frozen=True, slots=True)
class Move:
    """Blocks of a load or save, and where their bytes lie: arrays of equal length.

    request: 0 for a call that is a request of its own. regions: NO_REGION where there is no buffer. ahead:
    keys that follow in the chain of a load, for tiers that read ahead.
    """

    request: int
    keys: list[BlockKey]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    regions: NDArray[np.int32]
    ahead: Sequence[BlockKey] = ()


def pack_move(move: Move) -> bytes:
    return b"".join(
        (
            _MOVE_HEAD.pack(move.request, len(move.keys), len(move.ahead)),
            move.offsets.astype("<i8", copy=False).tobytes(),
            move.lengths.astype("<i8", copy=False).tobytes(),
            move.regions.astype("<i4", copy=False).tobytes(),
            *move.keys,
            *move.ahead,
        )
    )


def unpack_move(payload: bytes) -> Move:
    if len(payload) < _MOVE_HEAD.size:
        raise ProtocolError("a move without its head")
    request, count, ahead = _MOVE_HEAD.unpack_from(payload)
    size = _MOVE_HEAD.size + count * _MOVE_BYTES + ahead * KEY_BYTES
    if count > FRAME_BLOCKS or ahead > AHEAD_BLOCKS or len(payload) != size:
        raise ProtocolError(f"a move of {count} blocks in {len(payload)} bytes")
    at = _MOVE_HEAD.size
    offsets = np.frombuffer(payload, "<i8", count, at)
    lengths = np.frombuffer(payload, "<i8", count, at + 8 * count)
    regions = np.frombuffer(payload, "<i4", count, at + 16 * count)
    at += 20 * count
    keys = unpack_keys(memoryview(payload)[at : at + count * KEY_BYTES])
    rest = unpack_keys(memoryview(payload)[at + count * KEY_BYTES :])
    return Move(request, keys, offsets, lengths, regions, rest)


def pack_touch(request: int, keys: Sequence[bytes]) -> bytes:
    return _NUMBER.pack(request) + pack_keys(keys)


def unpack_touch(payload: bytes) -> tuple[int, list[BlockKey]]:
    (request,) = _unpack(_NUMBER, payload[: _NUMBER.size])
    return int(request), unpack_keys(memoryview(payload)[_NUMBER.size :])


def pack_end(request: int, input_tokens: int | None, output_tokens: int | None) -> bytes:
    known = [UNKNOWN_TOKENS if count is None else count for count in (input_tokens, output_tokens)]
    return _END.pack(request, *known)


def unpack_end(payload: bytes) -> tuple[int, int | None, int | None]:
    request, *tokens = _unpack(_END, payload)
    known = [None if count < 0 else int(count) for count in tokens]
    return int(request), known[0], known[1]


def pack_region(region: int, offset: int, size: int) -> bytes:
    return _REGION.pack(region, offset, size)


def unpack_region(payload: bytes) -> tuple[int, int, int]:
    region, offset, size = _unpack(_REGION, payload)
    return int(region), int(offset), int(size)


def pack_seconds(seconds: float) -> bytes:
    return _SECONDS.pack(seconds)


def unpack_seconds(payload: bytes) -> float:
    (seconds,) = _unpack(_SECONDS, payload)
    if not 0 <= seconds < 10**9:
        raise ProtocolError(f"a wait of {seconds} seconds")
    return float(seconds)


def pack_count(count: int) -> bytes:
    return _COUNT.pack(count)


def unpack_count(payload: bytes) -> int:
    (count,) = _unpack(_COUNT, payload)
    return int(count)


def pack_states(states: Sequence[Lookup]) -> bytes:
    return bytes(map(_STATE_CODE.__getitem__, states))


def unpack_states(payload: bytes, count: int) -> list[Lookup]:
    return _choose(STATES, payload, count)


def pack_outcomes(outcomes: Sequence[Outcome]) -> bytes:
    return bytes(map(_OUTCOME_CODE.__getitem__, outcomes))


def unpack_outcomes(payload: bytes, count: int) -> list[Outcome]:
    return _choose(OUTCOMES, payload, count)


def _choose(words: Sequence[Any], payload: bytes, count: int) -> list[Any]:
    if len(payload) != count:
        raise ProtocolError(f"{len(payload)} answers for {count} blocks")
    if payload and max(payload) >= len(words):
        raise ProtocolError(f"an answer {max(payload)} that nobody knows")
    return [words[code] for code in payload]
