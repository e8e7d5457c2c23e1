"""A file system that fails on command: a folder seen through a FUSE pass-through in a process of its own.

Calls really fail, wait or hang in the kernel, as they do on a broken mount; nothing in the tested process
is replaced. An open file that is unlinked stays until it is closed, as `.fuse_hidden...`, as on NFS.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from backends import require_fuse, require_module
from backends.workplace import Workplace, detach, is_mounted, start_time

REQUIREMENT = "mfusepy>=3.1"
LOOKING = ("getattr", "readlink", "statfs", "opendir", "readdir", "open", "read")
"""`getattr` is also every look-up of a name."""
CHANGING = (
    *("mkdir", "rmdir", "create", "link", "symlink", "unlink", "rename"),
    *("write", "fallocate", "truncate", "chmod", "chown", "utimens"),
)
"""What a read-only file system refuses; it refuses opening for writing too, which `open` does not tell."""
ENDING = ("flush", "fsync", "fsyncdir", "release")
"""`flush` is each close of a descriptor, and its error is close's; one of `release` reaches no one."""
OPERATIONS = frozenset((*LOOKING, *CHANGING, *ENDING))
"""What is counted and can fail."""


class FaultFs:
    """A mounted pass-through. Rules apply until used up or taken back; the first that fits decides."""

    def __init__(
        self, place: Workplace, below: Path, *, cache_seconds: float = 0.0, direct_io: bool = False
    ) -> None:
        """`below` is the folder that is shown, another mount for instance. The kernel caches names and
        attributes for `cache_seconds`. With `direct_io` it caches no data: every read and write arrives
        here, and files cannot be mapped shared.
        """
        require_fuse()
        require_module("mfusepy", REQUIREMENT)
        self.below = below
        self.path = place.folder / "mount"
        self._place = place
        self._control = place.folder / "control"
        self._options = (str(cache_seconds), str(int(direct_io)))
        self._numbers = itertools.count()
        self.path.mkdir()
        self.mount()

    def mount(self) -> None:
        """Again after `kill` or `unmount`; without rules, counting from 0."""
        self.unmount()
        self._control.unlink(missing_ok=True)
        module = [sys.executable, "-m", "backends.faultfs_daemon"]
        folders = [str(self.below), str(self.path), str(self._control)]
        owner = [str(os.getpid()), str(start_time(os.getpid()))]
        extra = {"PYTHONPATH": str(Path(__file__).parents[1]), "FUSE_LIBRARY_NAME": "fuse3"}
        self._place.spawn([*module, *folders, *self._options, *owner], "faultfs", extra)
        self._place.await_true("mounted", lambda: is_mounted(self.path), "faultfs")

    def fail(
        self,
        operations: str | Iterable[str],
        error: int,
        *,
        path: str = "*",
        skip: int = 0,
        times: int | None = None,
    ) -> int:
        """Calls fail with `error`, after `skip` good ones, `times` times or until taken back.

        `path` is a shell pattern over the path below the mount; its `*` crosses slashes. Returns a number
        for `remove`.
        """
        return self._add(operations, path=path, error=error, skip=skip, times=times)

    def delay(self, operations: str | Iterable[str], seconds: float, *, path: str = "*") -> int:
        """Calls take that much longer each; they do not wait for each other."""
        return self._add(operations, path=path, seconds=seconds)

    def hang(
        self, operations: str | Iterable[str], *, path: str = "*", skip: int = 0, times: int | None = None
    ) -> int:
        """Calls do not return until the rule is removed; then they succeed. SIGKILL ends no caller."""
        return self._add(operations, path=path, skip=skip, times=times, hangs=True)

    def refuse_changes(self, error: int) -> int:
        """Whatever changes the folder fails with `error`: EROFS, ENOSPC, EDQUOT."""
        return self.fail(CHANGING, error)

    def remove(self, *numbers: int) -> None:
        """Take rules back; what hung by them goes on."""
        self._ask(do="remove", numbers=numbers)

    def heal(self) -> None:
        """Take all rules back."""
        self._ask(do="clear")

    def counts(self) -> dict[str, int]:
        """The calls since the start or `reset`, by operation, failed ones included."""
        return dict(self._ask(do="look")["counts"])

    def struck(self) -> dict[str, int]:
        """The calls that a rule applied to."""
        return dict(self._ask(do="look")["struck"])

    def reset(self) -> None:
        """Count from 0."""
        self._ask(do="reset")

    def await_hanging(self, calls: int) -> None:
        """Until so many calls hang."""
        self._place.await_true(
            f"{calls} calls hang", lambda: self._ask(do="look")["hanging"] >= calls, "faultfs"
        )

    def kill(self) -> None:
        """kill -9: hanging calls end with an error, further ones give ENOTCONN until `mount`."""
        self._place.kill("faultfs")

    def unmount(self) -> None:
        """At once, whatever is open or hangs; the path is an empty folder then."""
        self.kill()
        detach(self.path)

    def _add(
        self,
        operations: str | Iterable[str],
        *,
        path: str,
        error: int = 0,
        seconds: float = 0.0,
        hangs: bool = False,
        skip: int = 0,
        times: int | None = None,
    ) -> int:
        names = {operations} if isinstance(operations, str) else set(operations)
        assert names <= OPERATIONS, f"no such operation: {sorted(names - OPERATIONS)}"
        rule = {"operations": sorted(names), "pattern": path, "error": error, "seconds": seconds}
        number = next(self._numbers)
        self._ask(do="add", number=number, hangs=hangs, skip=skip, times=times, **rule)
        return number

    def _ask(self, **request: Any) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10.0)
            connection.connect(str(self._control))
            with connection.makefile("rw") as stream:
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                answer: dict[str, Any] = json.loads(stream.readline())
        return answer


@contextlib.contextmanager
def fault_fs(
    below: Path | None = None, *, cache_seconds: float = 0.0, direct_io: bool = False
) -> Iterator[FaultFs]:
    """A mount over `below`, or over an empty folder. Raises BackendMissing where it cannot run."""
    with Workplace("faultfs") as place:
        if below is None:
            below = place.folder / "below"
            below.mkdir()
        yield FaultFs(place, below, cache_seconds=cache_seconds, direct_io=direct_io)
