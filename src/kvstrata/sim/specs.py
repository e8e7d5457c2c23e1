"""Which trace, read how: small values that cross processes in place of the traces themselves.

A worker opens the trace that a `TraceSpec` names and keeps it until it is given another one.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import xxhash

from kvstrata import __version__
from kvstrata.errors import ConfigError
from kvstrata.sim.replay import Workload
from kvstrata.traces.open import OpenOptions, Progress, open_with
from kvstrata.traces.stream import conversation_files
from kvstrata.traces.trace import Trace, TraceSource

HELD_ACCESSES = 1 << 26
"""A trace of up to that many accesses is kept in memory while many policies replay it; a longer one is
streamed from its file for each."""
READ_BYTES = 1 << 20
SUFFIXES = {
    "gz", "zst", "zstd", "json", "jsonl", "csv", "tsv", "txt", "log", "strace", "parquet", "oraclegeneral",
    "bin", "dat",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TraceSpec:
    """name: in results. path: a file, or a folder of agentic conversations. format: a name in
    `traces.open.FORMATS`, None looks at the content."""

    name: str
    path: Path
    format: str | None = None
    options: OpenOptions = field(default_factory=OpenOptions)

    def files(self) -> list[Path]:
        """All files that are read. Raises OSError and TraceFormatError as opening the trace does."""
        return conversation_files(self.path) if self.path.is_dir() else [self.path]

    def file_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files())

    def digest(self) -> str:
        """Equal for equal bytes in the files, read with equal options by the same version; 32 letters."""
        whole = xxhash.xxh3_128(repr((__version__, self.format, self._choices())).encode())
        for file in self.files():
            whole.update(file.name.encode() if self.path.is_dir() else b"")
            whole.update(file.stat().st_size.to_bytes(8, "little"))
            with file.open("rb") as content:
                while part := content.read(READ_BYTES):
                    whole.update(part)
        return whole.hexdigest()

    def _choices(self) -> list[tuple[str, object]]:
        pairs = [(one.name, getattr(self.options, one.name)) for one in fields(self.options)]
        return [(name, value) for name, value in pairs if name != "progress"]

    def source(self, progress: Progress | None = None) -> TraceSource:
        """Open it. Raises as `open_trace`."""
        return open_with(self.path, self.format, replace(self.options, progress=progress))

    def open(self, progress: Progress | None = None) -> Workload:
        """Read what a replay through one policy needs, into memory if it fits. Raises as `open_trace`."""
        return Workload(held(self.source(progress)), self.name)


def trace_specs(
    paths: Sequence[Path], format: str | None = None, options: OpenOptions | None = None
) -> list[TraceSpec]:
    """One per path, named after its file without suffixes.

    Where two names collide the folder is put before them, and if that does not help, a number after them.
    Raises ConfigError for a path that is not there or is given twice.
    """
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise ConfigError(f"{path}: given {count} times; give each trace once")
    absolute = [Path(os.path.abspath(path)) for path in paths]  # a link keeps its own name
    names = [short_name(path) for path in absolute]
    longer = [f"{short_name(path.parent)}/{name}" for path, name in zip(absolute, names, strict=True)]
    counts = Counter(names)
    names = [long if counts[name] > 1 else name for name, long in zip(names, longer, strict=True)]
    used: set[str] = set()
    specs = []
    for path, base in zip(paths, names, strict=True):
        name, number = base, 1
        while name in used:
            number += 1
            name = f"{base}-{number}"
        used.add(name)
        spec = TraceSpec(name, path, format, options or OpenOptions())
        spec.file_bytes()  # one that cannot be read is told before anything runs
        specs.append(spec)
    return specs


def short_name(path: Path) -> str:
    """The name of a file without the suffixes of formats and compressions."""
    name = path.name
    while (cut := re.fullmatch(r"(.+)\.(\w+)", name)) and cut[2].lower() in SUFFIXES:
        name = cut[1]
    return name or "trace"


class _Held(threading.local):
    spec: TraceSpec | None = None
    workload: Workload | None = None


_held = _Held()


def workload_of(spec: TraceSpec, progress: Progress | None = None) -> Workload:
    """The workload of a trace, read once as long as this thread asks for the same one. One is kept."""
    if _held.spec != spec or _held.workload is None:
        _held.spec = _held.workload = None
        _held.workload = spec.open(progress)
        _held.spec = spec
    return _held.workload


def let_go() -> None:
    """Free the workload that this thread keeps."""
    _held.spec = _held.workload = None


def held(source: TraceSource) -> TraceSource:
    """The trace in memory if it is not too long for that, without features and times."""
    if isinstance(source, Trace) or source.head.accesses > HELD_ACCESSES:
        return source
    head = source.head
    starts = np.zeros(head.requests + 1, np.int64)
    ids = np.zeros(head.accesses, np.int32)
    parent, depth = np.zeros(head.unique, np.int32), np.zeros(head.unique, np.int32)
    size = np.zeros(head.unique, np.int64)
    end = 0
    for batch in source.batches():
        first = batch.first_request
        starts[first + 1 : first + 1 + batch.requests] = end + batch.starts[1:]
        ids[end : end + len(batch.ids)] = batch.ids
        parent[batch.ids], depth[batch.ids], size[batch.ids] = batch.parents, batch.depths, batch.sizes
        end += len(batch.ids)
    unknown = np.full(head.requests, -1, np.int32)
    times = np.zeros(head.requests, np.float64)
    return Trace(replace(head, labels={}), starts, ids, parent, depth, size, times, unknown, unknown, {})
