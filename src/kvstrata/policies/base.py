"""The policy contract.

A policy decides which ids are resident. It sees integer ids, sizes, pins and request boundaries: never
keys, bytes or tiers. Its owner (a `BlockTable`, or the simulator) holds the lock, hands out ids below
max_ids, and does what the answer says. All state lies in arrays, and one kernel serves many whole
requests per call: the live table calls it with one, the simulator with a million accesses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstrata.errors import ConfigError
from kvstrata.jit import kernel
from kvstrata.policies.lists import Ids

Ints = NDArray[np.int64]
Pins = NDArray[np.int32]
Flags = NDArray[np.bool_]
Places = NDArray[np.int8]
Outcomes = NDArray[np.int8]
Digests = NDArray[np.uint64]

MISS, HIT, ADMITTED = 0, 1, 2
"""What became of an access: not resident then and kept out; resident; not resident then, resident now."""

GHOSTS_TOO = -128

CAPACITY, USED, OUT, GONE = range(4)
OWN, STATE_SLOTS = 4, 16
"""The numbers of a policy, `state` to its kernels: the bound, what is resident, and how many ids the call
has written to evicted and to forgotten; from OWN on what the policy alone knows."""


class Answer(NamedTuple):
    """outcome: per access. evicted: ids that were resident and are no more, or came and left within the
    call. forgotten: ids of which the policy knows nothing any more (they may be reused). Each id once.
    """

    outcome: Outcomes
    evicted: Ids
    forgotten: Ids


@kernel
def _settle(where: Places, mark: Places, ids: Ids, lowest: int) -> int:
    """Move the ids whose place now is lowest..0, each once, to the front; return how many."""
    kept = 0
    for entry in range(len(ids)):
        index = ids[entry]
        if mark[index] == 0 and lowest <= where[index] <= 0:
            mark[index] = 1
            ids[kept] = index
            kept += 1
    for entry in range(kept):
        mark[ids[entry]] = 0
    return kept


def mixed(ids: NDArray[np.integer]) -> Digests:
    """splitmix64 of ids (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)."""
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def check_knobs(policy: str, known: Mapping[str, float], given: Mapping[str, float]) -> None:
    """Raises ConfigError for a parameter that the policy does not have."""
    for name in sorted(set(given) - set(known)):
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"policy {policy}: no parameter {name!r}; {has}")


class Policy(ABC):
    """max_ids: ids are 0..max_ids-1. capacity: bound on the sizes of all resident ids, in their unit.

    where[id] is 0 for an id that the policy does not know, positive for a resident one, negative for a
    remembered one that left (a ghost). Ghosts weigh at most one capacity.
    digest[id]: what tells blocks apart even when their ids are reused, for policies that sketch.
    """

    name: ClassVar[str]
    KNOBS: ClassVar[Mapping[str, float]] = {}
    """Parameters and their defaults, keyword arguments of the constructor."""
    COUNTS_REPEATS: ClassVar[bool] = False
    """May the kernel see a second touch within one request? Where order alone counts it should."""

    def __init__(self, max_ids: int, capacity: int, **knobs: float) -> None:
        check_knobs(self.name, self.KNOBS, knobs)
        self.max_ids = max_ids
        self.knobs: dict[str, float] = {**self.KNOBS, **knobs}
        self.where = np.zeros(max_ids, dtype=np.int8)
        self.digest = np.zeros(0, dtype=np.uint64)
        self._mark = np.zeros(max_ids, dtype=np.int8)
        self._stamp = np.full(0, -1, dtype=np.int64)
        self._outcome = np.zeros(0, dtype=np.int8)
        self._evicted = np.zeros(0, dtype=np.int32)
        self._forgotten = np.zeros(0, dtype=np.int32)
        self._admit_all = np.zeros(0, dtype=np.bool_)
        self._no_pins = np.zeros(0, dtype=np.int32)
        self._state = np.zeros(STATE_SLOTS, dtype=np.int64)
        self._make()
        self._set_capacity(capacity)

    def warm(self) -> None:
        """Load or compile the kernels, so that no request waits for them."""
        ids, sizes = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
        self.access(ids, np.zeros(0, dtype=np.bool_), sizes, ids, 0)
        self.remove(ids, sizes)
        self.resize(self.capacity, sizes, ids)

    # What a policy implements

    @abstractmethod
    def _make(self) -> None:
        """Read the parameters and allocate what max_ids asks for."""

    def _set_capacity(self, capacity: int) -> None:
        """Write the bound and what follows from it; evicting down to it is `_fit`'s work."""
        self._state[CAPACITY] = capacity

    @abstractmethod
    def _run(
        self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins,
        outcome: Outcomes, evicted: Ids, forgotten: Ids,
    ) -> None:  # fmt: skip
        """Make all accesses in order; request r is ids[starts[r]:starts[r+1]], root first, no id twice.

        Writes outcome per access, and the ids that lost their residency and those that were forgotten, in
        order; one may be there more than once or have come back. state[OUT] and state[GONE] say how many
        of each. What is forgotten at the moment it is evicted need not be written twice.
        A miss that may not enter, or is larger than the capacity, changes nothing. A pinned id stays;
        where room cannot be made, the newcomer stays out.
        """

    @abstractmethod
    def remove(self, ids: Ids, sizes: Ints) -> None:
        """Forget ids that left for another reason than this policy's choice. Unknown ids are ignored."""

    @abstractmethod
    def _fit(self, sizes: Ints, pins: Pins, evicted: Ids, forgotten: Ids) -> None:
        """Evict down to the capacity; answers as `_run`."""

    @abstractmethod
    def order(self) -> Ids:
        """All resident ids, those that would leave first at the front."""

    # What every policy has

    @property
    def capacity(self) -> int:
        """The bound on what is resident."""
        return int(self._state[CAPACITY])

    @property
    def used(self) -> int:
        """Sum of the sizes of all resident ids."""
        return int(self._state[USED])

    def access(self, ids: Ids, admit: Flags, sizes: Ints, pins: Pins, request: int) -> Answer:
        """A call of one live request: touch its chain of blocks, root first, no id twice.

        admit: per position, may it become resident if it is not. sizes, pins: indexed by id. request:
        equal for calls that belong to one request; what it touches again is not another reference.
        The arrays of the answer are valid until the next call.
        """
        if len(self._stamp) != self.max_ids:
            self._stamp = np.full(self.max_ids, -1, dtype=np.int64)
        fresh: Flags | None = None
        count = len(ids)
        if not self.COUNTS_REPEATS:
            seen = (self._stamp[ids] == request) & (self.where[ids] > 0)
            if seen.any():
                fresh = ~seen
                ids, admit = ids[fresh], admit[fresh]
        starts = np.array([0, len(ids)], dtype=np.int64)
        self._call(ids, starts, admit, sizes, pins)
        outcome = self._outcome[: len(ids)]
        self._stamp[ids] = request
        if fresh is not None:
            whole = np.full(count, HIT, dtype=np.int8)
            whole[fresh] = outcome
            outcome = whole
        return Answer(outcome, *self._settled())

    def admit_each(self, ids: Ids, sizes: Ints, pins: Pins, request: int) -> tuple[Ids, Ids]:
        """`access` for every id alone, all of them new, in one call; returns evicted and forgotten ids.

        For a table that takes over what it finds: the order of the ids is all that is known of them.
        """
        if len(self._stamp) != self.max_ids:
            self._stamp = np.full(self.max_ids, -1, dtype=np.int64)
        starts = np.arange(len(ids) + 1, dtype=np.int64)
        self._call(ids, starts, np.ones(len(ids), np.bool_), sizes, pins)
        self._stamp[ids] = request
        return self._settled()

    def replay(self, ids: Ids, starts: Ints, sizes: Ints) -> Outcomes:
        """Whole requests of a simulation: everything may enter, nothing is pinned.

        Valid until the next call.
        """
        if len(self._admit_all) < len(ids):
            self._admit_all = np.ones(len(ids), dtype=np.bool_)
        if len(self._no_pins) != self.max_ids:
            self._no_pins = np.zeros(self.max_ids, dtype=np.int32)
        self._call(ids, starts, self._admit_all[: len(ids)], sizes, self._no_pins)
        return self._outcome[: len(ids)]

    def access_all(self, ids: Ids, starts: Ints, sizes: Ints, pins: Pins) -> tuple[Ids, Ids]:
        """Whole requests that others made, everything may enter; returns evicted and forgotten ids."""
        self._call(ids, starts, np.ones(len(ids), np.bool_), sizes, pins)
        return self._settled()

    def resize(self, capacity: int, sizes: Ints, pins: Pins) -> tuple[Ids, Ids]:
        """Change the bound; returns evicted and forgotten ids. Pinned ids may keep used above it."""
        self._make_buffers(0)
        self._set_capacity(capacity)
        self._fit(sizes, pins, self._evicted, self._forgotten)
        return self._settled()

    def resident(self, index: int) -> bool:
        """Is this id resident?"""
        return bool(self.where[index] > 0)

    @property
    def resident_blocks(self) -> int:
        """How many ids are resident. Costs a pass over all."""
        return int(np.count_nonzero(self.where > 0))

    def _make_buffers(self, accesses: int) -> None:
        if len(self._outcome) < accesses:
            self._outcome = np.zeros(accesses, dtype=np.int8)
        # What leaves was there before or came in this call.
        if len(self._evicted) < self.max_ids + accesses:
            self._evicted = np.zeros(self.max_ids + accesses, dtype=np.int32)
            self._forgotten = np.zeros(self.max_ids + accesses, dtype=np.int32)

    def _call(self, ids: Ids, starts: Ints, admit: Flags, sizes: Ints, pins: Pins) -> None:
        self._make_buffers(len(ids))
        self._run(ids, starts, admit, sizes, pins, self._outcome, self._evicted, self._forgotten)

    def _settled(self) -> tuple[Ids, Ids]:
        left = self._evicted[: self._state[OUT]]
        evicted = left[: _settle(self.where, self._mark, left, GHOSTS_TOO)]
        unknown = np.concatenate([self._forgotten[: self._state[GONE]], evicted])
        return evicted, unknown[: _settle(self.where, self._mark, unknown, 0)]
