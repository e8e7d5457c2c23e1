"""A capacity as people write it: a share of the unique blocks, a count of blocks, or bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvstrata.config import parse_size
from kvstrata.errors import ConfigError

EXAMPLE = 'write a share of the unique blocks ("1%"), blocks ("5000b") or bytes ("64GiB")'


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
    mean size) that is. fraction: share of the trace's unique bytes.
    """

    units: int
    blocks: int
    bytes: int
    fraction: float


def resolve(text: str, footprint: Footprint) -> Capacity:
    """A capacity on a trace, at least one block. Raises ConfigError."""
    mean = max(1.0, footprint.unique_bytes / max(1, footprint.unique_blocks))
    word = text.strip()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", word):
        fraction = float(match[1]) / 100
        blocks = int(fraction * footprint.unique_blocks + 1e-9)
        size = blocks * footprint.block_bytes or int(fraction * footprint.unique_bytes)
    elif match := re.fullmatch(r"(\d+)\s*b(?:locks)?", word):
        blocks = int(match[1])
        size = int(blocks * mean)
    else:
        try:
            size = parse_size(word)
        except ValueError:
            raise ConfigError(f"capacity {text!r}: {EXAMPLE}") from None
        blocks = int(size / mean)
    if footprint.block_bytes:
        blocks = max(1, blocks)
        size = blocks * footprint.block_bytes
        units = blocks
    else:
        units = size = max(1, size)
    return Capacity(units, blocks, size, size / max(1, footprint.unique_bytes))


def resolve_all(texts: list[str], footprint: Footprint) -> list[Capacity]:
    return [resolve(text, footprint) for text in texts]
