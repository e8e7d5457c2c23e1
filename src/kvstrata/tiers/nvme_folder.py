"""The folder of an nvme tier as a whole: whose it is, which format it has, which segments lie in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from kvstrata.errors import FolderLockedError, FormatVersionError
from kvstrata.tiers.nvme_format import (
    FORMAT,
    INDEX_FILE,
    LOCK_FILE,
    MARKER_FILE,
    NAMESPACES_FILE,
    SEGMENT_GLOB,
    VERSION,
    IndexFile,
    SegmentHeader,
    segment_name,
    segment_size,
)
from kvstrata.transfer.buffers import PAGE
from kvstrata.transfer.file_io import FileIO

OUR_FILES = (LOCK_FILE, MARKER_FILE, NAMESPACES_FILE, INDEX_FILE)
LEFTOVER_GLOBS = ("*.tmp", "*.probe")
NAMESPACES_BYTES = 24 * 1024
CLAIM_SECONDS = 0.1
"""How long a process tries to take the folder before it gives up."""


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _drop_all() -> None:
    for lock in list(_held):
        lock._drop()


# A forked child inherits the descriptors and with them the locks: they must not outlive their owner.
os.register_at_fork(after_in_child=_drop_all)


class FolderLock:
    """Exclusive ownership of a folder, kept by flock: the system drops it when the owner dies."""

    def __init__(self, folder: Path) -> None:
        """Raises FolderLockedError naming the holder, or OSError."""
        self._fd = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._claim()
        except BlockingIOError:
            holder = describe_holder(folder) or "a process that left no name"
            os.close(self._fd)
            raise FolderLockedError(
                f"{folder} is in use by {holder}; stop it, or give this process a folder of its own",
                tier="nvme",
            ) from None
        except BaseException:
            os.close(self._fd)
            raise
        _held.add(self)
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": " ".join(sys.argv)[:200],
            "since_unix": int(time.time()),
        }
        # The lock holds without its name, which a full disk may not take.
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(me).encode(), 0)

    def _claim(self) -> None:
        """Whoever asks `is_locked` holds the lock for a moment: that must not look like an owner."""
        until = time.monotonic() + CLAIM_SECONDS
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise
            time.sleep(CLAIM_SECONDS / 10)

    def _drop(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def release(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            self._drop()


def describe_holder(folder: Path) -> str:
    """Who owns the folder by the lock file's own words; empty if nobody is named there."""
    try:
        holder = json.loads((folder / LOCK_FILE).read_text())
        return f"process {holder['pid']} on {holder['host']} ({holder['command'] or 'python'})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def is_locked(folder: Path) -> bool:
    """Does a process own the folder now? Asks without keeping it. Raises OSError if it cannot ask."""
    try:
        fd = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def check_format(folder: Path) -> bool:
    """True if the folder is one of ours, False if it has no marker. Raises FormatVersionError."""
    path = folder / MARKER_FILE
    try:
        marker = json.loads(path.read_text())
        name, version = marker["format"], marker["version"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        raise FormatVersionError(
            f"{path} is not a marker that kvstrata wrote; choose an empty folder, or delete this one",
            tier="nvme",
        ) from None
    if name != FORMAT or version != VERSION:
        raise FormatVersionError(
            f"{folder} holds format {name} version {version}, this kvstrata reads {FORMAT} version "
            f"{VERSION}; use the kvstrata that wrote it, or choose an empty folder",
            tier="nvme",
        )
    return True


def write_marker(folder: Path, io: FileIO) -> None:
    io.write_file(folder / MARKER_FILE, json.dumps({"format": FORMAT, "version": VERSION}).encode())


def read_namespaces(folder: Path) -> dict[str, dict[str, Any]]:
    """Digest in hex -> fields. A damaged file is an empty one: it is there for people only."""
    try:
        known = json.loads((folder / NAMESPACES_FILE).read_text())
        return {str(k): dict(v) for k, v in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def remember_namespace(folder: Path, digest: bytes, fields: Mapping[str, object], io: FileIO) -> None:
    """Write the fields behind a digest down once; in NAMESPACES_BYTES, the oldest go first."""
    known = read_namespaces(folder)
    if digest.hex() in known:
        return
    known[digest.hex()] = dict(fields)
    while len(data := json.dumps(known, indent=1, default=str).encode()) > NAMESPACES_BYTES:
        known.pop(next(iter(known)))
    io.write_file(folder / NAMESPACES_FILE, data)


class IndexState(Enum):
    """What there is of the index that a clean close leaves."""

    ABSENT = "absent"
    """A process owns the folder, or the last one ended without closing it."""
    INTACT = "intact"
    DAMAGED = "damaged"


def read_index(folder: Path) -> tuple[IndexState, IndexFile | None]:
    """The index of the last clean close. Raises OSError."""
    try:
        index = IndexFile.unpack((folder / INDEX_FILE).read_bytes())
    except FileNotFoundError:
        return IndexState.ABSENT, None
    return (IndexState.INTACT if index else IndexState.DAMAGED), index


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """A segment file whose header is intact."""

    path: Path
    header: SegmentHeader
    size: int
    mtime_ns: int

    @property
    def full_size(self) -> int:
        """What the size should be; a smaller file was truncated."""
        return segment_size(self.header.slots, self.header.stride)


def segment_files(folder: Path) -> Iterator[SegmentFile | Path]:
    """Every segment by name; a bare path for one whose header is not intact or says another name."""
    for path in sorted(folder.glob(SEGMENT_GLOB)):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue  # removed by the folder's owner since it was listed
        with file:
            header = SegmentHeader.unpack(file.read(PAGE))
            stat = os.fstat(file.fileno())
        # A copy under another name would be a second segment of the same id.
        ours = header is not None and path.name == segment_name(header.segment_id)
        yield SegmentFile(path, header, stat.st_size, stat.st_mtime_ns) if header and ours else path


def bytes_on_disk(folder: Path) -> int:
    """Blocks that our files in the folder occupy, as `du` counts them, in bytes."""
    paths = [folder, *(folder / name for name in OUR_FILES), *folder.glob(SEGMENT_GLOB)]
    paths += [path for pattern in LEFTOVER_GLOBS for path in folder.glob(pattern)]
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total
