"""ObjectMedium: the small things of a shared folder whose files are objects. Blocks move elsewhere.

An object cannot grow, so a file that is appended to is a row of objects <name>.<offset, 16 hexadecimal
digits>: short batches make the last of them longer (it is replaced), long ones begin the next. Callers see
files, their names and lengths. A folder is there while there is an object in it.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from kvstrata.tiers.shared.format import EXTENTS, MEMBERS, WRITING
from kvstrata.tiers.shared.medium import every
from kvstrata.tiers.shared.object_client import BACKOFF_SECONDS, ObjectClient

TAIL_BYTES = 64 * 1024
"""The last object of a file grows to so much before the next one begins."""
LOCAL_PART = re.compile(r"(.+)#\d+")
"""What obstore calls an object that it is writing into a local folder."""

_PART = re.compile(r"(.+)\.([0-9a-f]{16})")
_DIGITS = 16


class Piece(NamedTuple):
    """An object of a file that is appended to: where in the file it begins, and how long it is."""

    start: int
    size: int


class ObjectMedium:
    """settle_seconds: how long a file is watched that was made on a store without conditional puts.

    Two members that make the same file there cannot both believe that they did: one looks for it, puts it
    within half of that time, and reads it again when that time has passed. Reads must see what was put
    before, as in every store that obstore knows.
    """

    def __init__(self, client: ObjectClient, *, settle_seconds: float = 10.0) -> None:
        self._client = client
        self._settle_seconds = settle_seconds
        self._last: dict[str, tuple[int, bytes]] = {}
        self._unsure: set[str] = set()

    # Files

    def prepare(self) -> None:
        """Nothing has to be made, but this is the moment to hear that nobody may look."""
        self._client.listed(MEMBERS)

    def create(self, name: str, data: bytes) -> bool:
        began = time.monotonic()
        retried = name in self._unsure
        self._unsure.add(name)  # until the store has answered
        made = self._client.put_new(name, data)
        if made is None:
            made = self._create_plainly(name, data)
        elif not made and (retried or time.monotonic() - began >= BACKOFF_SECONDS):
            # The store may have made it at the first asking, and answered late.
            made = self._client.get(name) == data
        self._unsure.discard(name)
        return made

    def _create_plainly(self, name: str, data: bytes) -> bool:
        began = time.monotonic()
        if self._client.size(name) is not None:
            return False
        self._client.put(name, data)
        if time.monotonic() - began > self._settle_seconds / 2:
            return False
        time.sleep(self._settle_seconds)
        return self._client.get(name) == data

    def replace(self, name: str, data: bytes) -> None:
        if name.startswith(f"{MEMBERS}/") and self._client.size(name) is None:
            raise _missing(name)  # the member was removed: it must not come back by itself
        self._client.put(name, data)

    def append(self, name: str, offset: int, data: bytes) -> None:
        start, tail = self._last.get(name, (offset, b""))
        if not start <= offset <= start + len(tail) or offset - start + len(data) > TAIL_BYTES:
            start, tail = offset, b""
        tail = tail[: offset - start] + data
        piece = f"{name}.{start:0{_DIGITS}x}"
        self._client.put(piece, tail)
        self._last[name] = start, tail
        if start and self._client.size(f"{name}.{0:0{_DIGITS}x}") is None:
            self._client.delete([piece])
            self._last.pop(name, None)
            raise _missing(name)

    def fetch(self, name: str, offset: int = 0) -> bytes | None:
        whole = self._client.get(name)
        if whole is not None:
            return whole[offset:]
        folder, _, last = name.rpartition("/")
        pieces = _pieces(self._client.listed(folder).objects).get(f"{folder}/{last}" if folder else last)
        return None if pieces is None else self._behind(name, pieces, offset)

    def tails(
        self, known: Mapping[str, int], folder: str, wanted: Callable[[str], bool] = every
    ) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        objects = self._client.below(folder)
        for name, pieces in _pieces(objects).items():
            offset = known.get(name, 0)
            if name.count("/") - folder.count("/") != 2 or not wanted(name):
                continue
            if max(piece.start + piece.size for piece in pieces) <= offset:
                continue
            if name in objects:
                data = (self._client.get(name) or b"")[offset:]
            else:
                data = self._behind(name, pieces, offset)
            if data:
                found[name] = data
        return found

    def _behind(self, name: str, pieces: list[Piece], offset: int) -> bytes:
        """From offset on, as far as the objects follow each other without a gap."""
        found: list[bytes] = []
        for piece in sorted(pieces):
            if piece.start + piece.size <= offset:
                continue
            if piece.start > offset:
                break
            data = self._client.get(f"{name}.{piece.start:0{_DIGITS}x}")
            if data is None:  # removed meanwhile
                break
            found.append(data[offset - piece.start :])
            offset = piece.start + len(data)  # it may have grown since it was listed
        return b"".join(found)

    def names(self, folder: str) -> dict[str, int]:
        if folder == WRITING:
            return dict(self._local_parts())
        pieces = _pieces(self._client.listed(folder).objects)
        return {name: sum(piece.size for piece in each) for name, each in pieces.items()}

    def folders(self, folder: str) -> list[str]:
        return self._client.listed(folder).folders

    def remove(self, name: str) -> None:
        self._last.pop(name, None)
        if name.startswith(f"{WRITING}/"):
            self._remove_local_parts(name)
            return
        objects = [name]
        if not name.startswith(f"{EXTENTS}/"):
            there = self._client.listed(name.rpartition("/")[0]).objects
            # The last first: what is left after a failure is still found by its beginning.
            objects += sorted((one for one in there if _logical(one)[0] == name != one), reverse=True)
        self._client.delete(objects)

    def remove_folder(self, name: str) -> None:
        for file in [file for file in self._last if file.startswith(f"{name}/")]:
            del self._last[file]
        self._client.delete(sorted(self._client.below(name), reverse=True))

    # Extents

    def read_extent(self, name: str, offset: int, size: int) -> bytes | None:
        length = self._client.size(name)
        if length is None:
            return None
        offset = max(0, length + offset) if offset < 0 else offset
        size = min(size, length - offset)
        if size <= 0:
            return b""
        data = self._client.get_range(name, offset, size)
        return None if data is None else bytes(data)

    def write_extent(self, name: str, pieces: Iterable[bytes]) -> int:
        # All of it first: where the pieces come from, this client is asked too, and it cannot be asked
        # from within an upload.
        whole = bytearray()
        for piece in pieces:
            whole += piece
        self._client.upload(name, memoryview(whole))
        return len(whole)

    # What a writer left behind that died. A bucket hides such parts, and its own rule removes them.

    def _local_parts(self) -> Iterator[tuple[str, int]]:
        """Parts in a local folder, under the names that they have on a file system, and their bytes."""
        if self._client.local is None:
            return
        try:
            with os.scandir(self._client.local / EXTENTS) as found:
                for entry in found:
                    if part := LOCAL_PART.fullmatch(entry.name):
                        yield f"{WRITING}/{part[1]}", entry.stat().st_blocks * 512
        except FileNotFoundError:
            return

    def _remove_local_parts(self, name: str) -> None:
        if self._client.local is None:
            return
        word = name.removeprefix(f"{WRITING}/")
        for path in (self._client.local / EXTENTS).glob(f"{word}#*"):
            path.unlink(missing_ok=True)


def _missing(name: str) -> OSError:
    return OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def _logical(name: str) -> tuple[str, int]:
    """The file that an object belongs to, and where in the file it begins."""
    part = _PART.fullmatch(name)
    return (part[1], int(part[2], 16)) if part else (name, 0)


def _pieces(objects: Mapping[str, int]) -> dict[str, list[Piece]]:
    """The files that objects are."""
    found: dict[str, list[Piece]] = {}
    for object_name, size in objects.items():
        name, start = _logical(object_name)
        found.setdefault(name, []).append(Piece(start, size))
    return found
