"""Order: what a collector knows of recency, written down for whoever collects after it. Replaced, bounded.

Access logs go with their members, and a new collector cannot tell which of two journals is the older one.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstrata.tiers.shared.catalog import Extent
from kvstrata.tiers.shared.format import COLLECTOR, member_word, parse_member, parse_numbered
from kvstrata.tiers.shared.medium import Medium

MAGIC = b"KVSTORDR"
VERSION = 1
MOST_WORDS = 2**17
_HEAD = struct.Struct("<8sHHIIQ")


def order_name(epoch: int) -> str:
    return f"{COLLECTOR}/order-{epoch}"


@dataclass(frozen=True, slots=True)
class Order:
    """words: the beginnings of keys of the hottest blocks, the hottest last. sequences: per writer, the
    last extent that was known then. known: how far each access log had been read.
    """

    words: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    sequences: Mapping[int, int] = field(default_factory=dict)
    known: Mapping[str, int] = field(default_factory=dict)

    def is_newer(self, extent: Extent) -> bool:
        """Was this extent published later?"""
        return extent.id.sequence > self.sequences.get(extent.id.member, -1)

    def encode(self) -> bytes:
        sequences = {member_word(member): sequence for member, sequence in self.sequences.items()}
        text = json.dumps({"sequences": sequences, "known": dict(self.known)}).encode()
        body = text + self.words.astype("<i8").tobytes()
        return (
            _HEAD.pack(MAGIC, VERSION, 0, len(text), len(self.words), xxhash.xxh3_64_intdigest(body)) + body
        )

    @staticmethod
    def decode(data: bytes) -> Order | None:
        """None for what is no whole order of this version."""
        if len(data) < _HEAD.size:
            return None
        magic, version, _, size, count, digest = _HEAD.unpack_from(data)
        body = data[_HEAD.size :]
        if (magic, version) != (MAGIC, VERSION) or len(body) != size + 8 * count:
            return None
        if digest != xxhash.xxh3_64_intdigest(body):
            return None
        raw = json.loads(body[:size])
        writers = {parse_member(word): int(sequence) for word, sequence in raw["sequences"].items()}
        sequences = {member: sequence for member, sequence in writers.items() if member is not None}
        words = np.frombuffer(body, "<i8", count, size).astype(np.int64)
        return Order(words, sequences, {name: int(offset) for name, offset in raw["known"].items()})


def last_order(medium: Medium, names: Mapping[str, int]) -> Order:
    """Of the highest epoch that wrote one; an empty one if none can be read. names: of `collector`."""
    numbers = [number for name in names if (number := parse_numbered(name, "order")) is not None]
    data = medium.fetch(order_name(max(numbers))) if numbers else None
    return (Order.decode(data) if data else None) or Order()
