"""What lies in a shared folder, against what its journals say. Reads only: the collector acts on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvstrata.tiers.shared.catalog import Catalog
from kvstrata.tiers.shared.extent_file import Footer
from kvstrata.tiers.shared.format import (
    COLLECTOR,
    EXTENTS,
    MEMBERS,
    TEMPORARY,
    WRITING,
    ExtentId,
    parse_member,
)
from kvstrata.tiers.shared.medium import Medium
from kvstrata.transfer.buffers import PAGE

CONFIRMED_AT_ONCE = 1024
"""Extents that a listing lacks are asked for by name, at most so many in one audit."""
SILLY = ".nfs"
"""What a file is called that was removed on NFS while somebody had it open."""


@dataclass(slots=True)
class Findings:
    """What one audit found.

    members: who has a folder. missing: extents of the catalog without a file. unknown: extents in no
    journal, and their bytes. ownerless: those of them whose writer is dead, or has left them alone for a
    lease. parts: names of all part files; dead_parts: those whose writer is dead. leftovers: names of
    temporary files that lie there
    for a lease. foreign: names of files that are not ours, when they are seen for the first time.
    overhead_bytes: what lies there, is in no journal and in nobody's allowance.
    """

    members: set[int] = field(default_factory=set)
    missing: list[ExtentId] = field(default_factory=list)
    unknown: dict[ExtentId, int] = field(default_factory=dict)
    ownerless: set[ExtentId] = field(default_factory=set)
    parts: set[str] = field(default_factory=set)
    dead_parts: list[tuple[str, ExtentId]] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    overhead_bytes: int = 0


class Auditor:
    """Remembers between audits since when it sees what should not be there."""

    def __init__(
        self, medium: Medium, catalog: Catalog, lease_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._medium = medium
        self._catalog = catalog
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._since: dict[str, float] = {}

    def look(self) -> Findings:
        """List the folder. Raises OSError.

        A member makes its folder before its first file, and renames an extent before it tells of it. So the
        files are listed before the members, and after the catalog was asked for what must be there.
        """
        medium, found = self._medium, Findings()
        expected = {extent.id: extent for extent in self._catalog.extents()}
        parts = medium.names(WRITING)
        extents = medium.names(EXTENTS)
        small = medium.names(COLLECTOR)
        words = medium.folders(MEMBERS)
        members = {member for word in words if (member := parse_member(word)) is not None}
        found.members = members
        seen: dict[str, float] = {}

        for name, size in parts.items():
            part = ExtentId.parse(name)
            if part is None or part.part != name:
                self._odd(name, size, found, seen)
                continue
            found.parts.add(name)
            if part.member not in members:
                found.dead_parts.append((name, part))
        listed: set[ExtentId] = set()
        for name, size in extents.items():
            extent = ExtentId.parse(name)
            if extent is None or extent.name != name:
                self._odd(name, size, found, seen)
                continue
            listed.add(extent)
            known = expected.get(extent) or self._catalog.get(extent)
            if known is not None:
                found.overhead_bytes += max(0, size - known.file_bytes)
                continue
            found.unknown[extent] = size
            if extent.member not in members or self._for_a_lease(name, seen):
                found.ownerless.add(extent)
        for name, size in small.items():
            found.overhead_bytes += size
            if name.endswith(TEMPORARY) and self._for_a_lease(name, seen):
                found.leftovers.append(name)
        for member in members:
            found.overhead_bytes += sum(medium.names(f"{MEMBERS}/{member:016x}").values())
        self._since = seen

        for extent in [extent for extent in expected if extent not in listed][:CONFIRMED_AT_ONCE]:
            if medium.read_extent(extent.name, 0, 1) is None:
                found.missing.append(extent)
        return found

    def _odd(self, name: str, size: int, found: Findings, seen: dict[str, float]) -> None:
        found.overhead_bytes += size
        if name not in self._since and not name.rpartition("/")[2].startswith(SILLY):
            found.foreign.append(name)
        seen[name] = self._since.get(name, self._clock())

    def _for_a_lease(self, name: str, seen: dict[str, float]) -> bool:
        now = self._clock()
        seen[name] = self._since.get(name, now)
        return now - seen[name] >= self._lease_seconds


def sound_footer(medium: Medium, extent: ExtentId) -> Footer | None:
    """The footer of an extent that is whole; None for any other file. Raises OSError."""
    tail = medium.read_extent(extent.name, -PAGE, PAGE)
    size = Footer.size_in(tail) if tail else None
    if tail is None or size is None:
        return None
    if size > PAGE:
        tail = medium.read_extent(extent.name, -size, size)
    return Footer.decode(tail, extent) if tail else None
