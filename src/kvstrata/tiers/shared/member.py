"""Member: one process that has the folder open; its sign of life, and what it knows of the others' lives.

Nobody's clock is compared with another's. Somebody lives while his beat was seen to change within a lease
of the watcher's own clock.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata

from kvstrata.tiers.shared.format import beat_name, member_word
from kvstrata.tiers.shared.medium import Medium
from kvstrata.tiers.shared.small_files import Beat, FolderSettings

BEATS_PER_LEASE = 5


def uptime_seconds() -> float:
    """A clock that goes on while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(slots=True)
class _Sight:
    """data: the last beat seen; since: when it was first seen so."""

    data: bytes
    since: float
    beat: Beat | None


class Member:
    """id: random, new with every start. beat: what the next sign of life says, beside its counter."""

    def __init__(
        self,
        medium: Medium,
        settings: FolderSettings,
        beat: Beat,
        clock: Callable[[], float] = uptime_seconds,
    ) -> None:
        self.id = secrets.randbits(64) | 1
        self.settings = settings
        self.lease_seconds = settings.lease_seconds
        self._medium = medium
        self._clock = clock
        self._beat = replace(beat, member=member_word(self.id), counter=0)
        self._lock = threading.Lock()
        self._sequence = 0
        self._joined = False
        self._beaten_at = clock()
        self._sights: dict[int, _Sight] = {}
        self._looked_at = self._beaten_at

    @property
    def word(self) -> str:
        return member_word(self.id)

    def next_sequence(self) -> int:
        """A number for the next extent that carries this member's id."""
        with self._lock:
            self._sequence += 1
            return self._sequence

    # Its own life

    @property
    def joined(self) -> bool:
        """Does it have a folder of its own?"""
        return self._joined

    def join(self) -> None:
        """The first beat makes the member's folder. Raises OSError."""
        asked_at = self._clock()
        if not self._medium.create(beat_name(self.id), self._beat.encode()):
            raise AssertionError("two members with one random id")
        self._beaten_at = asked_at
        self._joined = True

    def beat_due(self) -> bool:
        return self._clock() - self._beaten_at >= self.lease_seconds / BEATS_PER_LEASE

    def beat(self, **changes: object) -> None:
        """A sign of life; changes: of the Beat's fields. Raises OSError, ENOENT if the folder is gone."""
        with self._lock:
            self._beat = replace(self._beat, counter=self._beat.counter + 1, **changes)  # type: ignore[arg-type]
            data = self._beat.encode()
        asked_at = self._clock()
        self._medium.replace(beat_name(self.id), data)
        self._beaten_at = asked_at  # before the call: it may have taken long

    @property
    def last_beat(self) -> Beat:
        return self._beat

    @property
    def fresh(self) -> bool:
        """Nobody can have taken this member for dead: its last beat is younger than half a lease."""
        return self._joined and self._clock() - self._beaten_at < self.lease_seconds / 2

    @property
    def silent_seconds(self) -> float:
        """Since the last beat began."""
        return self._clock() - self._beaten_at

    # The others' lives

    def see(self, members: Iterable[int], beats: Mapping[int, bytes]) -> None:
        """Who has a folder now, and the beats that could be read."""
        now = self._clock()
        with self._lock:
            self._looked_at = now
            there = set(members)
            self._sights = {member: sight for member, sight in self._sights.items() if member in there}
            for member in there:
                data = beats.get(member)
                sight = self._sights.get(member)
                if sight is None:
                    self._sights[member] = _Sight(data or b"", now, Beat.decode(data or b""))
                elif data is not None and data != sight.data:
                    self._sights[member] = _Sight(data, now, Beat.decode(data))

    def others(self) -> list[int]:
        """Everybody else who has a folder, alive or not, in the order of their ids."""
        with self._lock:
            return sorted(member for member in self._sights if member != self.id)

    def seen_beat(self, member: int) -> Beat | None:
        """The last one; None if it could not be read."""
        with self._lock:
            sight = self._sights.get(member)
            return None if sight is None else sight.beat

    def alive(self, member: int) -> bool:
        """Has its beat changed within a lease before the last look, without saying that it closes?

        Who looks seldom, because the medium is slow, takes nobody for dead between two looks.
        """
        if member == self.id:
            return True
        with self._lock:
            sight = self._sights.get(member)
            if sight is None or (sight.beat is not None and sight.beat.state == "closed"):
                return False
            return self._looked_at - sight.since < self.lease_seconds

    def dead(self, member: int) -> bool:
        """Closed, or seen without a change for a lease. A stranger without a folder is dead as well."""
        return not self.alive(member)


def own_version() -> str:
    """Of the installed kvstrata; empty where it is not installed."""
    try:
        return metadata.version("kvstrata")
    except metadata.PackageNotFoundError:
        return ""


def first_beat(settings: FolderSettings, version: str, capacity_bytes: int, *, collect: bool) -> Beat:
    """What a new member of this process says of itself."""
    return Beat(
        member="",
        counter=0,
        collect=collect,
        host=socket.gethostname(),
        pid=os.getpid(),
        version=version,
        capacity_bytes=capacity_bytes,
        lease_seconds=settings.lease_seconds,
    )
