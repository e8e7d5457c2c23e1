"""The program behind `faultfs`: a FUSE pass-through that counts its calls and applies rules to them.

It obeys a Unix socket: one JSON request and one JSON answer per connection. It ends with its owner, so that
no call of a killed test process stays stuck in the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import json
import os
import socket
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mfusepy

from backends.workplace import runs

OWNER_SECONDS = 0.5
"""How often it looks whether its owner still runs."""
MAX_THREADS = 256
"""Calls in flight, hanging ones included; FUSE's own default of 10 would stop other calls too."""
AT_FDCWD = -100
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
"""What the kernel passes as nanoseconds for the time of the call, and for a time that shall stay."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Rule:
    """What happens to a kind of call; the first rule that fits a call decides."""

    number: int
    operations: frozenset[str]
    pattern: str
    error: int
    seconds: float
    hangs: bool
    skip: int
    times: int | None

    def fits(self, operation: str, path: str) -> bool:
        return operation in self.operations and fnmatch.fnmatchcase(path, self.pattern)


class Rules:
    """Rules, counts and the calls that hang now."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rules: list[Rule] = []
        self._counts: Counter[str] = Counter()
        self._struck: Counter[str] = Counter()
        self._hanging = 0

    def pass_through(self, operation: str, path: str) -> None:
        """Count a call; wait, hang or raise OSError as the rules say."""
        with self._changed:
            self._counts[operation] += 1
            rule = self._rule_for(operation, path)
            if rule is None:
                return
            self._struck[operation] += 1
            if rule.hangs:
                self._hanging += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: rule not in self._rules)
                self._hanging -= 1
        time.sleep(rule.seconds)
        if rule.error:
            raise OSError(rule.error, os.strerror(rule.error))

    def _rule_for(self, operation: str, path: str) -> Rule | None:
        rule = next((rule for rule in self._rules if rule.fits(operation, path)), None)
        if rule is None:
            return None
        if rule.skip:
            rule.skip -= 1
            return None
        if rule.times is not None:
            if rule.times == 0:
                return None
            rule.times -= 1
        return rule

    def obey(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._changed:
            match request.pop("do"):
                case "add":
                    request["operations"] = frozenset(request["operations"])
                    self._rules.append(Rule(**request))
                case "remove":
                    self._rules = [rule for rule in self._rules if rule.number not in request["numbers"]]
                case "clear":
                    self._rules = []
                case "reset":
                    self._counts.clear()
                    self._struck.clear()
            self._changed.notify_all()
            return {"counts": self._counts, "struck": self._struck, "hanging": self._hanging}


class Passthrough(mfusepy.Operations):
    """Every call on a folder below, after the rules allowed it."""

    use_ns = True
    # Calls on open files come without a path, which they need none of: it may have been unlinked meanwhile.
    flag_nopath = True
    flag_nullpath_ok = True

    def __init__(self, below: str, rules: Rules) -> None:
        self._below = below
        self._rules = rules
        self._paths: dict[int, str] = {}

    def _at(self, operation: str, path: str) -> Path:
        self._rules.pass_through(operation, path.removeprefix("/"))
        return Path(self._below + path)

    def _with(self, operation: str, descriptor: int) -> int:
        self._rules.pass_through(operation, self._paths.get(descriptor, ""))
        return descriptor

    def _opened(self, descriptor: int, path: str) -> int:
        self._paths[descriptor] = path.removeprefix("/")
        return descriptor

    def _close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        os.close(descriptor)

    # Calls on paths.
    def getattr(self, path: str | None, fh: int | None = None) -> dict[str, Any]:
        if path is None or fh:
            assert fh is not None
            return _attributes(os.fstat(self._with("getattr", fh)))
        return _attributes(os.lstat(self._at("getattr", path)))

    def readlink(self, path: str) -> str:
        return str(self._at("readlink", path).readlink())

    def mkdir(self, path: str, mode: int) -> None:
        self._at("mkdir", path).mkdir(mode)

    def unlink(self, path: str) -> None:
        self._at("unlink", path).unlink()

    def rmdir(self, path: str) -> None:
        self._at("rmdir", path).rmdir()

    def symlink(self, target: str, source: str) -> None:
        self._at("symlink", target).symlink_to(source)

    def link(self, target: str, source: str) -> None:
        os.link(self._below + source, self._at("link", target))

    def rename_with_flags(self, old: str, new: str, flags: int) -> None:
        source, target = os.fsencode(self._at("rename", old)), os.fsencode(self._below + new)
        if _libc.renameat2(AT_FDCWD, source, AT_FDCWD, target, flags) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def rename(self, old: str, new: str) -> None:
        self.rename_with_flags(old, new, 0)

    def chmod(self, path: str, mode: int) -> None:
        self._at("chmod", path).chmod(mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(self._at("chown", path), uid, gid, follow_symlinks=False)

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        at = self._at("utimens", path)
        now, found = time.time_ns(), at.lstat()
        access, change = times or (UTIME_NOW, UTIME_NOW)
        access = {UTIME_NOW: now, UTIME_OMIT: found.st_atime_ns}.get(access, access)
        change = {UTIME_NOW: now, UTIME_OMIT: found.st_mtime_ns}.get(change, change)
        os.utime(at, ns=(access, change), follow_symlinks=False)

    def truncate(self, path: str | None, length: int, fh: int | None = None) -> None:
        if fh:
            os.ftruncate(self._with("truncate", fh), length)
        else:
            assert path is not None
            os.truncate(self._at("truncate", path), length)

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._at("statfs", path))
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}

    # Folders.
    def opendir(self, path: str) -> int:
        return self._opened(os.open(self._at("opendir", path), os.O_RDONLY | os.O_DIRECTORY), path)

    def readdir(self, path: str | None, fh: int) -> list[tuple[str, dict[str, int], int]]:
        with os.scandir(self._with("readdir", fh)) as entries:
            return [
                (entry.name, {"st_ino": entry.inode(), "st_mode": _type(entry)}, 0) for entry in entries
            ]

    def fsyncdir(self, path: str | None, datasync: int, fh: int) -> None:
        os.fsync(self._with("fsyncdir", fh))

    def releasedir(self, path: str | None, fh: int) -> None:
        self._close(fh)

    # Files.
    def create(self, path: str, mode: int, fi: int | None = None) -> int:
        flags = _below_flags(fi or os.O_RDWR) | os.O_CREAT
        return self._opened(os.open(self._at("create", path), flags, mode), path)

    def open(self, path: str, flags: int) -> int:
        return self._opened(os.open(self._at("open", path), _below_flags(flags)), path)

    def read(self, path: str | None, size: int, offset: int, fh: int) -> bytes:
        return os.pread(self._with("read", fh), size, offset)

    def write(self, path: str | None, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(self._with("write", fh), data, offset)

    def flush(self, path: str | None, fh: int) -> None:
        self._with("flush", fh)

    def fsync(self, path: str | None, datasync: int, fh: int) -> None:
        (os.fdatasync if datasync else os.fsync)(self._with("fsync", fh))

    def fallocate(self, path: str | None, mode: int, offset: int, size: int, fh: int) -> None:
        descriptor = self._with("fallocate", fh)
        if _libc.fallocate64(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(size)) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def release(self, path: str | None, fh: int) -> None:
        self._close(self._with("release", fh))


class Mount(mfusepy.FUSE):
    """mfusepy drops the flags of rename and the descriptor of truncate; both matter here."""

    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> None:
        self.operations.rename_with_flags(os.fsdecode(old), os.fsdecode(new), flags)

    def truncate_fuse_3(self, path: bytes | None, length: int, fip: Any) -> None:
        self.ftruncate(path, length, fip)


def serve(listener: socket.socket, obey: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rw") as stream:
            stream.write(json.dumps(obey(json.loads(stream.readline()))) + "\n")


def end_with(pid: int, started: int) -> None:
    while runs(pid, started):
        time.sleep(OWNER_SECONDS)
    os._exit(errno.ESRCH)


def _below_flags(flags: int) -> int:
    """FUSE sends each write's offset itself, and its buffers are not aligned."""
    return flags & ~(os.O_APPEND | os.O_DIRECT | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW) | os.O_CLOEXEC


def _attributes(found: os.stat_result) -> dict[str, Any]:
    names = ("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
    times = {f"st_{kind}time": getattr(found, f"st_{kind}time_ns") for kind in "amc"}
    return {**{name: getattr(found, name) for name in names}, **times}


def _type(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    return stat.S_IFDIR if entry.is_dir() else stat.S_IFREG


def main() -> None:
    below, mount_point, control, cache_seconds, direct_io, pid, started = sys.argv[1:]
    rules = Rules()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(control)
        listener.listen(64)
        threading.Thread(target=serve, args=(listener, rules.obey), daemon=True).start()
        threading.Thread(target=end_with, args=(int(pid), int(started)), daemon=True).start()
        Mount(
            Passthrough(str(Path(below)), rules),
            mount_point,
            foreground=True,
            fsname="faultfs",
            allow_other=True,
            default_permissions=True,
            use_ino=True,
            direct_io=direct_io == "1",
            attr_timeout=cache_seconds,
            entry_timeout=cache_seconds,
            max_threads=MAX_THREADS,
        )


if __name__ == "__main__":
    main()
