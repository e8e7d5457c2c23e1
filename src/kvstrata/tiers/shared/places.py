"""Places: the extents that blocks of a shared index lie in, by small numbers. No locks, no I/O here.

An extent that this member writes is an `OpenExtent` here, and a `Place` from its publishing on, under the
same number. A number is free again when the extent is gone and the last of its ids has been given back.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.table import Column
from kvstrata.tiers.shared.catalog import Extent
from kvstrata.tiers.shared.extent_file import Entries
from kvstrata.tiers.shared.extents import OpenExtent
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.types import BlockKey


@dataclass(slots=True, eq=False)
class Place:
    """A published extent of this index. ids: of its entries, in their order. place: the medium's own.

    held: ids that are not free; with none, and gone, its number is free again. noted_ms: when the first
    of its blocks will expire, as far as that is noted.
    """

    id: ExtentId
    segment: int
    stride: int
    entries: Entries
    ids: NDArray[np.int32]
    held: int
    gone: bool = False
    noted_ms: int = 0
    published: bool = True
    place: Any = None

    def blocks(self) -> tuple[list[BlockKey], NDArray[Any], NDArray[Any]]:
        """Keys, ids and slots of what was there when it was published."""
        return self.entries["key"].tolist(), self.ids, self.entries["number"]


class Places:
    """numbers: of the extents that are not gone."""

    def __init__(self) -> None:
        self.numbers: dict[ExtentId, int] = {}
        self._places: list[OpenExtent | Place | None] = []
        self._free: list[int] = []
        self._expiry: list[tuple[int, ExtentId]] = []

    def __getitem__(self, number: int) -> OpenExtent | Place:
        """Of a number that some id carries, or that is in `numbers`."""
        place = self._places[number]
        assert place is not None, "no extent has this number"
        return place

    def opened(self, number: int) -> OpenExtent:
        """The same, of an extent that this member still writes."""
        place = self._places[number]
        assert isinstance(place, OpenExtent), "this extent is published"
        return place

    def take(self, place: OpenExtent | Place) -> int:
        """A number for a new extent."""
        if self._free:
            number = self._free.pop()
            self._places[number] = place
        else:
            number = len(self._places)
            self._places.append(place)
        self.numbers[place.id] = number
        return number

    def number_of(self, extent: OpenExtent) -> int:
        """Of an extent that this member writes; a new one for a new extent."""
        number = self.numbers.get(extent.id)
        return self.take(extent) if number is None else number

    def add(self, extent: Extent, ids: Column) -> int:
        """A number for a published extent that nothing was known of."""
        place = Place(
            extent.id, extent.id.segment, extent.stride, extent.entries, ids.astype(np.int32), len(ids)
        )
        self.expect_expiry(place, extent.entries["expires_ms"])
        return self.take(place)

    def publish(self, number: int, extent: Extent) -> None:
        """The extent of this number, if this member wrote it, can be read by everybody now."""
        place = self._places[number]
        if not isinstance(place, OpenExtent):
            return
        ids = place.ids[extent.entries["number"].astype(np.int64)]
        self._places[number] = Place(
            place.id, place.segment, place.stride, extent.entries, ids, place.held,
            noted_ms=place.noted_ms, place=place.place,
        )  # fmt: skip

    def give_back(self, numbers: NDArray[Any]) -> None:
        """One number for each id that ends."""
        for number, count in counted(numbers):
            self[number].held -= count
            self.drop(number)

    def drop(self, number: int) -> None:
        """Free the number if its extent is gone and no id lies there."""
        place = self._places[number]
        if place is not None and place.gone and not place.held:
            self._places[number] = None
            self._free.append(number)

    def expect_expiry(self, place: OpenExtent | Place, expires_ms: Column) -> None:
        """Note when the first of an extent's blocks will expire, unless that is noted already."""
        times = expires_ms[expires_ms > 0]
        if not len(times):
            return
        first = int(times.min())
        if not place.noted_ms or first < place.noted_ms:
            place.noted_ms = first
            heapq.heappush(self._expiry, (first, place.id))

    @property
    def first_expiry_ms(self) -> int:
        """When the first block is expected to expire; 0: none is."""
        return self._expiry[0][0] if self._expiry else 0

    def due(self, now_ms: int) -> Iterator[int]:
        """Numbers of extents in which one is. Expect the expiry of what stays there before the next."""
        while self._expiry and self._expiry[0][0] <= now_ms:
            number = self.numbers.get(heapq.heappop(self._expiry)[1])
            if number is not None:
                self[number].noted_ms = 0
                yield number

    def check_integrity(self, extents: NDArray[Any]) -> None:
        """extents: the number of each id that is in use."""
        held = np.bincount(extents, minlength=len(self._places))
        for number, place in enumerate(self._places):
            if place is None:
                assert not held[number] and number in self._free
            else:
                assert place.held == held[number], "an extent's ids are miscounted"
                assert place.gone or self.numbers[place.id] == number


def counted(numbers: NDArray[Any]) -> list[tuple[int, int]]:
    """Each different number, and how often it is there."""
    found, counts = np.unique(numbers, return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))
