"""What lies where in the folder of a shared tier, and how it is named. No I/O here.

    kvstrata-shared.json            what all members agree on
    members/<id>/beat               replaced: alive, and how much room it wants
    members/<id>/journal-<n>        batches: what the member published, and what is gone
    members/<id>/access-<n>         batches: which blocks its requests touched
    extents/<id>-<sequence>         slots, then a footer that lists them
    writing/<id>-<sequence>         the same while it is written
    collector/epoch-<n>, released-<n>, grants-<n>, order-<n>

Names are relative to the folder, parts joined with "/". A member's id is 16 hexadecimal digits. What is in
the files is told byte by byte in `batches`, `extent_file` and `small_files`: little endian, version 1. What
is not whole, or of another version, decodes to a value that says so; nothing there raises for what it is
given.
"""

from __future__ import annotations

from typing import NamedTuple

import xxhash

VERSION = 1

SETTINGS_FILE = "kvstrata-shared.json"
MEMBERS, EXTENTS, WRITING, COLLECTOR = "members", "extents", "writing", "collector"
FOLDERS = (MEMBERS, EXTENTS, WRITING, COLLECTOR)
TEMPORARY = ".tmp"
"""How names end that a medium uses on the way; nobody else reads them."""

ID_DIGITS = 16


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


def checksum(head: bytes | memoryview, payload: bytes | memoryview) -> int:
    """XXH3 over both, as batches and footers carry it."""
    digest = xxhash.xxh3_64(head)
    digest.update(payload)
    return digest.intdigest()
