"""MemberLoop: what a member does all the time: beat, listen, ask for room, write down what was used.

It holds the session, makes it, and leaves it when others may hold this member for dead. Every call to the
medium counts for the breakers. `run` is for a thread of its own.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from kvstrata.telemetry import Telemetry
from kvstrata.tiers.breaker import Breaker
from kvstrata.tiers.shared.catalog import Catalog
from kvstrata.tiers.shared.entrance import Entrance
from kvstrata.tiers.shared.extents import ExtentWriter
from kvstrata.tiers.shared.fields import SharedFields
from kvstrata.tiers.shared.format import VERSION
from kvstrata.tiers.shared.grants import Standing, read_grants
from kvstrata.tiers.shared.medium import Medium
from kvstrata.tiers.shared.member import first_beat
from kvstrata.tiers.shared.session import Session
from kvstrata.tiers.shared.watcher import Watcher

VERSIONS_TOLD = 16
"""Of so many different versions among the members people are told, this one's included."""

log = logging.getLogger(__name__)


class MemberLoop:
    """session: this process as a member; None while it may only read. turned: the first turn was made.

    entrance: of a folder that was entered. version: of this kvstrata. closing: nobody joins any more.
    """

    def __init__(
        self,
        medium: Medium,
        catalog: Catalog,
        entrance: Entrance,
        writer: ExtentWriter,
        config: SharedFields,
        telemetry: Telemetry,
        breakers: tuple[Breaker, Breaker],
        *,
        tier: str,
        version: str,
        closing: threading.Event,
    ) -> None:
        self.session: Session | None = None
        self.turned = threading.Event()
        self._medium = medium
        self._catalog = catalog
        self._entrance = entrance
        self._settings = entrance.settings
        self._writer = writer
        self._config = config
        self._telemetry = telemetry
        self._reads, self._writes = breakers
        self._tier = tier
        self._version = version
        self._versions = {version}
        self._closing = closing
        self._joining = threading.Lock()
        self._access_at = 0.0
        self._watcher = Watcher(
            medium,
            catalog,
            telemetry,
            tier=tier,
            lease_seconds=self._settings.lease_seconds,
            watch=self._reads.watch,
            between=self._beat_if_due,
        )

    def run(self) -> None:
        """A thread's life, until closing."""
        wait = min(self._config.refresh_seconds, self._settings.lease_seconds / 10)
        poll_at = 0.0
        while True:
            try:
                polling = time.monotonic() >= poll_at
                self._turn(polling)
                if polling:
                    poll_at = time.monotonic() + self._config.refresh_seconds
            except Exception:
                log.exception("kvstrata: tier %s: a turn of the member raised", self._tier)
            self.turned.set()
            if self._closing.wait(wait):
                return

    def _turn(self, polling: bool) -> None:
        self._look_after_session()
        if polling:
            self._try(self._reads, self._poll, watch=nullcontext)  # it is watched call by call
        session = self.session
        if session is None:
            return
        self._try(self._reads, lambda: self._read_grants(session))
        self._try(self._writes, lambda: self._write_down(session))

    def _look_after_session(self) -> None:
        """Beat, and leave a session that others may hold for dead."""
        self._beat_if_due()
        session = self.session
        if session is not None and not session.may_write:
            expelled = session.left or session.room.expelled
            silent = f"no beat for {session.member.silent_seconds:.1f} s"
            self._leave(session, "others hold it for dead" if expelled else silent)
        if self.session is None and self._writes.closed:
            try:
                with self._writes.watch(count_errors=False):
                    self._join()
            except OSError as error:
                self._writes.trip(f"cannot join the folder, so it is only read: {error}")

    def _beat_if_due(self) -> None:
        session = self.session
        if session is not None and session.beat_due:
            self._try(self._writes, lambda: self._beat(session))

    def _beat(self, session: Session) -> None:
        try:
            session.beat()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            self._entrance.check()
            session.left = True  # somebody removed this member's folder

    def probe(self) -> None:
        """Beat, or join again: a small write that shows whether the medium answers. Raises OSError."""
        session = self.session
        if session is None:
            self._join()
        else:
            self._beat(session)

    def _join(self) -> None:
        """Become a member under a new id. Raises OSError."""
        with self._joining:
            if self.session is not None or self._closing.is_set():
                return
            beat = first_beat(
                self._settings,
                self._version,
                self._config.capacity_bytes,
                collect=self._config.collect,
            )
            self._entrance.check()
            self.session = Session(
                self._medium,
                self._settings,
                beat,
                self._catalog,
                access_bytes=self._config.access_bytes,
                burst_bytes=self._config.burst_bytes,
            )
            self._writer.ask_again()

    def _leave(self, session: Session, why: str) -> None:
        """What is being written under this id must not be published any more."""
        session.left = True
        with self._joining:
            if self.session is session:
                self.session = None
        self._writer.drop_all()
        self._telemetry.count("rejoins_total", self._tier)
        self._telemetry.event(f"{self._tier} joins anew", f"member {session.member.word}: {why}")

    def _poll(self) -> None:
        session = self.session
        me = session.member.id if session is not None else None

        def check(members: list[int]) -> None:
            if me is None or me not in members:
                self._entrance.check()

        round_ = self._watcher.poll(me, check)
        if session is not None:
            if me not in round_.members:
                session.left = True
            session.member.see(round_.members, round_.beats)
            self._compare_versions(session)

    def _compare_versions(self, session: Session) -> None:
        """Members of another kvstrata that reads the same format are welcome, and people are told."""
        for member in session.member.others():
            beat = session.member.seen_beat(member)
            if beat is None or beat.version in self._versions or len(self._versions) >= VERSIONS_TOLD:
                continue
            self._versions.add(beat.version)
            self._telemetry.event(
                f"{self._tier} other version",
                f"member {beat.member} on {beat.host} runs kvstrata {beat.version or 'unknown'}, this one "
                f"{self._version or 'unknown'}; both read format version {VERSION}",
            )

    def _read_grants(self, session: Session) -> None:
        if read_grants(self._medium, session.room) is Standing.CHANGED:
            self._writer.ask_again()
            self._try(self._writes, lambda: self._beat(session))

    def _write_down(self, session: Session) -> None:
        session.journal.flush()
        if time.monotonic() >= self._access_at:
            self._access_at = time.monotonic() + self._config.access_seconds
            session.access.flush()
        session.compact()

    def _try(
        self,
        breaker: Breaker,
        work: Callable[[], None],
        watch: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> bool:
        """Do what may fail or hang, unless it is known to. An error is counted and survived."""
        if not breaker.closed:
            return False
        try:
            with (watch or breaker.watch)():
                work()
        except OSError as error:
            if error.errno == errno.ENODEV:
                for each in (self._reads, self._writes):
                    each.trip(str(error))
            return False
        return True
