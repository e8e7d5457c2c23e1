"""The peer: block hits of libCacheSim (https://libcachesim.com), from its own C loop.

libCacheSim is GPLv3 and is used as a black box, in tests and comparisons alone; the extra `bench-peers`
installs it. A stream of ids is written as an oracleGeneral file, the one format that carries the time of
the next access too, and every block has size 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

try:
    import libcachesim
except ImportError:  # an optional peer
    libcachesim = None

AVAILABLE = libcachesim is not None
REASON = "libcachesim is not installed: pip install 'kvstrata[bench-peers]'"
needs_libcachesim = pytest.mark.skipif(not AVAILABLE, reason=REASON)

HASHPOWER = 20
"""Its hash table starts with 2**20 entries; the default of 2**24 costs more than a short trace."""

RECORD = np.dtype([("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
NEVER = -1

NAMES = {
    "arc": "ARC",
    "belady": "Belady",
    "clock_pro": "ClockPro",
    "gdsf": "GDSF",
    "lfu": "LFU",
    "lfuda": "LFUDA",
    "lirs": "LIRS",
    "lru_forward": "LRU",
    "mq": "MQ",
    "s3fifo": "S3FIFO",
    "sieve": "Sieve",
    "slru": "SLRU",
    "twoq": "TwoQ",
    "wtinylfu": "WTinyLFU",
}
"""Our names of policies, and libCacheSim's classes for them."""

LEAST = {"lfuda": 100, "lirs": 2, "s3fifo": 20, "slru": 4, "twoq": 4, "wtinylfu": 100}
"""Capacities below which libCacheSim 0.3.5 is no measure: parts of these caches are rounded to nothing, and
it then holds no block at all, or ends the process (lfuda below about 40 blocks, s3fifo below 10)."""


def measurable(policy: str, capacity: int) -> bool:
    """Does libCacheSim have a working cache of this capacity?"""
    return capacity >= LEAST.get(policy, 1)


def next_accesses(ids: NDArray[np.integer]) -> NDArray[np.int64]:
    """Position of the next access to the same id, per position; NEVER where there is none."""
    order = np.argsort(ids, kind="stable")
    again = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    following = np.full(len(ids), NEVER, np.int64)
    following[order[again]] = order[again + 1]
    return following


class OracleFile:
    """A temporary oracleGeneral file of a stream, to replay through any number of caches.

    ids: not negative. reader_params: parameters of libCacheSim's reader.
    """

    def __init__(self, ids: NDArray[np.integer], **reader_params: Any) -> None:
        if libcachesim is None:
            raise ImportError(REASON)
        records = np.zeros(len(ids), RECORD)
        records["time"] = np.arange(len(ids))
        records["id"] = ids.astype(np.uint64) + np.uint64(1)
        records["size"] = 1
        following = next_accesses(ids)
        # The first access has time 1 there, so that 0 is no time.
        records["next"] = np.where(following == NEVER, NEVER, following + 1)
        self.accesses = len(ids)
        self._params = reader_params
        self._file = tempfile.NamedTemporaryFile(suffix=".oracleGeneral")  # noqa: SIM115
        records.tofile(self._file)
        self._file.flush()

    def __enter__(self) -> OracleFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def hits(self, policy: str, capacity: int, **cache_params: Any) -> int:
        """Accesses that find their block. capacity in blocks; cache_params: of libCacheSim's class."""
        if not measurable(policy, capacity):
            raise ValueError(f"libCacheSim has no working {policy} of {capacity} blocks")
        params = libcachesim.ReaderInitParam(ignore_obj_size=True, obj_id_is_num=True, **self._params)
        reader = libcachesim.TraceReader(
            str(Path(self._file.name)), libcachesim.TraceType.ORACLE_GENERAL_TRACE, params
        )
        make: Callable[..., Any] = getattr(libcachesim, NAMES[policy])
        cache = make(cache_size=capacity, hashpower=HASHPOWER, consider_obj_metadata=False, **cache_params)
        miss_ratio, _ = cache.process_trace(reader)
        return round((1 - miss_ratio) * self.accesses)


def block_hits(policy: str, ids: NDArray[np.integer], capacity: int, **reader_params: Any) -> int:
    """Accesses of a stream that find their block in libCacheSim's cache of `capacity` blocks of size 1."""
    with OracleFile(ids, **reader_params) as file:
        return file.hits(policy, capacity)
