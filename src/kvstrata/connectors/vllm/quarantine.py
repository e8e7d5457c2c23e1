"""Rows of vLLM's host memory that must not be used again yet.

A read that misses its deadline is a miss at once, but when it is already in the kernel it may still write
into its row whenever the medium comes back. vLLM frees the row as soon as it hears of the failure. So the
moment it has done so, the row is taken again under a key that nobody looks up, and given back when the
read has ended. Uses `prepare_write` and `complete_write` of vLLM's primary tier, nothing deeper.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

from vllm.v1.kv_offload.base import OffloadKey, ReqContext

from kvstrata.transfer.handle import Transfer

log = logging.getLogger(__name__)


class Quarantine:
    """spec: the OffloadingSpec, asked for its manager when first needed."""

    def __init__(self, spec: Any) -> None:
        self._spec = spec
        self._numbers = itertools.count()
        self._held: list[tuple[Transfer, list[OffloadKey], ReqContext]] = []

    def possible(self) -> bool:
        """Can rows be withheld with this version of vLLM?"""
        primary = self._primary()
        return hasattr(primary, "prepare_write") and hasattr(primary, "complete_write")

    def _primary(self) -> Any:
        return getattr(self._spec.get_manager(), "primary_tier", None)

    def hold(self, rows: set[int], transfer: Transfer) -> None:
        """Take these rows, all of them just freed, until the transfer is released.

        Free rows come in vLLM's order, so others are taken on the way and given back at once. If a row
        cannot be found, waits for the read instead: wrong bytes would be worse than a stalled engine.
        """
        primary = self._primary()
        context = ReqContext(req_id=f"kvstrata-quarantine-{next(self._numbers)}")
        kept: list[OffloadKey] = []
        others: list[OffloadKey] = []
        wanted = set(rows)
        while wanted:
            key = OffloadKey(b"kvstrata-quarantine-%d" % next(self._numbers) + bytes(4))
            taken = primary.prepare_write([key], context)
            if taken is None:
                break
            row = int(taken.store_spec.block_ids[0])
            (kept if row in wanted else others).append(key)
            wanted.discard(row)
        if others:
            primary.complete_write(others, context, False)
        self._held.append((transfer, kept, context))
        if wanted:
            log.error("kvstrata: %d rows could not be withheld; waiting for their reads", len(wanted))
            while not transfer.wait_released(1.0):
                pass

    def release(self) -> None:
        """Give back the rows of every read that has ended meanwhile."""
        still = []
        for transfer, keys, context in self._held:
            if transfer.released:
                self._primary().complete_write(keys, context, False)
            else:
                still.append((transfer, keys, context))
        self._held = still

    def wait(self) -> None:
        """Block until every such read has ended."""
        for transfer, _, _ in self._held:
            while not transfer.wait_released(1.0):
                log.warning("kvstrata: still waiting for a read that does not answer")
        self.release()
