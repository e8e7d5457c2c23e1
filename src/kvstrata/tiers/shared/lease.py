"""Who collects: epochs of a shared folder. No deleting here but of old epochs' files.

The highest file `collector/epoch-<n>` names the collector. It is created exclusively, by a member that has
seen the holder before it silent for lease_seconds, or gone on purpose. Each member measures time by its own
clock alone and compares it with nobody's; clocks may stand at any value and run at speeds that differ.

A holder that was stopped and runs on finds a higher epoch at its next `check`, which it makes before every
step that cannot be undone. It may have one such step in flight, and may trust a list of epochs for a
twentieth of a lease; so a new holder waits half a lease, its quarantine, before it hands out room.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from kvstrata.tiers.shared.format import (
    COLLECTOR,
    epoch_name,
    parse_member,
    parse_numbered,
    released_name,
)
from kvstrata.tiers.shared.grants import highest_epoch
from kvstrata.tiers.shared.medium import Medium

EPOCHS_KEPT = 4
"""Files of so many epochs stay; a contender that overslept more finds a higher one all the same."""
LIST_SHARE = 0.05
"""Of a lease: how long a list of epochs is trusted."""


def boot_seconds() -> float:
    """A clock that also runs while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lease:
    """One member's view of the epochs. Not thread-safe: the collecting thread's.

    beat_age: seconds since this member began its last good beat. silent: seconds for which another
    member's beat has not changed, by our clock; inf if it said that it closed. Both may be counted from
    when this member first looked. Methods raise OSError as the medium does.
    """

    def __init__(
        self,
        medium: Medium,
        member: int,
        lease_seconds: float,
        *,
        beat_age: Callable[[], float],
        silent: Callable[[int], float],
        clock: Callable[[], float] = boot_seconds,
    ) -> None:
        self.lease_seconds = lease_seconds
        self.epoch = 0
        """The epoch that this member holds; 0: none."""
        self._medium = medium
        self._member = member
        self._beat_age = beat_age
        self._silent = silent
        self._clock = clock
        self._listed_at = float("-inf")
        self._settled_at = float("inf")
        self._holders: dict[int, int | None] = {}
        self._nameless: tuple[int, float] = (0, 0.0)

    def contend(self) -> bool:
        """Is this member the collector? Becomes it where nobody is."""
        names = self._list()
        highest = highest_epoch(names)
        if self.epoch and highest == self.epoch:
            return self._fresh()
        self.epoch = 0
        if not self._fresh():
            return False
        released = released_name(highest) in names
        if highest and not released:
            holder = self._holder(highest)
            if holder == self._member:
                # It was created, but the medium answered an error.
                return self._begin(highest, quarantine=True)
            if self._silence(highest, holder) < self.lease_seconds:
                return False
        mine = highest + 1
        if not self._medium.create(epoch_name(mine), f"{self._member:016x}".encode()):
            return False
        # Somebody may have gone past this number, and its file been removed, since the list was made.
        if highest_epoch(self._list()) != mine:
            return False
        return self._begin(mine, quarantine=highest > 0 and not released)

    def _begin(self, epoch: int, *, quarantine: bool) -> bool:
        self.epoch = epoch
        self._settled_at = self._clock() + (self.lease_seconds / 2 if quarantine else 0.0)
        return True

    def check(self) -> bool:
        """May this member take one step as the collector now? To be asked before each."""
        if not self.epoch or not self._fresh():
            return False
        if self._clock() - self._listed_at >= LIST_SHARE * self.lease_seconds:
            self._list()
            # The list may have taken long.
            return bool(self.epoch) and self._fresh()
        return True

    @property
    def settled(self) -> bool:
        """Is the quarantine over, so that no step of a holder before can still come?"""
        return bool(self.epoch) and self._clock() >= self._settled_at

    def release(self) -> None:
        """Give the epoch up on purpose; the next member need not wait.

        But in quarantine nothing is said: whoever comes when this member has closed needs one as well.
        """
        settled = self.settled
        epoch, self.epoch = self.epoch, 0
        if epoch and settled:
            self._medium.create(released_name(epoch), f"{self._member:016x}".encode())

    def clean(self) -> int:
        """Remove files of epochs long past; returns how many."""
        if not self.epoch:
            return 0
        removed = 0
        for name in self._list():
            for kind in ("epoch", "released", "grants", "order"):
                number = parse_numbered(name, kind)
                if number is not None and number <= self.epoch - EPOCHS_KEPT and self.epoch:
                    self._medium.remove(name)
                    removed += 1
        return removed

    def _fresh(self) -> bool:
        return self._beat_age() < self.lease_seconds / 2

    def _list(self) -> Mapping[str, int]:
        began = self._clock()
        names = self._medium.names(COLLECTOR)
        self._listed_at = began
        if self.epoch and highest_epoch(names) != self.epoch:
            self.epoch = 0
        return names

    def _holder(self, epoch: int) -> int | None:
        """Who made this epoch; None for a file that does not say."""
        if self._holders.get(epoch) is None:
            data = self._medium.fetch(epoch_name(epoch)) or b""
            self._holders = {epoch: parse_member(data.decode("ascii", "replace").strip())}
        return self._holders[epoch]

    def _silence(self, epoch: int, holder: int | None) -> float:
        if holder is not None:
            return self._silent(holder)
        if self._nameless[0] != epoch:
            self._nameless = (epoch, self._clock())
        return self._clock() - self._nameless[1]
