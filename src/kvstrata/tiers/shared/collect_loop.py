"""CollectLoop: calls a collector again and again, and makes a new one when this process is a new member."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable

from kvstrata.telemetry import Telemetry
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.shared.catalog import Catalog
from kvstrata.tiers.shared.collector import Collector
from kvstrata.tiers.shared.fields import SharedFields
from kvstrata.tiers.shared.medium import Medium
from kvstrata.tiers.shared.session import Session
from kvstrata.tiers.shared.small_files import FolderSettings

log = logging.getLogger(__name__)


class CollectLoop:
    """session: this process as a member, None while it is none. It collects while both breakers are closed.

    `run` is for a thread of its own.
    """

    def __init__(
        self,
        medium: Medium,
        catalog: Catalog,
        settings: FolderSettings,
        session: Callable[[], Session | None],
        config: SharedFields,
        telemetry: Telemetry,
        breakers: tuple[Breaker, Breaker],
        *,
        tier: str,
        closing: threading.Event,
    ) -> None:
        self._medium = medium
        self._catalog = catalog
        self._settings = settings
        self._session = session
        self._config = config
        self._telemetry = telemetry
        self._reads, self._writes = breakers
        self._tier = tier
        self._closing = closing

    def run(self) -> None:
        """A thread's life."""
        session: Session | None = None
        collector: Collector | None = None
        while not self._closing.wait(self._config.refresh_seconds):
            try:
                if session is not self._session():
                    session = self._session()
                    collector = None if session is None else self._make_collector(session)
                if collector is not None and self._reads.closed and self._writes.closed:
                    collector.cycle()
            except OSError as error:
                name = errno.errorcode.get(error.errno or 0, "unknown")
                self._telemetry.count("io_errors_total", self._tier, "collect", name)
            except Exception:
                log.exception("kvstrata: tier %s: collecting raised", self._tier)
        if collector is not None:
            try:
                collector.close()
            except OSError as error:
                log.warning(
                    "kvstrata: tier %s: the collector's epoch was not given up: %s", self._tier, error
                )

    def _make_collector(self, session: Session) -> Collector:
        return Collector(
            self._medium,
            session.member,
            self._catalog,
            session.journal,
            self._settings,
            self._config,
            self._telemetry,
            self._tier,
        )
