"""What every trace becomes: requests in order, each a chain of integer block ids, root first.

Ids are dense: the first block that a trace touches is 0, the next new one 1, and so on, whatever the
source calls them; policies and simulators index arrays with them. A log without chains (block reads of a
file system) is a trace whose requests have one block each.

A `TraceSource` is read in batches of whole requests: `Trace` is one that lies in memory, the Parquet
reader one that streams. This file knows no file format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BlockIds = NDArray[np.int32]
Counts = NDArray[np.int64]
Seconds = NDArray[np.float64]

BATCH_ACCESSES = 1 << 20
DEFAULT_BYTES_PER_TOKEN = 131_072
"""Llama 3 8B at 16 bit: 2 x 32 layers x 8 heads x 128 x 2 bytes."""

NONE = -1
"""No parent, no session, no tenant, an unknown number."""

NUMBERS = ("input_tokens", "output_tokens", "agent_depth", "duration_ms")
"""Request features that are counts (int64, -1 unknown)."""

LABELS = ("model", "stop", "operation")
"""Request features that are names: int32 codes into `TraceHead.labels[feature]`, -1 unknown."""

FEATURES = NUMBERS + LABELS


@dataclass(frozen=True, slots=True)
class TraceHead:
    """What is known of a trace as a whole.

    block_tokens: tokens of a full block, 0 where blocks are no runs of tokens. block_bytes: size of every
    block, 0 where sizes differ. requests, accesses, unique: totals. labels: the names behind label codes.
    skipped: broken records that were passed over (`skip_bad`).
    """

    name: str
    source_format: str
    block_tokens: int
    block_bytes: int
    requests: int
    accesses: int
    unique: int
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """A run of whole requests.

    Request r has the accesses starts[r] to starts[r+1]: ids, parents, depths and sizes (bytes) have one
    entry per access, time_s (seconds from the start of the trace, ascending), session, tenant and features
    one per request. first_request: number of the batch's first request in the trace.
    """

    first_request: int
    starts: Counts
    ids: BlockIds
    parents: BlockIds
    depths: BlockIds
    sizes: Counts
    time_s: Seconds
    session: BlockIds
    tenant: BlockIds
    features: Mapping[str, NDArray[np.int64] | NDArray[np.int32]]

    @property
    def requests(self) -> int:
        return len(self.starts) - 1


class TraceSource(Protocol):
    """Anything that can be replayed, as often as one likes, from the start."""

    @property
    def head(self) -> TraceHead: ...

    def batches(self, max_accesses: int = BATCH_ACCESSES) -> Iterator[Batch]:
        """Whole requests in order, at most max_accesses accesses each unless one request is larger."""
        ...


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace in memory. parent, depth and size (bytes) are indexed by block id, the rest as in `Batch`."""

    head: TraceHead
    starts: Counts
    ids: BlockIds
    parent: BlockIds
    depth: BlockIds
    size: Counts
    time_s: Seconds
    session: BlockIds
    tenant: BlockIds
    features: Mapping[str, NDArray[np.int64] | NDArray[np.int32]]

    def batches(self, max_accesses: int = BATCH_ACCESSES) -> Iterator[Batch]:
        first = 0
        while first < self.head.requests:
            fits = int(np.searchsorted(self.starts, self.starts[first] + max_accesses, side="right")) - 1
            last = max(fits, first + 1)
            ids = self.ids[self.starts[first] : self.starts[last]]
            yield Batch(
                first,
                self.starts[first : last + 1] - self.starts[first],
                ids,
                self.parent[ids],
                self.depth[ids],
                self.size[ids],
                self.time_s[first:last],
                self.session[first:last],
                self.tenant[first:last],
                {name: column[first:last] for name, column in self.features.items()},
            )
            first = last
