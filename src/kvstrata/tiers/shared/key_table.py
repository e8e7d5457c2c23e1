"""KeyTable: 64-bit words to ids, many per call, in arrays. Linear probing; removing shifts back.

The words are the beginnings of block keys, which are digests: their low bits are as good as a hash.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.jit import kernel
from kvstrata.policies.lists import Ids

Words = NDArray[np.int64]
FREE = -1


@kernel
def _find(words: Words, keys: Words, ids: Ids, found: Ids) -> None:
    mask = len(keys) - 1
    for position in range(len(words)):
        word = words[position]
        place = word & mask
        while ids[place] != FREE and keys[place] != word:
            place = (place + 1) & mask
        found[position] = ids[place]


@kernel
def _put(words: Words, fresh: Ids, keys: Words, ids: Ids, found: Ids) -> int:
    """Ids of all words; those that have none get the next of `fresh`. Returns how many were used."""
    mask = len(keys) - 1
    used = 0
    for position in range(len(words)):
        word = words[position]
        place = word & mask
        while ids[place] != FREE and keys[place] != word:
            place = (place + 1) & mask
        if ids[place] == FREE:
            keys[place] = word
            ids[place] = fresh[used]
            used += 1
        found[position] = ids[place]
    return used


@kernel
def _drop(words: Words, keys: Words, ids: Ids) -> int:
    """Returns how many were there."""
    mask = len(keys) - 1
    dropped = 0
    for position in range(len(words)):
        word = words[position]
        hole = word & mask
        while ids[hole] != FREE and keys[hole] != word:
            hole = (hole + 1) & mask
        if ids[hole] == FREE:
            continue
        dropped += 1
        place = hole
        while True:
            place = (place + 1) & mask
            if ids[place] == FREE:
                break
            # Whoever is nearer to its home than the hole is stays.
            if ((place - (keys[place] & mask)) & mask) >= ((place - hole) & mask):
                keys[hole] = keys[place]
                ids[hole] = ids[place]
                hole = place
        ids[hole] = FREE
    return dropped


class KeyTable:
    """Not thread-safe. Ids are 0 and above; at most half of the places are taken."""

    def __init__(self, expected: int = 1024) -> None:
        self._count = 0
        self._make(expected)

    def _make(self, expected: int) -> None:
        places = 1 << max(4, (2 * expected - 1).bit_length())
        self._keys: Words = np.zeros(places, np.int64)
        self._ids: Ids = np.full(places, FREE, np.int32)

    def __len__(self) -> int:
        return self._count

    def find(self, words: Words) -> Ids:
        """Their ids; FREE where there is none."""
        found = np.empty(len(words), np.int32)
        _find(words, self._keys, self._ids, found)
        return found

    def put(self, words: Words, fresh: Ids) -> tuple[Ids, int]:
        """Ids of all words, and how many of `fresh` (as many as words) went to new ones, from its start."""
        if 2 * (self._count + len(words)) > len(self._keys):
            self._grow(self._count + len(words))
        found = np.empty(len(words), np.int32)
        used = _put(words, fresh, self._keys, self._ids, found)
        self._count += used
        return found, used

    def drop(self, words: Words) -> None:
        """Words that are not there are passed over."""
        self._count -= _drop(words, self._keys, self._ids)

    def _grow(self, expected: int) -> None:
        taken = self._ids != FREE
        words, ids = self._keys[taken], self._ids[taken]
        self._make(2 * expected)
        _put(words, ids, self._keys, self._ids, np.empty(len(words), np.int32))


def key_words(entries: NDArray[Any]) -> Words:
    """The first 8 bytes of the keys of ENTRY_DTYPE rows."""
    words = np.ascontiguousarray(entries).view(np.int64).reshape(len(entries), -1)
    firsts: Words = np.ascontiguousarray(words[:, 0])
    return firsts
