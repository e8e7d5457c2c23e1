"""Collects requests under the names that a source gives its blocks, and makes a `Trace` of dense ids.

Readers add requests in any order; sorting, numbering, and finding each block's parent, depth and size
happen once, in `build`. No file format is known here, and nothing streams: the trace lies in memory, with
some 16 bytes for an access while it is collected and four times as much while it is built.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.errors import TraceFormatError
from kvstrata.traces.trace import FEATURES, LABELS, NONE, NUMBERS, BlockIds, Counts, Trace, TraceHead

MAX_UNIQUE = 2**31 - 1
"""Block ids are int32."""

Integers = NDArray[np.integer[Any]]


class TraceBuilder:
    """Requests in, `Trace` out.

    name, source_format, block_tokens: as in `TraceHead`. block_bytes: size of a block that is added
    without one; 0 when every `add` gives sizes.
    """

    def __init__(self, name: str, source_format: str, block_tokens: int = 0, block_bytes: int = 0) -> None:
        self.name = name
        self._format = source_format
        self._block_tokens = block_tokens
        self._block_bytes = block_bytes
        self._times: list[NDArray[np.float64]] = []
        self._new_times = array("d")
        self._lengths = array("q")
        self._chained = bytearray()
        self._sizes = array("q")
        self._blocks = _Names()
        self._sessions = _Column()
        self._tenants = _Column()
        self._labels = {name: _Column() for name in LABELS}
        self._numbers = {name: _Column() for name in NUMBERS}

    @property
    def requests(self) -> int:
        """How many requests were added so far."""
        return len(self._lengths)

    def add(
        self,
        time_s: float,
        blocks: Sequence[Hashable] | Integers,
        *,
        sizes: Sequence[int] | Integers | None = None,
        session: Hashable | None = None,
        tenant: Hashable | None = None,
        chain: bool = True,
        **features: int | str | None,
    ) -> None:
        """One request.

        time_s: seconds on any clock. blocks: the names of its blocks, root first, equal names being the
        same block; it may be empty. sizes: bytes, one per block; None gives every block block_bytes.
        chain: each block has the one before it as parent. features: some of `trace.FEATURES`; one that is
        absent or None is unknown.
        """
        count = len(blocks)
        assert sizes is not None or self._block_bytes or not count, "blocks without a size"
        assert sizes is None or len(sizes) == count, "one size for each block"
        self._blocks.extend(blocks)
        self._sizes.extend([self._block_bytes] * count if sizes is None else sizes)
        row = len(self._lengths)
        self._new_times.append(time_s)
        self._lengths.append(count)
        self._chained.append(chain)
        if session is not None:
            self._sessions.put_name(row, session)
        if tenant is not None:
            self._tenants.put_name(row, tenant)
        for feature, value in features.items():
            if value is None:
                continue
            if feature in self._labels:
                self._labels[feature].put_name(row, value)
            else:
                self._numbers[feature].put(row, int(value))

    def add_single_blocks(
        self, time_s: NDArray[np.float64], blocks: Sequence[Hashable] | Integers, sizes: Counts
    ) -> None:
        """Requests of one block each, without chains: seconds, names and bytes of equal length."""
        assert len(time_s) == len(blocks) == len(sizes)
        self._keep_times()
        self._times.append(np.array(time_s, np.float64))
        self._blocks.extend(blocks)
        self._sizes.frombytes(np.asarray(sizes, np.int64).tobytes())
        self._lengths.frombytes(np.ones(len(blocks), np.int64).tobytes())
        self._chained.extend(bytes(len(blocks)))

    def build(self, skipped: int = 0) -> Trace:
        """The trace: requests in order of time (equal times as they were added), the first one at 0 s.

        Parent, depth and size of a block are those of the first request that has it. skipped: the broken
        records that the reader passed over. Raises TraceFormatError, naming the trace, for no requests, a
        time that is no finite number, or more unique blocks than int32 can number.
        """
        self._keep_times()
        times = np.concatenate(self._times)
        if not len(times):
            raise TraceFormatError(f"{self.name}: no requests{f' ({skipped} broken)' if skipped else ''}")
        if not np.isfinite(times).all():
            raise TraceFormatError(f"{self.name}: a request has no finite time")
        order = np.argsort(times, kind="stable")
        lengths = _int64(self._lengths)
        codes, sizes = self._blocks.codes(), _int64(self._sizes)
        chained = np.frombuffer(self._chained, np.bool_)
        starts = _starts(lengths[order])
        if (np.diff(order) != 1).any():
            gather = np.repeat(_starts(lengths)[:-1][order] - starts[:-1], lengths[order])
            gather += np.arange(len(codes))
            codes, sizes, chained = codes[gather], sizes[gather], chained[order]
        ids, first = _dense(codes)
        if len(first) > MAX_UNIQUE:
            raise TraceFormatError(
                f"{self.name}: {len(first)} unique blocks, more than {MAX_UNIQUE}; take larger blocks"
            )
        owner = np.searchsorted(starts, first, side="right") - 1
        depth = np.where(chained[owner], first - starts[owner], 0).astype(np.int32)
        parent = np.where(depth > 0, ids[first - 1], NONE).astype(np.int32) if len(first) else depth
        size = sizes[first]
        same_size = len(size) > 0 and bool((size == size[0]).all())
        requests = len(order)
        features: dict[str, NDArray[np.int64] | NDArray[np.int32]] = {}
        labels: dict[str, tuple[str, ...]] = {}
        for feature in FEATURES:
            if feature in self._labels:
                features[feature], names = self._labels[feature].dense(requests, order)
                labels[feature] = tuple(str(name) for name in names)
            else:
                features[feature] = self._numbers[feature].values(requests)[order]
        head = TraceHead(
            name=self.name,
            source_format=self._format,
            block_tokens=self._block_tokens,
            block_bytes=int(size[0]) if same_size else 0 if len(size) else self._block_bytes,
            requests=requests,
            accesses=len(ids),
            unique=len(first),
            labels=labels,
            skipped=skipped,
        )
        return Trace(
            head=head,
            starts=starts,
            ids=ids,
            parent=parent,
            depth=depth,
            size=size,
            time_s=times[order] - times[order[0]],
            session=self._sessions.dense(requests, order)[0],
            tenant=self._tenants.dense(requests, order)[0],
            features=features,
        )

    def _keep_times(self) -> None:
        self._times.append(np.array(self._new_times, np.float64))
        self._new_times = array("d")


class _Names:
    """Block names as integers, equal for equal names. Integer arrays are kept as they are while only
    such come, and all of one sign; anything else is numbered by a dict."""

    def __init__(self) -> None:
        self._arrays: list[Integers] = []
        self._codes = array("q")
        self._numbers: dict[Hashable, int] = {}
        self._plain = True

    def extend(self, names: Sequence[Hashable] | Integers) -> None:
        if self._plain:
            if isinstance(names, np.ndarray) and self._fits(names.dtype.kind):
                self._arrays.append(np.array(names, np.int64 if names.dtype.kind == "i" else np.uint64))
                return
            self._plain = False
            for kept in self._arrays:
                self._number(kept)
            self._arrays.clear()
        self._number(names)

    def _fits(self, kind: str) -> bool:
        return kind in "iu" and (not self._arrays or self._arrays[0].dtype.kind == kind)

    def _number(self, names: Sequence[Hashable] | Integers) -> None:
        numbers = self._numbers
        if isinstance(names, np.ndarray):
            names = names.tolist()
        self._codes.extend([numbers.setdefault(name, len(numbers)) for name in names])

    def codes(self) -> Integers:
        if self._arrays:
            return np.concatenate(self._arrays)
        return _int64(self._codes)


class _Column:
    """One number or name per request, -1 (unknown) where none was put. Rows are put in ascending order."""

    def __init__(self) -> None:
        self._values = array("q")
        self._codes: dict[Hashable, int] = {}

    def put(self, row: int, value: int) -> None:
        gap = row - len(self._values)
        if gap:
            self._values.extend([NONE] * gap)
        self._values.append(value)

    def put_name(self, row: int, name: Hashable) -> None:
        self.put(row, self._codes.setdefault(name, len(self._codes)))

    def values(self, rows: int) -> Counts:
        values = np.full(rows, NONE, np.int64)
        values[: len(self._values)] = self._values
        return values

    def dense(self, rows: int, order: NDArray[np.intp]) -> tuple[BlockIds, list[Hashable]]:
        """Codes in order of first appearance among the ordered rows, and the name behind each."""
        if not self._codes:
            return np.full(rows, NONE, np.int32), []
        codes = self.values(rows)[order]
        known = codes >= 0
        found, first = _dense(codes[known])
        result = np.full(rows, NONE, np.int32)
        result[known] = found
        names = list(self._codes)
        return result, [names[code] for code in codes[known][first]]


def _int64(values: array[int]) -> Counts:
    return np.array(values, np.int64)


def _starts(lengths: Counts) -> Counts:
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _dense(codes: Integers) -> tuple[BlockIds, Counts]:
    """Each code's number in order of first appearance, and the place of each number's first appearance."""
    if not len(codes):
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    low, high = int(codes.min()), int(codes.max())
    if high - low < 4 * len(codes) + 1024:
        small = codes - codes.dtype.type(low)
        first = np.full(high - low + 1, len(codes), np.int64)
        first[small[::-1]] = np.arange(len(codes) - 1, -1, -1)  # of equal places the last one stays
    else:
        _, first, small = np.unique(codes, return_index=True, return_inverse=True)
    by_place = np.argsort(first, kind="stable")
    by_place = by_place[: int(np.count_nonzero(first < len(codes)))]
    number = np.empty(len(first), np.int32)
    number[by_place] = np.arange(len(by_place), dtype=np.int32)
    return number[small], first[by_place]
