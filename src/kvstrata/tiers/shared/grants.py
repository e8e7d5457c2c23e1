"""Who may write how much. Arithmetic and small state; no thread, and no I/O but in `read_grants`.

A limit is cumulative: what a member may ever have published. So a grants file that is read twice, late or
never does no harm. What a member may still write without asking is outstanding: the highest limit that it
may believe in, less what it has published. The collector keeps

    used + outstanding of all + debt + reserve <= capacity

A limit may be lowered. Its room comes back only when the member has said, in a beat, that it read so.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from kvstrata.tiers.shared.format import COLLECTOR, grants_name, parse_numbered
from kvstrata.tiers.shared.medium import Medium
from kvstrata.tiers.shared.small_files import Beat, Grant, Grants


def fair_split(wanted: Mapping[int, int], room: int) -> dict[int, int]:
    """Max-min fair shares: nobody gets more than it wants, nobody less than another for being modest.

    The sum is at most `room`, and is `room` unless everybody has all that it wants.
    """
    shares: dict[int, int] = {}
    left = max(0, room)
    asking = sorted(wanted, key=lambda member: (wanted[member], member))
    for place, member in enumerate(asking):
        share = max(0, min(wanted[member], left // (len(asking) - place)))
        shares[member] = share
        left -= share
    return shares


@dataclass(slots=True)
class _Account:
    """What the collector knows of a member's room.

    written: limits that the member may have read, by the counter of the grants that said so, ascending;
    the first is what it is known to have accepted, or what an earlier epoch left.
    """

    limit_bytes: int = 0
    published_bytes: int = 0
    wanted_bytes: int = 0
    written: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])

    @property
    def held_bytes(self) -> int:
        return max(limit for _, limit in self.written)

    @property
    def outstanding_bytes(self) -> int:
        return max(0, self.held_bytes - self.published_bytes)

    def accept(self, counter: int, limit_bytes: int) -> None:
        later = [(number, limit) for number, limit in self.written if number > counter]
        self.written = [(counter, limit_bytes), *later]


class GrantBook:
    """The collector's account of everybody's room in one epoch. Not thread-safe.

    floor_bytes: what a member that wants nothing is given where there is room, so that its next save need
    not wait for an answer. carried: the last grants of an earlier epoch.
    """

    def __init__(
        self,
        epoch: int,
        collector: str,
        capacity_bytes: int,
        reserve_bytes: int,
        floor_bytes: int = 0,
        carried: Grants | None = None,
    ) -> None:
        self.epoch = epoch
        self.collector = collector
        self.capacity_bytes = capacity_bytes
        self.reserve_bytes = reserve_bytes
        self.floor_bytes = floor_bytes
        self.debt_bytes = 0
        self.counter = 0
        self._accounts: dict[int, _Account] = {}
        self._last: Grants | None = None
        if carried is not None:
            self.debt_bytes = max(0, carried.debt_bytes)
            # A member that lost its epoch and found it again goes on counting.
            self.counter = carried.counter if carried.epoch == epoch else 0
            for member, grant in carried.members.items():
                held = max(grant.limit_bytes, grant.held_bytes)
                account = _Account(grant.limit_bytes, grant.used_bytes, 0, [(self.counter, held)])
                self._accounts[member] = account

    @property
    def members(self) -> list[int]:
        return list(self._accounts)

    def observe(self, member: int, published_bytes: int, beat: Beat | None) -> None:
        """What the member's journal and beat say. The journal is read before or with the beat."""
        account = self._accounts.setdefault(member, _Account())
        account.published_bytes = max(account.published_bytes, published_bytes)
        if beat is None:
            return
        account.wanted_bytes = max(0, beat.wanted_bytes)
        if beat.grant_epoch == self.epoch and beat.grant_counter <= self.counter:
            account.accept(beat.grant_counter, beat.limit_bytes)

    def forget(self, member: int) -> None:
        """A member that is no more, and whose files are all accounted for or never were."""
        self._accounts.pop(member, None)

    def expel(self, member: int) -> None:
        """A member that is dead but may have files nobody knows of: its room becomes debt."""
        account = self._accounts.pop(member, None)
        if account is not None:
            self.debt_bytes += account.outstanding_bytes

    def forgive(self) -> None:
        """All files of expelled members have been found: what they take is in `used` now."""
        self.debt_bytes = 0

    @property
    def outstanding_bytes(self) -> int:
        return sum(account.outstanding_bytes for account in self._accounts.values())

    def free_bytes(self, used_bytes: int) -> int:
        """What nobody uses and nobody has been promised; below 0 when something outside took it."""
        taken = used_bytes + self.outstanding_bytes + self.debt_bytes + self.reserve_bytes
        return self.capacity_bytes - taken

    def missing_bytes(self) -> int:
        """What members want and do not have: the room that the collector should make."""
        return sum(
            max(0, self._wanted(account) - account.outstanding_bytes) for account in self._accounts.values()
        )

    def _wanted(self, account: _Account) -> int:
        return max(account.wanted_bytes, self.floor_bytes)

    def plan(self, used_bytes: int) -> Grants | None:
        """New grants to be written, or None if they would say what the last ones said.

        From here on the book counts as if they had been read, whether or not writing them succeeds.
        """
        accounts = self._accounts
        wanted = {member: self._wanted(account) for member, account in accounts.items()}
        room = self.capacity_bytes - self.reserve_bytes - used_bytes - self.debt_bytes
        shares = fair_split(wanted, room)
        scarce = sum(wanted.values()) > room
        goals = {member: account.published_bytes + shares[member] for member, account in accounts.items()}
        missing = {
            member: goals[member] - account.held_bytes
            for member, account in accounts.items()
            if goals[member] > account.held_bytes
        }
        raises = fair_split(missing, self.free_bytes(used_bytes))
        grants: dict[int, Grant] = {}
        for member, account in accounts.items():
            goal, limit = goals[member], account.limit_bytes
            if goal > account.held_bytes:
                limit = account.held_bytes + raises[member]
            elif goal > limit or scarce:
                limit = goal  # it costs nothing: the member may believe in as much
            limit = max(limit, account.published_bytes)
            held = max(limit, account.held_bytes)
            note = "no room" if limit - account.published_bytes < wanted[member] else ""
            grants[member] = Grant(limit, account.published_bytes, held, note)
        if self._last is not None and self._says_the_same(grants):
            return None
        self.counter += 1
        for member, grant in grants.items():
            accounts[member].limit_bytes = grant.limit_bytes
            accounts[member].written.append((self.counter, grant.limit_bytes))
        self._last = Grants(
            self.epoch,
            self.collector,
            self.counter,
            used_bytes,
            self.capacity_bytes,
            self.debt_bytes,
            grants,
        )
        return self._last

    def _says_the_same(self, grants: Mapping[int, Grant]) -> bool:
        assert self._last is not None
        last = self._last.members
        return (
            self._last.debt_bytes == self.debt_bytes
            and last.keys() == grants.keys()
            and all(
                last[member].limit_bytes == grant.limit_bytes
                and last[member].held_bytes == grant.held_bytes
                and last[member].note == grant.note
                for member, grant in grants.items()
            )
        )

    def unwritten(self) -> None:
        """Writing the last plan failed: the next one is written even if it says the same."""
        self._last = None


class Standing(Enum):
    """What reading the grants came to."""

    SAME = "same"
    CHANGED = "changed"
    EXPELLED = "expelled"
    """The collector holds this member for dead: it must drop what it writes and join anew."""


class Allowance:
    """What this member may write, and what it has taken of that. Thread-safe, memory only.

    burst_bytes: what it always wants to have ready, for a burst that nobody announces. expelled: the
    collector holds this member for dead.
    """

    def __init__(self, member: int, burst_bytes: int = 0) -> None:
        self.member = member
        self._burst_bytes = burst_bytes
        self.expelled = False
        self._lock = threading.Lock()
        self._granted_bytes = 0
        self._published_bytes = 0
        self._taken_bytes = 0
        self._asked_bytes = 0
        self._asked_before_bytes = 0
        self._epoch = 0
        self._counter = 0
        self._listed = False

    def take(self, size: int) -> bool:
        """May so many more bytes be written? They are taken then, and given back or published once."""
        with self._lock:
            self._asked_bytes += size
            if self._published_bytes + self._taken_bytes + size > self._granted_bytes:
                return False
            self._taken_bytes += size
            return True

    def ask(self, size: int) -> None:
        """Blocks of so many bytes found no room: the next beat says so."""
        with self._lock:
            self._asked_bytes += size

    def refund(self, size: int) -> None:
        """So many bytes that were taken were not written, or their file is no more."""
        with self._lock:
            assert 0 <= size <= self._taken_bytes, "more is given back than was taken"
            self._taken_bytes -= size

    def publish(self, taken: int, size: int) -> None:
        """A file for which `taken` bytes were taken is published and takes `size` bytes."""
        with self._lock:
            assert 0 <= taken <= self._taken_bytes, "more is published than was taken"
            self._taken_bytes -= taken
            self._published_bytes += size

    def apply(self, grants: Grants) -> Standing:
        """Take over what the collector says. Older grants than those read before change nothing."""
        with self._lock:
            if (grants.epoch, grants.counter) <= (self._epoch, self._counter):
                return Standing.SAME
            grant = grants.members.get(self.member)
            if grant is None:
                self.expelled |= self._listed
                return Standing.EXPELLED if self._listed else Standing.SAME
            self._listed = True
            self._epoch, self._counter = grants.epoch, grants.counter
            changed = grant.limit_bytes != self._granted_bytes
            self._granted_bytes = grant.limit_bytes
            self._asked_before_bytes, self._asked_bytes = self._asked_bytes, 0
            return Standing.CHANGED if changed else Standing.SAME

    @property
    def limit_bytes(self) -> int:
        """What it takes its limit to be: a lowered one cannot undo what is taken."""
        with self._lock:
            return self._limit()

    def _limit(self) -> int:
        return max(self._granted_bytes, self._published_bytes + self._taken_bytes)

    @property
    def epoch(self) -> int:
        """Of the grants that were read last; 0: none."""
        return self._epoch

    @property
    def counter(self) -> int:
        """Of these grants within their epoch."""
        return self._counter

    @property
    def published_bytes(self) -> int:
        with self._lock:
            return self._published_bytes

    @property
    def taken_bytes(self) -> int:
        with self._lock:
            return self._taken_bytes

    def acknowledgement(self) -> tuple[int, int, int]:
        """Epoch, counter and limit for a beat: nothing beyond this limit is taken under those grants."""
        with self._lock:
            return self._epoch, self._counter, self._limit()

    def wanted_bytes(self) -> int:
        """For a beat: what is taken, and what was asked for of late."""
        with self._lock:
            asked = max(self._asked_bytes, self._asked_before_bytes)
            return self._taken_bytes + max(asked, self._burst_bytes)


def highest_epoch(names: Mapping[str, int]) -> int:
    """Of the files of `collector`; 0 if there is none."""
    return max((parse_numbered(name, "epoch") or 0 for name in names), default=0)


def read_grants(medium: Medium, allowance: Allowance) -> Standing:
    """Read the newest grants. Raises OSError.

    The epochs are listed after the file was read. A new collector reads the grants of the epoch before its
    own only after it has begun its own, so a member never believes in a limit that a later collector does
    not know of, even if a collector that was stopped writes once more.
    """
    epoch = highest_epoch(medium.names(COLLECTOR))
    data = medium.fetch(grants_name(epoch)) if epoch else None
    if data is None or highest_epoch(medium.names(COLLECTOR)) != epoch:
        return Standing.SAME
    grants = Grants.decode(data)
    if grants is None or grants.epoch != epoch:
        return Standing.SAME
    return allowance.apply(grants)
