"""Publisher: makes extents that are full, old or wanted visible to all, and says so in the journal.

It moves no bytes itself. An extent that cannot be published is given up, with its blocks and its file.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from kvstrata.telemetry import Telemetry
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.shared.batches import Added
from kvstrata.tiers.shared.extents import ExtentWriter, OpenExtent
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.tiers.shared.session import Session

PUBLISHER_WAIT_SECONDS = 0.25

log = logging.getLogger(__name__)


class Publisher:
    """publish_seconds: an extent is not held back for longer.

    finish: given the footer, makes an extent durable and visible, and returns its bytes on the medium.
    watch: around that. drop: removes what there is of one. finish and drop raise OSError. forget: its
    blocks leave. ended: publishing has to stop. `run` is for one or more threads of their own.
    """

    def __init__(
        self,
        writer: ExtentWriter,
        session: Callable[[], Session | None],
        telemetry: Telemetry,
        writes: Breaker,
        *,
        tier: str,
        publish_seconds: float,
        finish: Callable[[OpenExtent, bytes], int],
        watch: Callable[[], AbstractContextManager[None]],
        drop: Callable[[OpenExtent], None],
        forget: Callable[[ExtentId], int],
        ended: threading.Event,
    ) -> None:
        self._writer = writer
        self._session = session
        self._telemetry = telemetry
        self._writes = writes
        self._tier = tier
        self._publish_seconds = publish_seconds
        self._finish = finish
        self._watch = watch
        self._drop = drop
        self._forget = forget
        self._ended = ended

    def run(self) -> None:
        """A thread's life."""
        wait = min(PUBLISHER_WAIT_SECONDS, self._publish_seconds)
        while not self._ended.is_set():
            self._writer.close_old(self._publish_seconds)
            extent = self._writer.next_done(wait)
            if extent is None:
                continue
            try:
                self._publish_one(extent)
            except Exception:
                log.exception("kvstrata: tier %s: publishing raised", self._tier)

    def _publish_one(self, extent: OpenExtent) -> None:
        session = self._session()
        footer = extent.footer()
        mine = session is not None and session.member.id == extent.id.member and session.may_write
        if session is None or not mine or extent.dropped or not len(footer.entries):
            self._give_up(extent, len(footer.entries))
            return
        try:
            with self._watch():
                file_bytes = self._finish(extent, footer.encode())
        except OSError as error:
            self._telemetry.event(f"{self._tier} extent not published", f"{extent.id.name}: {error}")
            self._give_up(extent, len(footer.entries))
            return
        extent.published = True
        self._telemetry.count("published_extents_total", self._tier)
        self._telemetry.count("published_bytes_total", self._tier, by=file_bytes)
        added = Added(extent.id, file_bytes, footer.stride, footer.namespace, footer.entries)
        try:
            with self._writes.watch():
                session.journal.add([added])
        except OSError as error:  # it waits in the journal, and is tried again
            self._telemetry.event(f"{self._tier} journal not written", f"{extent.id.name}: {error}")
        finally:
            self._writer.close(extent, file_bytes)

    def _give_up(self, extent: OpenExtent, blocks: int) -> None:
        """An extent that will not be published: its blocks and its file go."""
        self._forget(extent.id)
        self._telemetry.count("unpublished_blocks_total", self._tier, by=blocks)
        try:
            with self._writes.watch(count_errors=False):
                self._drop(extent)
        except OSError as error:
            self._telemetry.event(f"{self._tier} part left behind", f"{extent.id.part}: {error}")
        self._writer.close(extent, 0)
