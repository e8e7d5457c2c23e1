"""KeyChains: which copy of a block look-ups find, and which wait behind it. No locks here.

Two members may save the same block at once, and a rewritten block is in two extents for a moment. The first
id that is known for a key is the one that is found. The others are its alternates: each takes its place
when it leaves.
"""

from __future__ import annotations

from kvstrata.table import Column
from kvstrata.tiers.shared.id_columns import NONE, RESIDENT, IdColumns
from kvstrata.types import BlockKey


class KeyChains:
    """found: the id that look-ups find for a key; its alternates follow in `columns.next`."""

    def __init__(self, columns: IdColumns) -> None:
        self.found: dict[BlockKey, int] = {}
        self._columns = columns

    def settle(self, keys: list[BlockKey], ids: Column) -> int:
        """These ids are loadable now; returns how many only as alternates."""
        columns, found = self._columns, self.found
        columns.state[ids] = RESIDENT
        before = len(found)
        if found.keys().isdisjoint(keys):
            found.update(zip(keys, ids.tolist(), strict=True))
            if len(found) - before == len(keys):
                return 0
            for key in keys:  # an extent holds one key twice: start over, one by one
                found.pop(key, None)
        for key, index in zip(keys, ids.tolist(), strict=True):
            first = found.setdefault(key, index)
            if first != index:
                columns.next[index] = columns.next[first]
                columns.next[first] = index
        return len(keys) - (len(found) - before)

    def detach(self, key: BlockKey, index: int) -> None:
        """Take a resident id from its key; an alternate takes its place."""
        following = self._columns.next
        first = self.found[key]
        after = int(following[index])
        if first == index:
            if after == NONE:
                del self.found[key]
            else:
                self.found[key] = after
        else:
            before = first
            while int(following[before]) != index:
                before = int(following[before])
            following[before] = after
        following[index] = NONE

    def check_integrity(self) -> None:
        chained: set[int] = set()
        for first in self.found.values():
            index = first
            while index != NONE:
                assert index not in chained, "an id is found under two keys"
                chained.add(index)
                index = int(self._columns.next[index])
        assert chained == self._columns.within(RESIDENT)
