"""A workplace: the folder, processes, mounts and network namespaces of one server, removed together.

Everything carries the workplace's name, which holds its owner's process number and start time. So it is
found and removed even when the owner was killed: the next one that is made on the machine sweeps first.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from backends import require_command, require_root, search_path

ROOT = Path(tempfile.gettempdir()) / "kvstrata-backends"
"""Where every workplace of this machine lies."""
NAMESPACES = Path("/run/netns")
PREFIX = "kvb"
MARK = "KVSTRATA_BACKEND"
"""In the environment of every process that belongs to a workplace: its name and the process's role."""
OUTSIDE = "outside"
"""The file in a workplace's folder that names the files elsewhere."""
RUN_SECONDS = 60.0
WAIT_SECONDS = 60.0
MNT_DETACH = 2

_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


class CommandError(Exception):
    """A command that a server needs went wrong. The message holds the command and what it printed."""


class Workplace:
    """A folder and a name for one server. `close` removes whatever was made under that name."""

    def __init__(self, kind: str) -> None:
        """Raises BackendMissing without root."""
        require_root()
        sweep()
        self.owner = os.getpid()
        self.name = f"{PREFIX}-{self.owner}-{start_time(self.owner)}-{next(_numbers)}-{kind}"
        self.folder = ROOT / self.name
        self.folder.mkdir(parents=True)
        self._children: list[subprocess.Popen[bytes]] = []
        atexit.register(self.close)

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def environment(self, role: str, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """For a process that shall end with this workplace."""
        mark = {MARK: f"{self.name}:{role}"}
        return {**os.environ, "PATH": search_path(), "LC_ALL": "C", **(extra or {}), **mark}

    def run(
        self,
        command: Sequence[str],
        role: str = "command",
        *,
        seconds: float = RUN_SECONDS,
        extra: Mapping[str, str] | None = None,
    ) -> str:
        """Run to its end and return what it printed. Raises CommandError."""
        try:
            done = subprocess.run(
                command,
                env=self.environment(role, extra),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as e:
            raise CommandError(f"{' '.join(command)}: not done after {seconds:g} s") from e
        if done.returncode:
            said = done.stderr or done.stdout
            raise CommandError(f"{' '.join(command)}: exit {done.returncode}: {said}")
        return done.stdout

    def spawn(
        self, command: Sequence[str], role: str, extra: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a server; what it prints goes to `role`.log in the folder."""
        with (self.folder / f"{role}.log").open("ab") as log:
            child = subprocess.Popen(
                command,
                env=self.environment(role, extra),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def adopt(self, path: Path) -> None:
        """A file outside the folder that a server made: it is removed with the workplace."""
        with (self.folder / OUTSIDE).open("a") as file:
            file.write(f"{path}\n")

    def log(self, role: str, last: int = 2000) -> str:
        """The end of what a server printed."""
        path = self.folder / f"{role}.log"
        return path.read_text(errors="replace")[-last:] if path.exists() else ""

    def processes(self, role: str = "") -> list[int]:
        """The running processes of this workplace, or those whose role begins with `role`."""
        return _marked(f"{self.name}:{role}")

    def signal(self, role: str, number: int) -> int:
        """Send a signal to all processes of a role; how many there were."""
        pids = self.processes(role)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return len(pids)

    def kill(self, role: str = "") -> int:
        """kill -9, and wait until they are gone; how many there were."""
        count = _kill(f"{self.name}:{role}")
        self._children = [child for child in self._children if child.poll() is None]
        return count

    def await_true(
        self, what: str, ready: Callable[[], bool], role: str = "", seconds: float = WAIT_SECONDS
    ) -> None:
        """Poll until `ready`. Raises CommandError with the end of `role`'s log if it never is."""
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                raise CommandError(f"{self.name}: {what}: not after {seconds:g} s\n{self.log(role)}")
            time.sleep(0.02)

    def close(self) -> None:
        """Remove everything; harmless when done before. A forked child of the owner removes nothing."""
        if os.getpid() != self.owner:
            return
        atexit.unregister(self.close)
        _remove(self.name)
        for child in self._children:
            child.wait()
        self._children.clear()


def sweep() -> None:
    """Remove the workplaces whose owners no longer run."""
    ROOT.mkdir(parents=True, exist_ok=True)
    with _locked():
        for folder in ROOT.glob(f"{PREFIX}-*"):
            _, pid, started, *_ = folder.name.split("-")
            if not runs(int(pid), int(started)):
                _remove(folder.name)


def claim(kind: str, numbers: range, owner: str) -> int:
    """A number that no other workplace of this machine holds, until `owner`, a workplace, is removed."""
    with _locked():
        for number in numbers:
            path = ROOT / f"{kind}-{number}"
            if path.exists() and (ROOT / path.read_text()).is_dir():
                continue
            path.write_text(owner)
            return number
    raise CommandError(f"{ROOT}: all {len(numbers)} numbers of {kind} are taken")


def mount_points(folder: Path) -> list[Path]:
    """What is mounted at or below a folder, the last mounted first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [Path(_unescape(line.split()[4])) for line in reversed(lines)]
    return [point for point in points if point == folder or folder in point.parents]


def is_mounted(path: Path) -> bool:
    """Without touching the file system there: it may hang."""
    return path in mount_points(path)


def detach(path: Path) -> None:
    """Unmount at once, even when the file system hangs or files are open. Harmless if not mounted."""
    while is_mounted(path):
        if _libc.umount2(os.fsencode(path), MNT_DETACH) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))


def _remove(name: str) -> None:
    folder = ROOT / name
    _kill(f"{name}:")
    for point in mount_points(folder):
        detach(point)
    for namespace in NAMESPACES.glob(f"{name}-*"):
        subprocess.run([require_command("ip", "iproute2"), "netns", "delete", namespace.name], check=True)
    if mount_points(folder):
        raise CommandError(f"{folder}: something is still mounted below; nothing was removed")
    outside = folder / OUTSIDE
    for line in outside.read_text().splitlines() if outside.exists() else []:
        Path(line).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _kill(mark: str) -> int:
    """SIGKILL to the processes with this mark until none is left: one may start another meanwhile."""
    killed: set[int] = set()
    deadline = time.monotonic() + WAIT_SECONDS
    while pids := _marked(mark):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed.update(pids)
        if time.monotonic() > deadline:
            raise CommandError(f"{mark}: processes {pids} outlive SIGKILL")
        time.sleep(0.005)
    return len(killed)


def _marked(mark: str) -> list[int]:
    """The processes whose environment carries a mark that begins so; the dead have no environment."""
    wanted = f"\0{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in b"\0" + (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def start_time(pid: int) -> int:
    """In clock ticks since boot; -1 if there is no such process. The command's name may hold blanks."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return -1


def runs(pid: int, started: int) -> bool:
    """Whether a process that started then still runs and is not about to die.

    A killed process may linger, stuck in a file system that hangs; it is over all the same.
    """
    if start_time(pid) != started:
        return False
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    fields = dict(line.split(":", 1) for line in lines)
    pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
    return fields["State"].split()[0] not in "ZX" and not pending & 1 << signal.SIGKILL - 1


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    ROOT.mkdir(parents=True, exist_ok=True)
    with (ROOT / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
