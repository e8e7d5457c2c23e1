"""Which extents go, and which are rewritten: arithmetic on columns. No I/O, no state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstrata.tiers.shared.catalog import Extent
from kvstrata.tiers.shared.extent_file import footer_bytes, slots_within
from kvstrata.tiers.shared.ledger import ExtentView

LEAST_GAIN = 0.125
"""An extent is rewritten when that much of it is dead: seven bytes are copied for one that is freed."""
SMALL_SHARE = 1 / 8
"""Of the bytes of a whole extent: one below that is small."""

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An extent that might be rewritten, and how many blocks that would copy."""

    extent: Extent
    live_blocks: int


def enough_of(sizes: NDArray[np.int64], wanted: int) -> int:
    """How many from the front make what is wanted, or all."""
    return min(len(sizes), int(np.searchsorted(np.cumsum(sizes), wanted)) + 1)


def empty_rows(view: ExtentView, wanted: int) -> Rows:
    """Extents without a live block, the oldest first, as many as are wanted."""
    empty = np.flatnonzero(view.live_blocks == 0)
    return view.rows[empty[: enough_of(view.file_bytes[empty], wanted)]]


def emptiest_rows(view: ExtentView, wanted: int) -> Rows:
    """Extents with the least live share, as many as are wanted."""
    order = np.argsort(view.live_bytes / np.maximum(view.file_bytes, 1), kind="stable")
    return view.rows[order[: enough_of(view.file_bytes[order], wanted)]]


def worthy_rows(view: ExtentView) -> Rows:
    """Extents to be rewritten, those first that free most for what is copied."""
    dead = view.slot_bytes - view.live_bytes
    worth = np.flatnonzero((dead >= LEAST_GAIN * view.slot_bytes) & (view.live_blocks > 0))
    return worth[np.argsort(-(dead[worth] / view.live_bytes[worth]), kind="stable")]


def small_rows(view: ExtentView, extent_bytes: int) -> Rows:
    """Small extents, the oldest first."""
    return np.flatnonzero((view.file_bytes < SMALL_SHARE * extent_bytes) & (view.live_blocks > 0))


def by_kind(candidates: Iterable[Candidate]) -> list[list[Candidate]]:
    """Apart by namespace and stride, in the order of the best one of each."""
    kinds: dict[tuple[bytes, int], list[Candidate]] = {}
    for one in candidates:
        kinds.setdefault((one.extent.namespace, one.extent.stride), []).append(one)
    return list(kinds.values())


def chain(
    candidates: list[Candidate], *, extent_bytes: int, budget_bytes: float, wanted: int
) -> list[Extent]:
    """Extents of one kind to be rewritten together: as few from the front as free what is wanted, or what
    frees most within the budget; none where nothing is freed.

    Their live blocks fill one new extent after the other, so that an old one may be spread over two.
    """
    stride = candidates[0].extent.stride
    slots = slots_within(extent_bytes, stride)
    fitting = [one for one in candidates if one.live_blocks <= slots]
    if not slots or not fitting:
        return []
    live = np.cumsum([one.live_blocks for one in fitting])
    files = np.cumsum([one.extent.file_bytes for one in fitting])
    allowed = int(np.searchsorted(live * stride, budget_bytes, "right"))
    whole, rest = np.divmod(live, slots)
    footers = np.array([footer_bytes(int(blocks)) if blocks else 0 for blocks in rest.tolist()])
    gains = (files - live * stride - whole * footer_bytes(slots) - footers)[:allowed]
    if not len(gains) or gains.max() <= 0:
        return []
    reaching = np.flatnonzero(gains >= wanted)
    count = int(reaching[0] if len(reaching) else gains.argmax()) + 1
    return [one.extent for one in fitting[:count]]
