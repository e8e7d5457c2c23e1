"""What lies in the folder of a shared tier, byte by byte. Little endian, version 1. No I/O here.

    kvstrata-shared.json            what all members agree on
    members/<id>/beat               replaced: alive, and how much room it wants
    members/<id>/journal-<n>        batches: what the member published, and what is gone
    members/<id>/access-<n>         batches: which blocks its requests touched
    extents/<id>-<sequence>         slots, then a footer that lists them
    writing/<id>-<sequence>         the same while it is written
    collector/epoch-<n>, released-<n>, grants-<n>, order-<n>

Names are relative to the folder, parts joined with "/". A member's id is 16 hexadecimal digits. What is not
whole, or of another version, decodes to a value that says so; nothing here raises for what it is given.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum, IntEnum
from typing import Any, NamedTuple, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstrata.transfer.buffers import PAGE, round_up

FORMAT = "kvstrata-shared"
VERSION = 1

SETTINGS_FILE = "kvstrata-shared.json"
MEMBERS, EXTENTS, WRITING, COLLECTOR = "members", "extents", "writing", "collector"
FOLDERS = (MEMBERS, EXTENTS, WRITING, COLLECTOR)
TEMPORARY = ".tmp"
"""How names end that a medium uses on the way; nobody else reads them."""

ID_DIGITS = 16
MOST_PAYLOAD_BYTES = 2**31
LENGTH_LIMIT = 2**32
"""A block is smaller: its length is a 32-bit word."""

ENTRY_DTYPE = np.dtype(
    [("key", "V32"), ("number", "<u4"), ("length", "<u4"), ("checksum", "<u8"), ("expires_ms", "<i8"),
     ("sequence", "<i8")]
)  # fmt: skip
"""A block of an extent: its slot there, and what its slot's header says of it."""
GONE_DTYPE = np.dtype([("member", "<u8"), ("sequence", "<u8")])

Entries = NDArray[Any]

_BATCH = struct.Struct("<8sHHIQQ")
_ADD = struct.Struct("<QQQQQQ32s")
_ACCESS = struct.Struct("<II")
_TRAILER = struct.Struct("<8sHHIQ32sQQQ")
_CHECKSUM = struct.Struct("<Q")
BATCH_MAGIC = b"KVSTJRNL"
FOOTER_MAGIC = b"KVSTFOOT"
BATCH_BYTES = _BATCH.size + _CHECKSUM.size
TRAILER_BYTES = _TRAILER.size + _CHECKSUM.size

_ADOPTED = 1


# Names


def member_word(member: int) -> str:
    return f"{member:016x}"


def member_folder(member: int) -> str:
    return f"{MEMBERS}/{member:016x}"


def beat_name(member: int) -> str:
    return f"{MEMBERS}/{member:016x}/beat"


def journal_name(member: int, number: int) -> str:
    return f"{MEMBERS}/{member:016x}/journal-{number}"


def access_name(member: int, number: int) -> str:
    return f"{MEMBERS}/{member:016x}/access-{number}"


def epoch_name(epoch: int) -> str:
    return f"{COLLECTOR}/epoch-{epoch}"


def released_name(epoch: int) -> str:
    return f"{COLLECTOR}/released-{epoch}"


def grants_name(epoch: int) -> str:
    return f"{COLLECTOR}/grants-{epoch}"


def parse_member(word: str) -> int | None:
    """The id that a folder of `members` is named after; None for a name that is no id."""
    if len(word) != ID_DIGITS or word.strip("0123456789abcdef"):
        return None
    return int(word, 16)


def parse_numbered(name: str, kind: str) -> int | None:
    """n of "<anything>/<kind>-<n>", for journal, access, epoch, released and grants."""
    head, dash, digits = name.rpartition("/")[2].partition("-")
    good = head == kind and dash and digits.isascii() and digits.isdigit() and len(digits) < 19
    return int(digits) if good and str(int(digits)) == digits else None


class MemberFile(NamedTuple):
    """A file of a member, by its name. kind: beat, journal or access; number: 0 for the beat."""

    member: int
    kind: str
    number: int


def parse_member_file(name: str) -> MemberFile | None:
    """None for what is no file of a member."""
    parts = name.split("/")
    if len(parts) != 3 or parts[0] != MEMBERS:
        return None
    member = parse_member(parts[1])
    if member is None:
        return None
    if parts[2] == "beat":
        return MemberFile(member, "beat", 0)
    for kind in ("journal", "access"):
        number = parse_numbered(name, kind)
        if number is not None:
            return MemberFile(member, kind, number)
    return None


class ExtentId(NamedTuple):
    """Who wrote it, and its number among those that this member wrote."""

    member: int
    sequence: int

    @property
    def word(self) -> str:
        return f"{self.member:016x}-{self.sequence:016x}"

    @property
    def name(self) -> str:
        return f"{EXTENTS}/{self.word}"

    @property
    def part(self) -> str:
        return f"{WRITING}/{self.word}"

    @property
    def segment(self) -> int:
        """The word that its slots' headers carry, signed as in the rows of an engine."""
        digest = xxhash.xxh3_64_intdigest(self.word.encode())
        return digest - (1 << 64) if digest >> 63 else digest

    @staticmethod
    def parse(name: str) -> ExtentId | None:
        """From a name with or without its folder; None for anything else."""
        member, _, sequence = name.rpartition("/")[2].partition("-")
        first, second = parse_member(member), parse_member(sequence)
        return None if first is None or second is None else ExtentId(first, second)


# Sizes


def slot_stride(block_bytes: int) -> int:
    """Bytes from one slot to the next: a page of header, and the payload in whole pages."""
    return PAGE + round_up(block_bytes, PAGE)


def footer_bytes(entries: int) -> int:
    return round_up(entries * ENTRY_DTYPE.itemsize + TRAILER_BYTES, PAGE)


def extent_bytes(slots: int, stride: int) -> int:
    """Of a sealed extent with so many slots, all of them used."""
    return slots * stride + footer_bytes(slots)


def slots_within(size: int, stride: int) -> int:
    """How many slots fit into an extent of at most `size` bytes, footer included; may be 0."""
    slots = max(0, size // stride)
    while slots and extent_bytes(slots, stride) > size:
        slots -= 1
    return slots


def reserve_bytes(capacity_bytes: int) -> int:
    """What is kept for small files and folders."""
    return max(2**20, capacity_bytes // 64)


# Journal batches


class BatchKind(IntEnum):
    ADD = 1
    GONE = 2
    SNAPSHOT = 3
    """All that this member stands for now: what it said before is void. First in a compacted journal."""
    ACCESS = 4


@dataclass(frozen=True, slots=True)
class Added:
    """An extent that a member published, or adopted.

    file_bytes: on the medium. entries: of ENTRY_DTYPE, in the order of their slots.
    """

    extent: ExtentId
    file_bytes: int
    stride: int
    namespace: bytes
    entries: Entries
    adopted: bool = False


@dataclass(frozen=True, slots=True)
class Touched:
    """What one request touched: the first 8 bytes of keys as little-endian words, root first."""

    request: int
    words: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Batch:
    """A member's message. number: of this batch among all of the member's.

    published_bytes: all that the member has ever published, of what it wrote itself and did not adopt.
    """

    kind: BatchKind
    number: int
    published_bytes: int
    added: tuple[Added, ...] = ()
    gone: tuple[ExtentId, ...] = ()
    touched: tuple[Touched, ...] = ()


class Tail(Enum):
    """What follows the whole batches of some bytes."""

    NOTHING = "nothing"
    SHORT = "short"
    """Perhaps the beginning of a batch that is being written."""
    WRONG = "wrong"
    """No batch of this version, however much may follow."""


def encode_batch(batch: Batch) -> bytes:
    if batch.kind in (BatchKind.ADD, BatchKind.SNAPSHOT):
        payload = b"".join(_pack_added(added) for added in batch.added)
    elif batch.kind is BatchKind.GONE:
        payload = np.array(batch.gone, np.uint64).reshape(-1, 2).astype("<u8").tobytes()
    else:
        payload = b"".join(
            _ACCESS.pack(touched.request & 0xFFFFFFFF, len(touched.words))
            + touched.words.astype("<u8").tobytes()
            for touched in batch.touched
        )
    assert len(payload) <= MOST_PAYLOAD_BYTES, "a batch is too large"
    head = _BATCH.pack(BATCH_MAGIC, VERSION, batch.kind, len(payload), batch.number, batch.published_bytes)
    return head + _CHECKSUM.pack(_digest(head, payload)) + payload


def decode_batches(data: bytes | memoryview, start: int = 0) -> tuple[list[Batch], int, Tail]:
    """All whole batches from `start` on, where they end, and what follows."""
    view = memoryview(data)
    batches: list[Batch] = []
    while True:
        batch, end, tail = _decode_one(view, start)
        if batch is None:
            return batches, start, tail
        batches.append(batch)
        start = end


def find_batch(data: bytes | memoryview, start: int) -> int | None:
    """Where the next whole batch begins behind damage, at `start` or later."""
    whole = bytes(data)
    while (place := whole.find(BATCH_MAGIC, start)) >= 0:
        if _decode_one(memoryview(whole), place)[0] is not None:
            return place
        start = place + 1
    return None


def _decode_one(view: memoryview, start: int) -> tuple[Batch | None, int, Tail]:
    left = len(view) - start
    if not left:
        return None, start, Tail.NOTHING
    magic = bytes(view[start : start + len(BATCH_MAGIC)])
    if magic != BATCH_MAGIC[: len(magic)]:
        return None, start, Tail.WRONG
    if left < BATCH_BYTES:
        return None, start, Tail.SHORT
    _, version, kind, size, number, published = _BATCH.unpack_from(view, start)
    if version != VERSION or size > MOST_PAYLOAD_BYTES:
        return None, start, Tail.WRONG
    begin = start + BATCH_BYTES
    if left < BATCH_BYTES + size:
        return None, start, Tail.SHORT
    payload = view[begin : begin + size]
    (digest,) = _CHECKSUM.unpack_from(view, start + _BATCH.size)
    if digest != _digest(view[start : start + _BATCH.size], payload):
        return None, start, Tail.WRONG
    batch = _unpack_payload(kind, number, published, payload)
    return batch, begin + size, Tail.NOTHING if batch else Tail.WRONG


def _unpack_payload(kind: int, number: int, published: int, payload: memoryview) -> Batch | None:
    if kind in (BatchKind.ADD, BatchKind.SNAPSHOT):
        added = _unpack_added(payload)
        return None if added is None else Batch(BatchKind(kind), number, published, added=added)
    if kind == BatchKind.GONE:
        if len(payload) % GONE_DTYPE.itemsize:
            return None
        pairs = np.frombuffer(payload, GONE_DTYPE).tolist()
        return Batch(BatchKind.GONE, number, published, gone=tuple(ExtentId(*pair) for pair in pairs))
    if kind == BatchKind.ACCESS:
        touched = _unpack_touched(payload)
        return None if touched is None else Batch(BatchKind.ACCESS, number, published, touched=touched)
    return None


def _pack_added(added: Added) -> bytes:
    head = _ADD.pack(
        added.extent.member,
        added.extent.sequence,
        added.file_bytes,
        added.stride,
        _ADOPTED if added.adopted else 0,
        len(added.entries),
        added.namespace,
    )
    return head + added.entries.tobytes()


def _unpack_added(payload: memoryview) -> tuple[Added, ...] | None:
    found: list[Added] = []
    place = 0
    while place < len(payload):
        if len(payload) - place < _ADD.size:
            return None
        member, sequence, size, stride, flags, count, namespace = _ADD.unpack_from(payload, place)
        place += _ADD.size
        end = place + count * ENTRY_DTYPE.itemsize
        if end > len(payload):
            return None
        # A copy: what the file's bytes were read into may be much larger.
        entries = np.frombuffer(payload[place:end], ENTRY_DTYPE).copy()
        if not _plausible(entries, stride):
            return None
        found.append(
            Added(ExtentId(member, sequence), size, stride, namespace, entries, bool(flags & _ADOPTED))
        )
        place = end
    return tuple(found)


def _plausible(entries: Entries, stride: int) -> bool:
    """Can these be slots of an extent?"""
    if stride <= PAGE or stride % PAGE or stride >= 2 * LENGTH_LIMIT:
        return False
    lengths = entries["length"]
    return not len(entries) or bool(lengths.min() >= 1 and int(lengths.max()) <= stride - PAGE)


def _unpack_touched(payload: memoryview) -> tuple[Touched, ...] | None:
    found: list[Touched] = []
    place = 0
    while place < len(payload):
        if len(payload) - place < _ACCESS.size:
            return None
        request, count = _ACCESS.unpack_from(payload, place)
        place += _ACCESS.size
        end = place + 8 * count
        if end > len(payload):
            return None
        found.append(Touched(request, np.frombuffer(payload[place:end], "<u8").astype(np.uint64)))
        place = end
    return tuple(found)


def _digest(head: bytes | memoryview, payload: bytes | memoryview) -> int:
    digest = xxhash.xxh3_64(head)
    digest.update(payload)
    return digest.intdigest()


# Footers


@dataclass(frozen=True, slots=True)
class Footer:
    """The end of an extent: which blocks lie in it. slots: places before the footer, used or not."""

    extent: ExtentId
    stride: int
    namespace: bytes
    slots: int
    entries: Entries

    @property
    def start(self) -> int:
        """Where in the file it begins."""
        return self.slots * self.stride

    def encode(self) -> bytes:
        """Whole pages; the trailer is their end."""
        body = self.entries.tobytes()
        trailer = _TRAILER.pack(
            FOOTER_MAGIC, VERSION, 0, len(self.entries), self.stride, self.namespace,
            self.extent.member, self.extent.sequence, self.slots,
        )  # fmt: skip
        padding = bytes(footer_bytes(len(self.entries)) - len(body) - TRAILER_BYTES)
        return body + padding + trailer + _CHECKSUM.pack(_digest(body, trailer))

    @staticmethod
    def size_in(tail: bytes | memoryview) -> int | None:
        """How long the footer at the end of these bytes is, by its trailer; None if there is none."""
        if len(tail) < TRAILER_BYTES:
            return None
        magic, version, _, count, *_ = _TRAILER.unpack_from(tail, len(tail) - TRAILER_BYTES)
        return footer_bytes(count) if magic == FOOTER_MAGIC and version == VERSION else None

    @staticmethod
    def decode(tail: bytes | memoryview, extent: ExtentId) -> Footer | None:
        """From bytes that end where the file ends; None unless they hold that extent's whole footer."""
        size = Footer.size_in(tail)
        if size is None or len(tail) < size:
            return None
        view = memoryview(tail)
        at = len(view) - TRAILER_BYTES
        _, _, _, count, stride, namespace, member, sequence, slots = _TRAILER.unpack_from(view, at)
        begin = len(view) - size
        body = view[begin : begin + count * ENTRY_DTYPE.itemsize]
        (digest,) = _CHECKSUM.unpack_from(view, at + _TRAILER.size)
        if digest != _digest(body, view[at : at + _TRAILER.size]) or extent != ExtentId(member, sequence):
            return None
        entries = np.frombuffer(body, ENTRY_DTYPE).copy()
        if not _plausible(entries, stride) or (count and int(entries["number"].max()) >= slots):
            return None
        return Footer(extent, stride, namespace, slots, entries)


# Small files for people and programs


@dataclass(frozen=True, slots=True)
class FolderSettings:
    """What all members of a folder agree on. folder: random, tells this folder from another one.

    extent_bytes: of a whole extent at most.
    """

    folder: str
    capacity_bytes: int
    extent_bytes: int
    lease_seconds: float
    made_by: str = ""
    version: int = VERSION

    def encode(self) -> bytes:
        return _to_json({"format": FORMAT, **asdict(self)})

    @staticmethod
    def decode(data: bytes) -> FolderSettings | None:
        """None for what is no such file. Another version decodes: its reader must look at `version`."""
        raw = _from_json(data)
        if raw is None or raw.get("format") != FORMAT:
            return None
        found = _typed(FolderSettings, raw)
        good = found and found.capacity_bytes > 0 and found.extent_bytes > 0 and found.lease_seconds > 0
        return found if good else None


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life. counter: grows with every one. wanted_bytes: what it wants beyond what it published.

    state: "open" or "closed". collect: may this member become the collector. published_bytes: as in its
    journal. grant_epoch, grant_counter: the last grants that it has read; limit_bytes: what it takes its
    limit to be since then.
    """

    member: str
    counter: int
    state: str = "open"
    wanted_bytes: int = 0
    published_bytes: int = 0
    collect: bool = True
    host: str = ""
    pid: int = 0
    version: str = ""
    capacity_bytes: int = 0
    lease_seconds: float = 0.0
    grant_epoch: int = 0
    grant_counter: int = 0
    limit_bytes: int = 0

    def encode(self) -> bytes:
        return _to_json(asdict(self))

    @staticmethod
    def decode(data: bytes) -> Beat | None:
        raw = _from_json(data)
        return None if raw is None else _typed(Beat, raw)


@dataclass(frozen=True, slots=True)
class Grant:
    """limit_bytes: what the member may have published in all. used_bytes: what it has, seen by the
    collector. held_bytes: the highest limit that it may still believe in. note: why it is not more, for
    people."""

    limit_bytes: int
    used_bytes: int = 0
    held_bytes: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Grants:
    """The collector's answer to all members. counter: grows with every one of an epoch.

    debt_bytes: room that members have who are in here no more, until their files are found and counted.
    """

    epoch: int
    collector: str
    counter: int = 0
    used_bytes: int = 0
    capacity_bytes: int = 0
    debt_bytes: int = 0
    members: Mapping[int, Grant] = field(default_factory=dict)

    def encode(self) -> bytes:
        raw = {name: getattr(self, name) for name in self.__slots__ if name != "members"}
        members = {member_word(member): asdict(grant) for member, grant in self.members.items()}
        return _to_json({**raw, "members": members})

    @staticmethod
    def decode(data: bytes) -> Grants | None:
        raw = _from_json(data)
        if raw is None:
            return None
        members: dict[int, Grant] = {}
        listed = raw.pop("members", None)
        if not isinstance(listed, dict):
            return None
        for word, value in listed.items():
            member = parse_member(word)
            grant = _typed(Grant, value) if isinstance(value, dict) else None
            if member is None or grant is None:
                return None
            members[member] = grant
        found = _typed(Grants, raw)
        if found is None:
            return None
        return replace(found, members=members)


_Found = TypeVar("_Found")
_KINDS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}


def _typed(cls: type[_Found], raw: Mapping[str, Any]) -> _Found | None:
    """An object from a mapping: unknown keys are ignored, a wrong type or a missing key is None."""
    fields: dict[str, Any] = {}
    for name, hint in cls.__annotations__.items():
        if name not in raw:
            continue
        value: Any = raw[name]
        kinds = _KINDS.get(hint)
        if kinds is None:
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            return None
        if isinstance(value, int | float) and not -(2**63) <= value < 2**63:
            return None
        fields[name] = value
    try:
        return cls(**fields)
    except TypeError:
        return None


def _to_json(raw: Mapping[str, Any]) -> bytes:
    return json.dumps(raw, indent=1).encode()


def _from_json(data: bytes) -> dict[str, Any] | None:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return raw if isinstance(raw, dict) else None


def entries_of(rows: Sequence[tuple[bytes, int, int, int, int, int]]) -> Entries:
    """ENTRY_DTYPE rows of (key, number, length, checksum, expires_ms, sequence)."""
    return np.array(list(rows), ENTRY_DTYPE)
