"""The policy contract.

A policy decides which ids are resident. It sees integer ids, sizes, pins and request boundaries:
never keys, bytes or tiers. Its owner (a `BlockTable`, or a simulator) holds the lock, hands out ids
below max_ids, and does what the answer says. All state lies in arrays, and one kernel call serves
one request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvstrata.policies.lists import Ints

Pins = NDArray[np.int32]
Flags = NDArray[np.bool_]
Places = NDArray[np.int8]


class Policy(ABC):
    """max_ids: ids are 0..max_ids-1. capacity_bytes: bound on the sizes of all resident ids.

    where[id] is 0 for an id that the policy does not know, and the policy's own business otherwise.
    """

    name: ClassVar[str]

    def __init__(self, max_ids: int, capacity_bytes: int) -> None:
        self.max_ids = max_ids
        self.where = np.zeros(max_ids, dtype=np.int8)
        self._hit = np.zeros(max_ids, dtype=np.bool_)
        self._evicted = np.zeros(max_ids, dtype=np.int64)
        self._forgotten = np.zeros(max_ids, dtype=np.int64)
        self._set_capacity(capacity_bytes)
        none = np.zeros(0, dtype=np.int64)
        # One empty call loads or compiles the kernel before the first request waits for it.
        self.access(none, none.astype(np.bool_), none, none.astype(np.int32), 0)
        self.remove(none, none)

    @property
    @abstractmethod
    def capacity_bytes(self) -> int:
        """The bound on resident bytes."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Sum of the sizes of all resident ids."""

    @abstractmethod
    def _set_capacity(self, capacity_bytes: int) -> None:
        """Write the bound; evicting down to it is `resize`'s work."""

    @abstractmethod
    def access(
        self, ids: Ints, admit: Flags, sizes: Ints, pins: Pins, request: int
    ) -> tuple[Flags, Ints, Ints]:
        """One request touches its chain of blocks.

        ids: the blocks of the request, root first, no id twice. admit: per id, may it become resident
        if it is not. sizes, pins: indexed by id; a pinned id is never evicted. request: equal for calls
        that belong to one request, whose repeated touches count once.
        Returns hits (resident before the call, per position), evicted ids (were resident, may have
        become so in this very call) and forgotten ids (the policy remembers nothing of them: they may
        be reused). The arrays are valid until the next call.
        """

    @abstractmethod
    def remove(self, ids: Ints, sizes: Ints) -> None:
        """Forget ids that left for another reason than this policy's choice. Unknown ids are ignored."""

    @abstractmethod
    def resize(self, capacity_bytes: int, sizes: Ints, pins: Pins) -> tuple[Ints, Ints]:
        """Change the bound; returns evicted and forgotten ids. Pinned ids may keep used above it."""

    @abstractmethod
    def resident(self, index: int) -> bool:
        """Is this id resident?"""

    @abstractmethod
    def order(self) -> Ints:
        """All resident ids, those that would leave first at the front."""
