"""What lies in a folder of the nvme tier, seen from outside a store: read only, without the lock.

Not the tier: the block size need not be known, nothing is written, and a process may be using the folder.
What is counted is what slot headers say. A block that its store has forgotten keeps its header until the
slot is written again, so the store may hold fewer.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.errors import ConfigError
from kvstrata.table import unix_ms
from kvstrata.tiers.nvme_folder import (
    IndexState,
    SegmentFile,
    bytes_on_disk,
    check_format,
    describe_holder,
    is_locked,
    read_index,
    read_namespaces,
    segment_files,
)
from kvstrata.tiers.nvme_format import FORMAT, MARKER_FILE, VERSION
from kvstrata.tiers.nvme_scan import STATES, ProgressHook, SlotState, scan_segments
from kvstrata.transfer.buffers import PAGE
from kvstrata.transfer.file_io import FileIO


@dataclass(slots=True)
class NamespaceSummary:
    """Blocks of one namespace. fields: what people know of it, empty if nobody wrote it down."""

    digest: str
    fields: dict[str, Any]
    blocks: int = 0
    payload_bytes: int = 0
    expired_blocks: int = 0
    oldest_ms: int = 0
    newest_ms: int = 0

    def add(self, headers: NDArray[Any], now_ms: int) -> None:
        """headers: of some more of its blocks, at least one, SLOT_HEADER_DTYPE."""
        created, expires = headers["created_ms"], headers["expires_ms"]
        oldest = int(created.min())
        self.oldest_ms = min(self.oldest_ms, oldest) if self.blocks else oldest
        self.newest_ms = max(self.newest_ms, int(created.max()))
        self.blocks += len(headers)
        self.payload_bytes += int(headers["length"].sum())
        self.expired_blocks += int(np.count_nonzero((expires != 0) & (expires <= now_ms)))


@dataclass(frozen=True, slots=True)
class SegmentSummary:
    """One segment file. slot_bytes: payload that a slot has room for, the block size in whole pages."""

    name: str
    slot_bytes: int
    slots: int
    file_bytes: int
    full_bytes: int
    states: Counter[SlotState]


@dataclass(frozen=True, slots=True)
class FolderSummary:
    """The whole folder. in_use: by a process, before or after the reading. holder: its own words.

    unreadable: segment files whose header is not intact, or names another file.
    """

    format: str
    version: int
    in_use: bool
    holder: str
    index: IndexState
    index_blocks: int
    segments: list[SegmentSummary]
    unreadable: list[str]
    namespaces: list[NamespaceSummary]
    bytes_on_disk: int
    unix_ms: int
    seconds: float
    states: Counter[SlotState] = field(default_factory=Counter)


def require_folder(folder: Path) -> None:
    """Raises ConfigError if this is no folder of the nvme tier, FormatVersionError, OSError."""
    advice = "name the path of the nvme tier in your configuration"
    if not folder.exists():
        raise ConfigError(f"{folder}: no such folder; {advice}")
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; {advice}")
    if not check_format(folder):
        raise ConfigError(f"{folder} is not a kvstrata folder, it holds no {MARKER_FILE}; {advice}")


def summarize_folder(folder: Path, progress: ProgressHook, io: FileIO | None = None) -> FolderSummary:
    """Read every slot header. Raises ConfigError, FormatVersionError and OSError."""
    started = time.monotonic()
    io = io or FileIO()
    require_folder(folder)
    in_use = is_locked(folder)
    index_state, index = read_index(folder)
    fields = read_namespaces(folder)
    namespaces = {digest: NamespaceSummary(digest, known) for digest, known in fields.items()}
    found = list(segment_files(folder))
    files = [file for file in found if isinstance(file, SegmentFile)]
    total, done, now = sum(file.header.slots for file in files), 0, unix_ms()
    segments = []
    for file in files:
        states = _count_slots(io, file, namespaces, now, partial(_report, progress, done, total))
        done += file.header.slots
        if states is not None:
            segments.append(_summarize(file, states))
    in_use = in_use or is_locked(folder)
    return FolderSummary(
        format=FORMAT,
        version=VERSION,
        in_use=in_use,
        holder=describe_holder(folder) if in_use else "",
        index=index_state,
        index_blocks=len(index.entries) if index else 0,
        segments=segments,
        unreadable=[path.name for path in found if isinstance(path, Path)],
        namespaces=list(namespaces.values()),
        bytes_on_disk=bytes_on_disk(folder),
        unix_ms=now,
        seconds=time.monotonic() - started,
        states=sum((segment.states for segment in segments), Counter()),
    )


def _count_slots(
    io: FileIO,
    file: SegmentFile,
    namespaces: dict[str, NamespaceSummary],
    now: int,
    progress: Callable[[int], None],
) -> Counter[SlotState] | None:
    """None if the folder's owner has removed the file since it was listed."""
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        # One page in every slot is wanted: reading ahead would read the payloads too.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        [scanned] = scan_segments(io, [(fd, file)], progress)
    finally:
        os.close(fd)
    used = scanned.headers[scanned.states == STATES.index(SlotState.USED)]
    digests = used["namespace"].tolist()
    for digest in dict.fromkeys(digests):
        name = digest.hex()
        mine = used[[other == digest for other in digests]]
        namespaces.setdefault(name, NamespaceSummary(name, {})).add(mine, now)
    return scanned.count()


def _report(progress: ProgressHook, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _summarize(file: SegmentFile, states: Counter[SlotState]) -> SegmentSummary:
    return SegmentSummary(
        name=file.path.name,
        slot_bytes=file.header.stride - PAGE,
        slots=file.header.slots,
        file_bytes=file.size,
        full_bytes=file.full_size,
        states=states,
    )
