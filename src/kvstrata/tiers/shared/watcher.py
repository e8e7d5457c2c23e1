"""Watcher: reads what all other members say, and keeps the catalog up to date. Runs on one thread."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field

from kvstrata.telemetry import Telemetry
from kvstrata.tiers.shared.batches import Added, Batch, BatchKind
from kvstrata.tiers.shared.catalog import Catalog
from kvstrata.tiers.shared.extent_file import Footer
from kvstrata.tiers.shared.format import (
    EXTENTS,
    MEMBERS,
    ExtentId,
    MemberFile,
    member_word,
    parse_member,
    parse_member_file,
)
from kvstrata.tiers.shared.journal import JournalReader
from kvstrata.tiers.shared.medium import TAILS_BYTES, Medium
from kvstrata.tiers.shared.member import uptime_seconds

FOOTER_GUESS_BYTES = 64 * 1024
"""The end of an extent is read in one piece of this size; more only if its footer is longer."""


@dataclass(frozen=True, slots=True)
class Round:
    """members: whose folders are there. beats: of those that could be read."""

    members: list[int] = field(default_factory=list)
    beats: dict[int, bytes] = field(default_factory=dict)


class Watcher:
    """lease_seconds: what is not readable, or not there, for so long of this clock is believed.

    watch: around each call to the medium, and around each file that such a call reads. between: called now
    and then, for what cannot wait until all is taken in.
    """

    def __init__(
        self,
        medium: Medium,
        catalog: Catalog,
        telemetry: Telemetry,
        *,
        tier: str,
        lease_seconds: float,
        watch: Callable[[], AbstractContextManager[None]] = nullcontext,
        between: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = uptime_seconds,
    ) -> None:
        self._medium = medium
        self._catalog = catalog
        self._telemetry = telemetry
        self._tier = tier
        self._lease_seconds = lease_seconds
        self._watch = watch
        self._between = between
        self._clock = clock
        self._readers: dict[int, JournalReader] = {}
        self._missing_since: dict[int, float] = {}

    def poll(self, me: int | None, check: Callable[[list[int]], None]) -> Round:
        """Read everybody's news. me: whose journal is known anyway. Raises OSError.

        check: hears whose folders are there, and raises if that cannot be the folder.
        """
        # Before the journals are read: an adopter's words are durable before a folder goes.
        with self._watch():
            words = self._medium.folders(MEMBERS)
            members = [member for word in words if (member := parse_member(word)) is not None]
            check(members)
        beats: dict[int, bytes] = {}
        stuck: set[int] = set()
        while self._read(me, beats, stuck) >= TAILS_BYTES:
            pass  # each time something is taken in, or somebody is passed over
        self._miss(set(members), me)
        return Round(members, beats)

    def _read(self, me: int | None, beats: dict[int, bytes], stuck: set[int]) -> int:
        """Take in what is new, or a part of it; returns its size. stuck: whose journals are left for the
        next poll, because nothing in them could be read."""
        known = dict(reader.position for reader in self._readers.values())
        watch = ExitStack()

        def wanted(name: str) -> bool:
            # Asked before each file is read: what hangs is one answer, however many there are.
            watch.close()
            self._between()
            watch.enter_context(self._watch())
            file = parse_member_file(name)
            if file is None or file.kind == "access":
                return False
            return file.kind == "beat" or (file.member not in (me, *stuck) and self._wants(file))

        journals: dict[int, dict[int, bytes]] = {}
        with watch:
            watch.enter_context(self._watch())
            found = self._medium.tails(known, MEMBERS, wanted)
        for name, data in found.items():
            file = parse_member_file(name)
            assert file is not None, "only names that were wanted are read"
            if file.kind == "beat":
                beats[file.member] = data
            else:
                journals.setdefault(file.member, {})[file.number] = data
        for member, tails in journals.items():
            if not self._hear(member, tails):
                stuck.add(member)
            self._between()
        return sum(map(len, found.values()))

    def _wants(self, file: MemberFile) -> bool:
        reader = self._readers.get(file.member)
        return reader is None or reader.wants(file.number)

    def _hear(self, member: int, tails: dict[int, bytes]) -> bool:
        """Was anything in it?"""
        reader = self._readers.get(member)
        if reader is None:
            reader = self._readers[member] = JournalReader(member, self._lease_seconds)
        heard = reader.take(tails, self._clock())
        if heard.batches:
            self._catalog.apply_all(member, heard.batches)
        if heard.damaged:
            self._telemetry.count("damaged_files_total", self._tier, "journal")
            self._telemetry.event(
                f"{self._tier} journal damaged",
                f"{reader.position[0]} cannot be read behind byte {reader.position[1]}; "
                "the footers of this member's extents are read instead",
            )
            self._read_footers(member)
        return bool(heard.batches)

    def _miss(self, there: set[int], me: int | None) -> None:
        """Who has had no folder for a lease is forgotten, with what nobody adopted."""
        now = self._clock()
        gone = (set(self._readers) | set(self._catalog.members())) - there
        gone.discard(me if me is not None else 0)
        self._missing_since = {member: self._missing_since.get(member, now) for member in gone}
        for member, since in list(self._missing_since.items()):
            if now - since >= self._lease_seconds:
                self._readers.pop(member, None)
                self._catalog.forget_member(member)
                del self._missing_since[member]

    def _read_footers(self, member: int) -> None:
        """What a member published by its extents' own word, where its journal says nothing."""
        found: list[Added] = []
        with self._watch():
            names = self._medium.names(EXTENTS)
        for name, size in names.items():
            extent = ExtentId.parse(name)
            if extent is None or extent.member != member or self._catalog.get(extent) is not None:
                continue
            with self._watch():
                footer = read_footer(self._medium, extent)
            if footer is None:
                self._telemetry.count("damaged_files_total", self._tier, "footer")
                self._telemetry.event(f"{self._tier} extent damaged", f"{name} has no whole footer")
                continue
            found.append(Added(extent, size, footer.stride, footer.namespace, footer.entries))
        if found:
            published = self._catalog.published_bytes(member)
            self._catalog.apply(member, Batch(BatchKind.ADD, 0, published, tuple(found)))
            self._telemetry.event(
                f"{self._tier} extents found",
                f"{len(found)} of member {member_word(member)} by their footers",
            )


def read_footer(medium: Medium, extent: ExtentId) -> Footer | None:
    """The footer of a published extent; None if there is no such extent, or it is not whole.

    Raises OSError.
    """
    tail = medium.read_extent(extent.name, -FOOTER_GUESS_BYTES, FOOTER_GUESS_BYTES)
    size = None if tail is None else Footer.size_in(tail)
    if tail is None or size is None:
        return None
    if size > len(tail):
        tail = medium.read_extent(extent.name, -size, size)
    return None if tail is None else Footer.decode(tail, extent)
