"""A capacity as people write it: a share of the unique blocks, a count of blocks, or bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from kvstrata.config import SIZE_LIMIT, parse_size
from kvstrata.errors import ConfigError

EXAMPLE = 'write a share of the unique blocks ("1%"), blocks ("5000b") or bytes ("64GiB")'

PERCENT = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*%", re.ASCII)
BARE_BYTES = 4096
"""A number without a unit means bytes; a smaller one more likely lacks its %."""

BLOCKS = re.compile(r"(\d{1,20})\s*b(?:locks)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Footprint:
    """unique_blocks and unique_bytes of a trace. block_bytes: size of every block, 0 where they differ."""

    unique_blocks: int
    unique_bytes: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """One size of a cache on one trace.

    units: what a policy is given: blocks where all have one size, else bytes. blocks: how many blocks (of
    mean size) that is. fraction: the share that was asked for, else the share of the trace's unique bytes.
    """

    units: int
    blocks: int
    bytes: int
    fraction: float


def split_capacities(text: str) -> list[str]:
    """ "1%, 5000b,64 GiB" -> ["1%", "5000b", "68719476736B"], each capacity once. Raises ConfigError."""
    words = [word for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"no capacity in {text!r}; {EXAMPLE}")
    return list(dict.fromkeys(normal(word) for word in words))


def normal(text: str) -> str:
    """One spelling for every way to write the same capacity; bytes become a bare number."""
    word = text.strip()
    if match := PERCENT.fullmatch(word):
        share = Decimal(match[1]).normalize()
        if not share:
            raise ConfigError(f"capacity {text!r}: a cache has at least one block; {EXAMPLE}")
        return f"{share:f}%"
    if match := BLOCKS.fullmatch(word):
        size, spelt = int(match[1]), f"{int(match[1])}b"
    else:
        try:
            size = parse_size(word)
        except ValueError:
            raise ConfigError(f"capacity {text!r}: {EXAMPLE}") from None
        if word.isdecimal() and size < BARE_BYTES:
            raise ConfigError(f"capacity {text!r} has no unit; {EXAMPLE}")
        spelt = f"{size}B"
    if not size:
        raise ConfigError(f"capacity {text!r}: a cache has at least one block; {EXAMPLE}")
    return spelt


def resolve(text: str, footprint: Footprint) -> Capacity:
    """A capacity on a trace, at least one block. Raises ConfigError."""
    mean = max(1.0, footprint.unique_bytes / max(1, footprint.unique_blocks))
    word = normal(text)
    asked: float | None = None
    if word.endswith("%"):
        share = Decimal(word[:-1]) / 100
        asked = float(share)
        blocks = int(share * footprint.unique_blocks)
        size = blocks * footprint.block_bytes or int(share * footprint.unique_bytes)
    elif word.endswith("b"):
        blocks = int(word[:-1])
        size = int(blocks * mean)
    else:
        size = int(word[:-1])
        blocks = int(size / mean)
    if footprint.block_bytes:
        blocks = max(1, blocks)
        size = blocks * footprint.block_bytes
        units = blocks
    else:
        units = size = max(1, size)
    if size >= SIZE_LIMIT:
        raise ConfigError(f"capacity {text!r}: {size} bytes are more than a cache can have")
    return Capacity(units, blocks, size, size / max(1, footprint.unique_bytes) if asked is None else asked)


def resolve_all(texts: Sequence[str], footprint: Footprint) -> list[Capacity]:
    return [resolve(text, footprint) for text in texts]
