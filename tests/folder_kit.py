"""A shared folder with members for tests of who collects it: real files, clocks in the test's hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kvstrata.telemetry import Telemetry
from kvstrata.tiers.nvme_format import SlotHeader
from kvstrata.tiers.shared.batches import Added
from kvstrata.tiers.shared.catalog import Catalog, Extent
from kvstrata.tiers.shared.collector import Collector
from kvstrata.tiers.shared.extent_file import ENTRY_DTYPE, Footer, extent_bytes
from kvstrata.tiers.shared.format import MEMBERS, ExtentId, parse_member, parse_member_file
from kvstrata.tiers.shared.grants import Allowance, Standing, read_grants
from kvstrata.tiers.shared.journal import JournalReader, JournalWriter
from kvstrata.tiers.shared.means import CycleReport
from kvstrata.tiers.shared.medium import Medium, PosixMedium
from kvstrata.tiers.shared.member import Member
from kvstrata.tiers.shared.recency import AccessLog
from kvstrata.tiers.shared.small_files import Beat, FolderSettings

PAGE = 4096
LENGTH = 3000
STRIDE = 2 * PAGE
NAMESPACE = bytes(range(32))
WORD_MASK = (1 << 64) - 1


def key(number: int) -> bytes:
    return xxhash.xxh3_64_digest(number.to_bytes(8, "little")) + number.to_bytes(24, "little")


def payload(number: int, length: int = LENGTH) -> bytes:
    return (xxhash.xxh3_128_digest(number.to_bytes(8, "little")) * (length // 16 + 1))[:length]


def slot(number: int, extent: ExtentId, place: int, *, stride: int = STRIDE, expires_ms: int = 0) -> bytes:
    data = payload(number, stride - PAGE - 1096)
    header = SlotHeader(
        key(number), NAMESPACE, extent.segment & WORD_MASK, place, len(data),
        xxhash.xxh3_64_intdigest(data), 1000 - place, 1, expires_ms,
    )  # fmt: skip
    page = bytearray(stride)
    header.pack_into(memoryview(page))
    page[PAGE : PAGE + len(data)] = data
    return bytes(page)


def entries_of(numbers: list[int], *, stride: int = STRIDE, expires_ms: int = 0) -> np.ndarray[Any, Any]:
    """The last block is the oldest."""
    entries = np.zeros(len(numbers), ENTRY_DTYPE)
    for place, number in enumerate(numbers):
        data = payload(number, stride - PAGE - 1096)
        entries[place] = (
            key(number), place, len(data), xxhash.xxh3_64_intdigest(data), expires_ms, 1000 - place
        )  # fmt: skip
    return entries


def pieces(
    extent: ExtentId, numbers: list[int], *, stride: int = STRIDE, expires_ms: int = 0
) -> list[bytes]:
    """A whole extent of these blocks."""
    slots = [
        slot(number, extent, place, stride=stride, expires_ms=expires_ms)
        for place, number in enumerate(numbers)
    ]
    entries = entries_of(numbers, stride=stride, expires_ms=expires_ms)
    return [*slots, Footer(extent, stride, NAMESPACE, len(numbers), entries).encode()]


class Crash(BaseException):
    """The process is no more."""


class MortalMedium:
    """A medium whose process dies at its n-th call, before or after the call has its effect."""

    def __init__(self, inner: Medium, root: Path) -> None:
        self.inner = inner
        self.root = root
        self.calls: list[str] = []
        self.dies_at = -1
        self.after = False
        self.dead = False

    def __getattr__(self, verb: str) -> Any:
        method = getattr(self.inner, verb)
        if not callable(method):
            return method

        def call(*args: Any, **options: Any) -> Any:
            if self.dead:
                raise Crash
            self.calls.append(f"{verb} {args[0] if args and isinstance(args[0], str) else ''}")
            dies = len(self.calls) - 1 == self.dies_at
            if dies and not self.after:
                self.dead = True
                if verb == "write_extent":
                    # What a process that is killed leaves behind.
                    part = self.root / args[0].replace("extents/", "writing/")
                    part.write_bytes(b"".join(args[1])[:-PAGE])
                raise Crash
            answer = method(*args, **options)
            if dies:
                self.dead = True
                raise Crash
            return answer

        return call


@dataclass
class Clock:
    """A machine's clock: it stands anywhere and may run at another speed."""

    world: World
    offset: float = 0.0
    speed: float = 1.0

    def __call__(self) -> float:
        return self.offset + self.speed * self.world.now


@dataclass(frozen=True)
class Config:
    policy: str = "lru"
    policy_options: Mapping[str, float] = field(default_factory=dict)
    live_share: float = 0.85
    rewrite_bytes_per_second: int = 2**30


class World:
    """The folder, real time, and how to count what lies there."""

    def __init__(
        self,
        root: Path,
        *,
        capacity: int = 4 * 2**20,
        extent: int = 2**16,
        lease: float = 10.0,
        seed: int = 1,
    ):
        self.root = root
        self.seed = seed
        self.now = 100.0
        self.unix_ms = 1
        self.members = 0
        self.settings = FolderSettings("f", capacity, extent, lease)
        self.config = Config()
        for name in ("members", "extents", "writing", "collector"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def occupied(self) -> int:
        """As du counts it."""
        total = 0
        for folder, _, files in os.walk(self.root):
            there = [Path(folder), *(Path(folder) / name for name in files)]
            total += sum(path.stat().st_blocks * 512 for path in there)
        return total

    def extents(self) -> int:
        return len(list((self.root / "extents").iterdir()))

    def node(self, **options: Any) -> Node:
        return Node(self, **options)

    def run(self, *nodes: Node, seconds: float = 1.0, collect: bool = True) -> None:
        """Some time passes; then everybody does what a member does all the time."""
        self.now += seconds
        for node in nodes:
            node.refresh()
            if collect:
                node.cycle()


class Node:
    """One member, as the tier drives it."""

    def __init__(
        self,
        world: World,
        *,
        offset: float = 0.0,
        speed: float = 1.0,
        wrap: Callable[[PosixMedium], Medium] = lambda medium: medium,
        join: bool = True,
    ) -> None:
        self.world = world
        self.clock = Clock(world, offset, speed)
        world.members += 1
        word = f"{world.members << 32 | world.seed:016x}"
        self.medium: Any = wrap(PosixMedium(world.root, word))
        self.telemetry = Telemetry()
        self.member = Member(self.medium, world.settings, Beat("", 0), self.clock)
        # Ids are random; here they are not, so that every run is the same.
        self.member.id = int(word, 16)
        self.member._beat = replace(self.member._beat, member=word)
        self.catalog = Catalog()
        self.journal = JournalWriter(
            self.medium, self.member.id, lambda batch: self.catalog.apply(self.member.id, batch)
        )
        self.allowance = Allowance(self.member.id)
        self.access = AccessLog(self.medium, self.member.id, 2**16)
        self.collector = Collector(
            self.medium, self.member, self.catalog, self.journal, world.settings, world.config,
            self.telemetry, "shared_fs", clock=self.clock, clock_ms=lambda: world.unix_ms,
        )  # fmt: skip
        self.readers: dict[int, JournalReader] = {}
        self.written = 0
        if join:
            self.member.join()

    # What a member does at every refresh

    def refresh(self) -> None:
        self.beat()
        self.poll()
        self.access.flush()
        standing = read_grants(self.medium, self.allowance)
        assert standing is not Standing.EXPELLED

    def beat(self) -> None:
        epoch, counter, limit = self.allowance.acknowledgement()
        self.member.beat(
            wanted_bytes=self.allowance.wanted_bytes(),
            published_bytes=self.journal.published_bytes,
            grant_epoch=epoch,
            grant_counter=counter,
            limit_bytes=limit,
        )

    def poll(self) -> None:
        listed = {parse_member(word) for word in self.medium.folders(MEMBERS)} - {None}
        known: dict[str, int] = {}
        for member in listed - {self.member.id}:
            assert member is not None
            reader = self.readers.setdefault(
                member, JournalReader(member, self.world.settings.lease_seconds)
            )
            name, offset = reader.position
            known[name] = offset

        def wanted(name: str) -> bool:
            file = parse_member_file(name)
            return file is not None and file.kind != "access" and file.member != self.member.id

        tails: dict[int, dict[int, bytes]] = {}
        beats: dict[int, bytes] = {}
        for name, data in self.medium.tails(known, MEMBERS, wanted).items():
            file = parse_member_file(name)
            assert file is not None
            if file.kind == "beat":
                beats[file.member] = data
            else:
                tails.setdefault(file.member, {})[file.number] = data
        for member, found in tails.items():
            reader = self.readers.setdefault(
                member, JournalReader(member, self.world.settings.lease_seconds)
            )
            self.catalog.apply_all(member, reader.take(found, self.clock()).batches)
        for member in [member for member in self.readers if member not in listed]:
            del self.readers[member]
            self.catalog.forget_member(member)
        self.member.see([member for member in listed if member is not None], beats)

    def cycle(self) -> CycleReport:
        report = self.collector.cycle()
        if report.holder and self.collector._term is not None:
            self.collector._term.ledger.check_integrity(self.catalog.extents())
        return report

    # What engines make it do

    def save(self, numbers: list[int], *, stride: int = STRIDE, expires_ms: int = 0) -> ExtentId | None:
        """Publish an extent of these blocks; None if there is no room."""
        size = extent_bytes(len(numbers), stride)
        if not self.allowance.take(size):
            return None
        extent = ExtentId(self.member.id, self.member.next_sequence())
        occupied = self.medium.write_extent(
            extent.name, pieces(extent, numbers, stride=stride, expires_ms=expires_ms)
        )
        self.tell(extent, numbers, occupied, stride=stride, expires_ms=expires_ms)
        self.allowance.publish(size, occupied)
        self.written += occupied
        return extent

    def tell(
        self, extent: ExtentId, numbers: list[int], size: int, *, stride: int = STRIDE, expires_ms: int = 0
    ) -> None:
        entries = entries_of(numbers, stride=stride, expires_ms=expires_ms)
        self.journal.add([Added(extent, size, stride, NAMESPACE, entries)])

    def touch(self, numbers: Iterable[int], request: int = 0) -> None:
        words = np.frombuffer(b"".join(key(number)[:8] for number in numbers), "<u8").astype(np.uint64)
        self.access.touch(request, words)

    def serve(self) -> dict[int, int]:
        """Every block that this member can read, by number: copies. Asserts that none is wrong."""
        found: dict[int, int] = {}
        for extent in self.catalog.extents():
            for entry in extent.entries:
                number = self.serve_one(extent, entry)
                if number is not None:
                    found[number] = found.get(number, 0) + 1
        return found

    def serve_one(self, extent: Extent, entry: Any) -> int | None:
        place = int(entry["number"]) * extent.stride
        data = self.medium.read_extent(extent.id.name, place, extent.stride)
        if data is None:
            return None
        header = SlotHeader.unpack(memoryview(data))
        if header is None or header.checksum != entry["checksum"] or header.key != bytes(entry["key"]):
            return None
        if header.segment_id != extent.id.segment & WORD_MASK or header.number != entry["number"]:
            return None
        body = data[PAGE : PAGE + header.length]
        if xxhash.xxh3_64_intdigest(body) != header.checksum:
            return None
        number = int.from_bytes(header.key[8:16], "little")
        assert body == payload(number, header.length), "a wrong block is served"
        return number


class DictMedium:
    """The small files of a folder in memory, for machines that need thousands of steps.

    before: called before every call, with how many there have been.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.calls = 0
        self.before: Callable[[int], None] = lambda calls: None

    def _call(self) -> None:
        self.calls += 1
        self.before(self.calls)

    def create(self, name: str, data: bytes) -> bool:
        self._call()
        return self.files.setdefault(name, data) is data

    def replace(self, name: str, data: bytes) -> None:
        self._call()
        self.files[name] = data

    def fetch(self, name: str, offset: int = 0) -> bytes | None:
        self._call()
        data = self.files.get(name)
        return None if data is None else data[offset:]

    def names(self, folder: str) -> dict[str, int]:
        self._call()
        return {name: PAGE for name in self.files if name.rpartition("/")[0] == folder}

    def remove(self, name: str) -> None:
        self._call()
        self.files.pop(name, None)
