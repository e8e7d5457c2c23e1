"""Medium: the small things of a shared folder. Blocks move elsewhere.

Names are relative to the folder, parts joined with "/". Everything raises OSError as the system answers it
(an object store maps its errors to a fitting errno), and may hang: nobody calls this where that matters.
`PosixMedium` is a mounted folder: it opens every file anew and closes it, so that close-to-open consistency
(NFS) is enough.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from kvstrata.tiers.shared.format import EXTENTS, FOLDERS, TEMPORARY, WRITING

MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
"""What a file answers that somebody else removed."""
TAILS_BYTES = 64 * 2**20
"""`PosixMedium.tails` begins no other file when it has read so much: who reads lets others have a turn."""
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES, errno.EXDEV)
"""What file systems answer that have no hard links."""


def every(name: str) -> bool:
    return True


class Medium(Protocol):
    """Small files and whole extents. A file that is not there is a value, not an error."""

    def prepare(self) -> None:
        """Make the folder itself and those in it, where they are not there. Only when a tier first opens:
        later a folder that is missing means that nothing is mounted.
        """

    def create(self, name: str, data: bytes) -> bool:
        """Make a file that nobody has made; False if it is there. Its content is there at once."""

    def replace(self, name: str, data: bytes) -> None:
        """Old or new content for every reader, never a mixture."""

    def append(self, name: str, offset: int, data: bytes) -> None:
        """offset: the length so far, which its only writer knows. Durable when it returns.

        After an error it is called again with the same offset and data. ENOENT if somebody removed the
        file, or the folder that it would lie in.
        """

    def fetch(self, name: str, offset: int = 0) -> bytes | None:
        """From offset to the end; None if it is not there."""

    def tails(
        self, known: Mapping[str, int], folder: str, wanted: Callable[[str], bool] = every
    ) -> dict[str, bytes]:
        """Every wanted file two levels below `folder` (members/<id>/<file>) that is longer than
        known.get(name, 0): the bytes behind that. A file that vanishes meanwhile is left out, and files may
        be left for the next call when there is much.
        """

    def names(self, folder: str) -> dict[str, int]:
        """name, from the root of all -> bytes occupied, of files directly in `folder`; {} without it."""

    def folders(self, folder: str) -> list[str]:
        """Last parts of the names of the folders directly in it; [] without it."""

    def remove(self, name: str) -> None:
        """Nothing happens if it is not there."""

    def remove_folder(self, name: str) -> None:
        """With the files in it. Nothing happens if it is not there."""

    def read_extent(self, name: str, offset: int, size: int) -> bytes | None:
        """size bytes from offset, fewer at the end; below 0: so many before the end. None: not there."""

    def write_extent(self, name: str, pieces: Iterable[bytes]) -> int:
        """Publish a whole extent (extents/<word>): durable, there at once. Returns bytes occupied."""


class PosixMedium:
    """A folder on any POSIX file system that several machines mount.

    tag: ends the names of temporary files, so that whose they are can be seen; random by default.
    """

    def __init__(self, root: Path, tag: str = "") -> None:
        self.root = root
        self.tag = tag or secrets.token_hex(8)

    def path(self, name: str) -> Path:
        return self.root / name

    def prepare(self) -> None:
        for folder in ("", *FOLDERS):
            self.path(folder).mkdir(parents=not folder, exist_ok=True)

    def create(self, name: str, data: bytes) -> bool:
        path, temporary = self.path(name), self.path(f"{name}.{self.tag}{TEMPORARY}")
        if name.count("/") == 2:
            path.parent.mkdir(exist_ok=True)  # a member's; the others are there, or nothing is mounted
        self._write_new(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # A server that answers late may have made it at the first asking (NFS).
            return temporary.stat().st_nlink > 1
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return self._create_plainly(path, data)
        finally:
            temporary.unlink(missing_ok=True)
        self._sync_folder(path.parent)
        return True

    def _create_plainly(self, path: Path, data: bytes) -> bool:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        try:
            _write_all(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        return True

    @staticmethod
    def _write_new(path: Path, data: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            _write_all(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)

    def replace(self, name: str, data: bytes) -> None:
        path, temporary = self.path(name), self.path(f"{name}.{self.tag}{TEMPORARY}")
        try:
            self._write_new(temporary, data)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def append(self, name: str, offset: int, data: bytes) -> None:
        path = self.path(name)
        # A file that somebody removed stays removed: ENOENT tells its writer so.
        flags = os.O_WRONLY | os.O_CLOEXEC | (0 if offset else os.O_CREAT)
        fd = os.open(path, flags, 0o644)
        try:
            _write_all(fd, data, offset)
            os.fsync(fd)
        finally:
            os.close(fd)
        if not offset:
            self._sync_folder(path.parent)

    def fetch(self, name: str, offset: int = 0) -> bytes | None:
        return self._read(name, offset, None)

    def tails(
        self, known: Mapping[str, int], folder: str, wanted: Callable[[str], bool] = every
    ) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        size = 0
        for middle in self.folders(folder):
            for last in _listed(self.path(f"{folder}/{middle}"), files=True):
                name = f"{folder}/{middle}/{last}"
                if size >= TAILS_BYTES or last.endswith(TEMPORARY) or not wanted(name):
                    continue
                data = self._read(name, known.get(name, 0), None)
                if data:
                    found[name] = data
                    size += len(data)
        return found

    def names(self, folder: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for last in _listed(self.path(folder), files=True):
            name = f"{folder}/{last}"
            try:
                found[name] = self.path(name).stat().st_blocks * 512
            except OSError as error:
                if error.errno not in MISSING:
                    raise
        return found

    def folders(self, folder: str) -> list[str]:
        return _listed(self.path(folder), files=False)

    def remove(self, name: str) -> None:
        try:
            self.path(name).unlink()
        except OSError as error:
            if error.errno not in MISSING:
                raise

    def remove_folder(self, name: str) -> None:
        for last in _listed(self.path(name), files=True):
            self.remove(f"{name}/{last}")
        try:
            self.path(name).rmdir()
        except OSError as error:
            if error.errno not in MISSING:
                raise

    def read_extent(self, name: str, offset: int, size: int) -> bytes | None:
        return self._read(name, offset, size)

    def write_extent(self, name: str, pieces: Iterable[bytes]) -> int:
        part = self.path(WRITING + name.removeprefix(EXTENTS))
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            offset = 0
            for piece in pieces:
                _write_all(fd, piece, offset)
                offset += len(piece)
            os.ftruncate(fd, offset)  # gives back what was allocated ahead
            os.fsync(fd)
            occupied = occupied_bytes(os.fstat(fd))
            part.rename(self.path(name))
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        self._sync_folder(self.path(EXTENTS))
        return occupied

    def _read(self, name: str, offset: int, size: int | None) -> bytes | None:
        try:
            fd = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in MISSING:
                return None
            raise
        try:
            length = os.fstat(fd).st_size
            offset = max(0, length + offset) if offset < 0 else offset
            left = max(0, length - offset) if size is None else max(0, min(size, length - offset))
            pieces: list[bytes] = []
            while left and (piece := os.pread(fd, left, offset)):
                pieces.append(piece)
                offset += len(piece)
                left -= len(piece)
        except OSError as error:
            if error.errno in MISSING:
                return None
            raise
        finally:
            os.close(fd)
        return b"".join(pieces)

    @staticmethod
    def _sync_folder(folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems do not sync folders
                raise
        finally:
            os.close(fd)


def occupied_bytes(stat: os.stat_result) -> int:
    """What a file takes: its blocks, or its size where the file system compresses or counts late."""
    return max(stat.st_size, stat.st_blocks * 512)


def _listed(folder: Path, *, files: bool) -> list[str]:
    try:
        with os.scandir(folder) as found:
            return sorted(entry.name for entry in found if entry.is_dir(follow_symlinks=False) != files)
    except OSError as error:
        if error.errno in MISSING:
            return []
        raise


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
