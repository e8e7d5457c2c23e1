"""Reads `strace -f -ttt -T -y` logs of a program that keeps its cache in files.

A block is an extent of one generation of a file: extent_bytes long, aligned, shorter at the file's end.
Each read or write that moved bytes is one request of the extents it touched, in order of their place, with
operation "read" or "write"; extents are no chains. A file's generation ends, and its extents get new ids,
when it is truncated to nothing (O_TRUNC, creat, truncate), or when its name goes to another file: unlinked
and created again, or replaced by a rename. A rename keeps the blocks: what is written to a temporary name
and moved into place is the same file.

Followed are: open, openat, openat2, creat, close, dup, fcntl, clone, fork, lseek, the reads and writes with
and without offset or vectors, sendfile, copy_file_range, unlink, rename, link, truncate, chdir; lines of
other calls are passed over. Not seen by strace, and so not here: mmap, io_uring, libaio. A file that was
open before the log began is read from position 0 on until a call with an offset or lseek says better.
Times are those at which calls began.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvstrata.errors import ConfigError
from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.text import BadRecords, lines
from kvstrata.traces.trace import Trace

FORMAT = "strace"
DEFAULT_EXTENT_BYTES = 1 << 20

SYSTEM_FOLDERS = (
    "/proc",
    "/sys",
    "/dev",
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc",
    "/bin",
    "/sbin",
)
"""Files under these are no cache, unless a prefix asks for them."""

_LINE = re.compile(rb"(?:\[pid +(\d+)\] +|(\d+) +)?(\d+\.\d+) +(.+)")
_FIRST = re.compile(rb"(?:\[pid +\d+\] +|\d+ +)?\d{5,}\.\d+ +(?:\w+\(|<\.\.\. \w+ resumed>|\+\+\+ |--- )")
_CALL = re.compile(rb"(\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+|\?)((?:[< (].*)?)")
_NAME = re.compile(rb"(\w+)\(")
_RESUMED = re.compile(rb"<\.\.\. (\w+) resumed> ?(.*)")
_UNFINISHED = b"<unfinished ...>"
_DETACHED = b"<detached ...>"
_FD = re.compile(rb"(-?\d+)(?:<([^>]*)>)?")
_PATH = re.compile(rb'(?:(AT_FDCWD|-?\d+)(?:<([^>]*)>)?(?:\(deleted\))?, )?"((?:[^"\\]|\\.)*)"(\.\.\.)?')
_POINTED = re.compile(rb"\[(\d+)\]")
_SPENT = re.compile(rb"<(\d+\.\d+)>\s*$")
_SIZE = re.compile(rb"st_size=(\d+)")
_ARGUMENT = re.compile(rb"(?:<[^>]*>|\[[^\]]*\]|[^,<\[])+")
_DELETED = " (deleted)"

_PLAIN_IO = {b"read": "read", b"readv": "read", b"write": "write", b"writev": "write"}
_PLACED_IO = {  # operation, and the place of the offset among the last arguments
    b"pread64": ("read", -1),
    b"pread": ("read", -1),
    b"preadv": ("read", -1),
    b"preadv2": ("read", -2),
    b"pwrite64": ("write", -1),
    b"pwrite": ("write", -1),
    b"pwritev": ("write", -1),
    b"pwritev2": ("write", -2),
}
_OPENS = (b"open", b"openat", b"openat2", b"creat")
_CLONES = (b"clone", b"clone3", b"fork", b"vfork")
_NAMED = (b"unlink", b"unlinkat", b"rename", b"renameat", b"renameat2", b"link", b"linkat")
_COPIES = (b"sendfile", b"sendfile64", b"copy_file_range")
_BY_PATH = (b"truncate", b"chdir")
_BY_DESCRIPTOR = (
    *(b"close", b"dup", b"dup2", b"dup3", b"fcntl"),
    *(b"lseek", b"fstat", b"newfstatat", b"ftruncate", b"fchdir"),
)
_FOLLOWED = frozenset(
    (*_PLAIN_IO, *_PLACED_IO, *_OPENS, *_CLONES, *_NAMED, *_COPIES, *_BY_PATH, *_BY_DESCRIPTOR)
)


def recognise(path: Path, first: bytes) -> bool:
    """Whether one of the first lines is strace's with -ttt. first: up to 64 KiB of (unpacked) content."""
    return any(_FIRST.match(line) for line in first.split(b"\n", 50)[:50])


def read(
    path: Path | str,
    *,
    skip_bad: bool = False,
    prefix: str | None = None,
    extent_bytes: int = DEFAULT_EXTENT_BYTES,
) -> Trace:
    """The log as a trace of reads and writes of file extents.

    prefix: only files whose absolute path is this or lies under it; without one all regular paths outside
    SYSTEM_FOLDERS. extent_bytes: size of an extent; one beyond every file's size makes each file one block.
    Raises TraceFormatError naming file and line for a line that is not strace's, unless skip_bad, and
    ConfigError for an extent_bytes below 1.
    """
    if extent_bytes < 1:
        raise ConfigError(f"extent_bytes is {extent_bytes}; use 1 or more, {DEFAULT_EXTENT_BYTES} is usual")
    path = Path(path)
    bad = BadRecords(skip_bad)
    world = _World(_Filter(prefix))
    for number, line in lines(path):
        why = world.line(line)
        if why:
            bad.bad(path, number, why)
    builder = TraceBuilder(path.name, FORMAT)
    for touch in world.touches:
        extents = range(touch.begin // extent_bytes, (touch.end - 1) // extent_bytes + 1)
        file_bytes = world.generations[touch.generation]
        builder.add(
            touch.time_s,
            [(touch.generation, extent) for extent in extents],
            sizes=[min(extent_bytes, file_bytes - extent * extent_bytes) for extent in extents],
            chain=False,
            operation=touch.operation,
            duration_ms=touch.duration_ms,
        )
    return builder.build(skipped=bad.count)


class _Filter:
    """Which paths are the cache's."""

    def __init__(self, prefix: str | None) -> None:
        self._prefix = None if prefix is None else "/" + os.path.normpath(prefix).strip("/")

    def wants(self, path: str) -> bool:
        if self._prefix is not None:
            return self._prefix == "/" or _under(path, self._prefix)
        if not path.startswith("/") or path.startswith("/memfd:"):
            return False
        return not any(_under(path, folder) for folder in SYSTEM_FOLDERS)


def _under(path: str, folder: str) -> bool:
    return path.startswith(folder) and path[len(folder) : len(folder) + 1] in ("", "/")


@dataclass(slots=True)
class _File:
    """An inode: where it lies (last known), and the generation of its content."""

    path: str
    wanted: bool
    generation: int


@dataclass(slots=True)
class _Open:
    """An open file description, shared by duplicated and inherited descriptors."""

    file: _File
    position: int = 0
    append: bool = False


@dataclass(slots=True)
class _Process:
    """What threads share: descriptors and the working folder ("" while unknown)."""

    opens: dict[int, _Open] = field(default_factory=dict)
    folder: str = ""


@dataclass(slots=True)
class _Touch:
    """Bytes begin to end (exclusive) of one generation, moved by one call."""

    time_s: float
    generation: int
    begin: int
    end: int
    operation: str
    duration_ms: int | None


class _World:
    """The files and processes that a log tells of, as far as its lines were read."""

    def __init__(self, wanted: _Filter) -> None:
        self.touches: list[_Touch] = []
        self.generations: list[int] = []
        """Bytes of each generation's file, as far as seen."""
        self._filter = wanted
        self._files: dict[str, _File] = {}
        self._folders: set[str] = set()
        self._real: dict[str, str] = {}  # a folder's real path, where opening through a link showed it
        self._attached = _Process()
        self._processes: dict[int, _Process] = {}
        self._pending: dict[int, tuple[float, bytes]] = {}

    def line(self, line: bytes) -> str | None:
        """Takes one line of the log in; says what is wrong with it, if anything."""
        found = _LINE.match(line)
        if found is None:
            if not line.strip() or line.startswith(b"strace: "):
                return None
            return "no line of strace -ttt"
        pid = int(found[1] or found[2] or 0)
        time_s, body = float(found[3]), found[4].rstrip()
        if body.startswith((b"+++ ", b"--- ")):
            if body.startswith(b"+++ "):
                self._processes.pop(pid, None)
                self._pending.pop(pid, None)
            return None
        if body.endswith(_UNFINISHED):
            self._pending[pid] = (time_s, body[: -len(_UNFINISHED)].rstrip(b" "))
            return None
        resumed = _RESUMED.match(body)
        if resumed is not None:
            begun = self._pending.pop(pid, None)
            if begun is None or _DETACHED in begun[1]:
                return None  # it began before the log
            time_s, body = begun[0], begun[1] + (b" " if begun[1].endswith(b",") else b"") + resumed[2]
        name = _NAME.match(body)
        if name is None:
            return "neither a call nor a signal"
        if name[1] not in _FOLLOWED or body.endswith(_DETACHED):
            return None
        call = _CALL.fullmatch(body)
        if call is None:
            return f"{name[1].decode()} has no result"
        result, rest = call[3], call[4]
        if result == b"?" or result.startswith(b"-"):
            return None
        return self._call(pid, time_s, call[1], call[2], int(result, 0), rest)

    def _call(
        self, pid: int, time_s: float, name: bytes, text: bytes, result: int, rest: bytes
    ) -> str | None:
        process = self._process(pid)
        if name in _PLAIN_IO or name in _PLACED_IO:
            return self._io(process, time_s, name, text, result, rest)
        if name in _OPENS:
            return self._open(process, name, text, result, rest)
        if name in _CLONES:
            self._clone(process, text, result)
            return None
        if name in _COPIES:
            return self._copy(process, time_s, name, text, result, rest)
        if name in _NAMED:
            return self._names(process, name, text)
        if name in _BY_PATH:
            paths = self._paths(process, text)
            if len(paths) != 1:
                return f"{name.decode()} without a path"
            if name == b"chdir":
                process.folder = paths[0]
            elif paths[0] in self._files and text.endswith(b", 0"):
                self._renew(self._files[paths[0]])
            return None
        return self._descriptor(process, name, text, result)

    # Descriptors

    def _process(self, pid: int) -> _Process:
        process = self._processes.get(pid)
        if process is None:
            process = self._attached
            # A child may run before its parent's clone returns.
            for other, (_, text) in self._pending.items():
                name = _NAME.match(text)
                if name is not None and name[1] in _CLONES:
                    process = self._child(self._processes.get(other, self._attached), text)
                    break
            self._processes[pid] = process
        return process

    def _clone(self, process: _Process, text: bytes, child: int) -> None:
        if child > 0 and child not in self._processes:
            self._processes[child] = self._child(process, text)

    @staticmethod
    def _child(parent: _Process, text: bytes) -> _Process:
        if b"CLONE_FILES" in text:
            return parent
        return _Process(dict(parent.opens), parent.folder)

    def _opened(self, process: _Process, fd: int, seen: bytes | None) -> _Open | None:
        """The description behind a descriptor; -y's path for it corrects what was missed."""
        known = process.opens.get(fd)
        if seen is None:
            return known
        path = _plain(seen)
        if known is not None and (known.file.path == path or not path.startswith("/")):
            return known
        if not path.startswith("/"):
            return None
        missed = _Open(self._file(path))
        if known is not None and known.file is missed.file:
            return known
        process.opens[fd] = missed
        return missed

    def _descriptor(self, process: _Process, name: bytes, text: bytes, result: int) -> str | None:
        found = _FD.match(text)
        if found is None:
            return None if name == b"newfstatat" else f"{name.decode()} without a descriptor"
        fd = int(found[1])
        if name == b"close":
            process.opens.pop(fd, None)
            return None
        opened = self._opened(process, fd, found[2])
        if opened is None:
            return None
        if name in (b"dup", b"dup2", b"dup3") or (name == b"fcntl" and b"F_DUPFD" in text):
            process.opens[result] = opened
        elif name == b"lseek":
            opened.position = result
        elif name == b"fchdir":
            process.folder = opened.file.path
        elif name == b"ftruncate" and text.endswith(b", 0"):
            self._renew(opened.file)
        elif name == b"fstat" or (name == b"newfstatat" and b', "", ' in text):
            size = _SIZE.search(text)
            if size is not None and b"S_IFREG" in text:
                self._grow(opened.file, int(size[1]))
        return None

    def _open(self, process: _Process, name: bytes, text: bytes, fd: int, rest: bytes) -> str | None:
        found = _PATH.search(text)
        if found is None or found[4]:
            return f"{name.decode()} without a path"
        asked = self._path(process, found)
        real = _FD.match(b"0" + rest.lstrip()) if rest.lstrip().startswith(b"<") else None
        if real is not None and real[2].startswith(b"/"):
            path = _plain(real[2])
            self._learn(process, found, asked, path)
        else:
            path = asked
        flags = text[found.end() :]
        if path in self._files and b"O_EXCL" in flags and b"O_CREAT" in flags:
            del self._files[path]  # its removal was missed: this call made a new file
        file = self._file(path, bind=b"O_TMPFILE" not in flags)
        if name == b"creat" or b"O_TRUNC" in flags:
            self._renew(file)
        process.opens[fd] = _Open(file, append=b"O_APPEND" in flags)
        return None

    # Bytes

    def _io(
        self, process: _Process, time_s: float, name: bytes, text: bytes, count: int, rest: bytes
    ) -> str | None:
        found = _FD.match(text)
        if found is None:
            return f"{name.decode()} without a descriptor"
        offset: int | None = None
        if name in _PLACED_IO:
            operation, place = _PLACED_IO[name]
            last = text.rsplit(b", ", -place)[place]
            try:
                offset = int(last, 0)
            except ValueError:
                return f"{name.decode()} without an offset"
            if offset < 0:
                offset = None  # preadv2 and pwritev2: at the current position
        else:
            operation = _PLAIN_IO[name]
        opened = self._opened(process, int(found[1]), found[2])
        self._move(opened, time_s, operation, offset, count, rest)
        return None

    def _copy(
        self, process: _Process, time_s: float, name: bytes, text: bytes, count: int, rest: bytes
    ) -> str | None:
        parts = _split(text)
        try:
            if name == b"copy_file_range":
                source, source_at, target, target_at = parts[:4]
            else:
                target, source, source_at = parts[:3]
                target_at = b"NULL"
        except ValueError:
            return f"{name.decode()} with too few arguments"
        for operation, fd, at in (("read", source, source_at), ("write", target, target_at)):
            found, pointed = _FD.match(fd), _POINTED.match(at)
            if found is None:
                return f"{name.decode()} without a descriptor"
            opened = self._opened(process, int(found[1]), found[2])
            self._move(opened, time_s, operation, int(pointed[1]) if pointed else None, count, rest)
        return None

    def _move(
        self,
        opened: _Open | None,
        time_s: float,
        operation: str,
        offset: int | None,
        count: int,
        rest: bytes,
    ) -> None:
        if opened is None or count <= 0:
            return
        file = opened.file
        if opened.append and operation == "write":
            begin = self.generations[file.generation]
        else:
            begin = opened.position if offset is None else offset
        if offset is None:
            opened.position = begin + count
        self._grow(file, begin + count)
        if file.wanted:
            spent = _SPENT.search(rest)
            duration_ms = None if spent is None else round(float(spent[1]) * 1000)
            self.touches.append(
                _Touch(time_s, file.generation, begin, begin + count, operation, duration_ms)
            )

    # Files and their names

    def _file(self, path: str, bind: bool = True) -> _File:
        file = self._files.get(path)
        if file is None or not bind:
            file = _File(path, self._filter.wants(path), len(self.generations))
            self.generations.append(0)
            if bind:
                self._bind(path, file)
        return file

    def _bind(self, path: str, file: _File) -> None:
        self._files[path] = file
        file.path = path
        file.wanted = self._filter.wants(path)
        folder = os.path.split(path)[0]
        while folder not in self._folders:
            self._folders.add(folder)
            folder = os.path.split(folder)[0]

    def _renew(self, file: _File) -> None:
        file.generation = len(self.generations)
        self.generations.append(0)

    def _grow(self, file: _File, end: int) -> None:
        self.generations[file.generation] = max(self.generations[file.generation], end)

    def _names(self, process: _Process, name: bytes, text: bytes) -> str | None:
        paths = self._paths(process, text)
        if len(paths) != (1 if name.startswith(b"unlink") else 2):
            return f"{name.decode()} without its paths"
        if name.startswith(b"unlink"):
            self._files.pop(paths[0], None)
            return None
        old, new = paths
        if name.startswith(b"link"):
            if old in self._files:
                file = self._files[old]
                self._bind(new, file)
                file.path = old
                file.wanted = self._filter.wants(old) or self._filter.wants(new)
        elif b"RENAME_EXCHANGE" in text:
            first, second = self._file(old), self._file(new)
            self._bind(old, second)
            self._bind(new, first)
        elif old != new:
            self._files.pop(new, None)
            for path, there in list(self._moved(old, new)):
                self._bind(there, self._files.pop(path))
        return None

    def _moved(self, old: str, new: str) -> Iterator[tuple[str, str]]:
        if old in self._files:
            yield old, new
        elif old in self._folders:
            yield from ((path, new + path[len(old) :]) for path in self._files if _under(path, old))

    # Paths

    def _paths(self, process: _Process, text: bytes) -> list[str]:
        return [self._path(process, found) for found in _PATH.finditer(text) if not found[4]]

    def _path(self, process: _Process, found: re.Match[bytes]) -> str:
        """An argument as an absolute path, as far as the working folder and links are known."""
        path = _plain(found[3])
        if not path.startswith("/"):
            if found[2] is not None:
                base = _plain(found[2])
                if found[1] == b"AT_FDCWD":
                    process.folder = base
            elif found[1] is None or found[1] == b"AT_FDCWD":
                base = process.folder
            else:
                opened = process.opens.get(int(found[1]))
                base = "" if opened is None else opened.file.path
            path = f"{base}/{path}" if base else path
        path = os.path.normpath(path)
        folder, name = os.path.split(path)
        return os.path.join(self._real.get(folder, folder), name)

    def _learn(self, process: _Process, found: re.Match[bytes], asked: str, real: str) -> None:
        """What opening `asked` and getting `real` says of the working folder and of links to folders."""
        if not asked.startswith("/"):
            if found[1] in (None, b"AT_FDCWD") and real.endswith("/" + asked):
                process.folder = real[: -len(asked) - 1] or "/"
        elif asked != real:
            folder, name = os.path.split(asked)
            real_folder, real_name = os.path.split(real)
            if name == real_name:
                self._real[folder] = real_folder


def _plain(text: bytes) -> str:
    """A path as strace prints it, without its escapes and its mark for deleted files."""
    if b"\\" in text:
        text = text.decode("unicode_escape").encode("latin-1", "replace")
    return os.fsdecode(text).removesuffix(_DELETED)


def _split(text: bytes) -> Sequence[bytes]:
    """Arguments of a call that has no strings among them; commas in descriptors' paths stay."""
    return [part.strip() for part in _ARGUMENT.findall(text)]
