"""A GlusterFS volume with a server of its own, mounted by several members: one POSIX path that nodes share.

Server and members each have their own network namespace; every process sees the mounts. State, logs
and ports are the server's own, so that two volumes on one machine know nothing of each other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from backends import require_command, require_fuse
from backends.netns import Network, command_in
from backends.workplace import CommandError, Workplace, detach, is_mounted

PACKAGE = "glusterfs-server"
VOLUME = "shared"
PING_SECONDS = 42
"""GlusterFS's own default for how long a client waits for a server that hangs."""
REVIVE_SECONDS = 0.5

CONFIG = """\
volume management
  type mgmt/glusterd
  option working-directory {state}
  option run-directory {run}
  option glusterd-sockfile {run}/cli.socket
  option transport-type socket
  option transport.socket.listen-port 24007
  option logging-directory {logs}
  option ping-timeout 0
  option event-threads 1
end-volume
"""


class GlusterMount:
    """One member's mount: a FUSE client of its own, in a network namespace of its own."""

    def __init__(self, volume: GlusterVolume, member: str, options: Mapping[str, str]) -> None:
        self.member = member
        self.path = volume.place.folder / member
        """Where it is mounted. The path stays when it is unmounted: an empty folder then."""
        self.namespace = volume.network.join(member)
        self._volume = volume
        self._options = options
        self.path.mkdir()

    def mount(self) -> None:
        """Harmless when mounted and alive. Raises CommandError with the client's log."""
        if is_mounted(self.path) and self._volume.place.processes(self.member):
            return
        self.unmount()
        volume, log = self._volume, self._volume.place.folder / f"{self.member}.log"
        command = [
            require_command("glusterfs", PACKAGE),
            f"--volfile-server={volume.network.address}",
            f"--volfile-id={VOLUME}",
            f"--log-file={log}",
            "--log-level=WARNING",
            *(f"--{name}={value}" for name, value in self._options.items()),
            str(self.path),
        ]
        volume.place.run(command_in(self.namespace, command), self.member)
        volume.place.await_true("mounted", lambda: is_mounted(self.path), self.member)

    def unmount(self) -> None:
        """At once, even with open files and a server that hangs; the client is killed."""
        self._volume.place.kill(self.member)
        detach(self.path)

    def kill(self) -> None:
        """kill -9 of the client: the path gives ENOTCONN until `mount`."""
        self._volume.place.kill(self.member)

    def limit(self, bytes_per_second: int | None) -> None:
        """Of the link to the server, each way; None lifts it."""
        self._volume.network.limit(self.member, bytes_per_second)

    def cut(self) -> None:
        """Cut the link: calls hang until `mend`, or fail after the volume's ping time."""
        self._volume.network.cut(self.member)

    def mend(self) -> None:
        """Undo `cut`."""
        self._volume.network.mend(self.member)


class GlusterVolume:
    """A running server with one volume; `mount` adds members."""

    def __init__(
        self, place: Workplace, *, bricks: int = 1, redundancy: int = 0, ping_seconds: int = PING_SECONDS
    ) -> None:
        """With `redundancy` it is a dispersed volume, which serves while that many bricks are dead."""
        require_fuse()
        self._daemon = require_command("glusterd", PACKAGE)
        self._client = require_command("gluster", PACKAGE)
        self.place = place
        self.network = Network(place)
        self.bricks = [place.folder / f"brick{number}" for number in range(bricks)]
        """The folders on the server that hold the data: look, but change nothing."""
        self._mounts: dict[str, GlusterMount] = {}
        self._run = place.folder / "run"
        self._state = place.folder / "state"
        self._config = place.folder / "glusterd.vol"
        self._config.write_text(CONFIG.format(state=self._state, run=self._run, logs=place.folder))
        for folder in (self._run, self._state, *self.bricks):
            folder.mkdir()
        self.start_server()
        layout = ["disperse", str(bricks), "redundancy", str(redundancy)] if redundancy else []
        places = [f"{self.network.address}:{brick}" for brick in self.bricks]
        self._ask("create", VOLUME, *layout, *places, "force")
        self._ask("set", VOLUME, "network.ping-timeout", str(ping_seconds))
        self._ask("start", VOLUME)
        # So that no first call of a mount finds a brick missing.
        self.place.await_true("all bricks listen", self._listening, "server")
        self._adopt_sockets()

    def mount(
        self, member: str, bytes_per_second: int | None = None, options: Mapping[str, str] | None = None
    ) -> GlusterMount:
        """A further mount, its link limited each way; `options` like `entry-timeout` are the client's."""
        self._mounts[member] = GlusterMount(self, member, options or {})
        self._mounts[member].limit(bytes_per_second)
        self._mounts[member].mount()
        return self._mounts[member]

    def kill_server(self) -> None:
        """kill -9 of all bricks and of the daemon: calls give ENOTCONN."""
        self.place.kill("server")

    def start_server(self) -> None:
        """The daemon, and the bricks of a volume that had been started."""
        log = self.place.folder / "glusterd.log"
        command = [self._daemon, "--no-daemon", f"--volfile={self._config}", f"--log-file={log}"]
        command += [f"--pid-file={self._run}/glusterd.pid", "--log-level=WARNING"]
        self.place.spawn(command_in(self.network.server, command), "server")
        self.place.await_true("glusterd answers", self._answers, "server")
        if (self._state / "vols" / VOLUME).exists():
            self.revive_bricks()

    def freeze_server(self) -> None:
        """SIGSTOP: calls hang until `thaw_server`, or fail after the volume's ping time."""
        self.place.signal("server", signal.SIGSTOP)

    def thaw_server(self) -> None:
        """Undo `freeze_server`."""
        self.place.signal("server", signal.SIGCONT)

    def kill_brick(self, number: int) -> None:
        """kill -9 of one brick. What a dispersed volume misses meanwhile heals after `revive_bricks`."""
        os.kill(_pid(self._pid_file(number)), signal.SIGKILL)

    def revive_bricks(self) -> None:
        """Start the bricks that were killed."""
        self.place.await_true("all bricks run again", self._revived, "server")
        self._adopt_sockets()

    def _revived(self) -> bool:
        """The daemon may still believe that a brick runs which was killed just now: so ask again."""
        self._ask("start", VOLUME, "force")
        with contextlib.suppress(CommandError):
            self.place.await_true("all bricks listen", self._listening, "server", REVIVE_SECONDS)
        return self._listening()

    def _pid_file(self, number: int) -> Path:
        name = f"{self.network.address}{self.bricks[number]}".replace("/", "-")
        return self._run / "vols" / VOLUME / f"{name}.pid"

    def _adopt_sockets(self) -> None:
        """GlusterFS keeps those of its daemons in a folder of the machine, whatever one configures."""
        for pid in self.place.processes("server"):
            with contextlib.suppress(OSError, ValueError):
                self.place.adopt(Path(_option(_command_line(pid), "-S")))

    def _listening(self) -> bool:
        return all(self._listens(number) for number in range(len(self.bricks)))

    def _listens(self, number: int) -> bool:
        try:
            pid = _pid(self._pid_file(number))
            port = int(_option(_command_line(pid), "--brick-port"))
            tables = [Path(f"/proc/{pid}/net/{table}").read_text() for table in ("tcp", "tcp6")]
        except (OSError, ValueError):
            return False
        lines = "".join(tables).splitlines()
        return any(f":{port:04X} " in line and " 0A " in line for line in lines)

    def _answers(self) -> bool:
        """The command line's client sleeps for 3 seconds when it finds no daemon: so look first."""
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self._run / "cli.socket"))
            self._ask("info")
        except (CommandError, OSError):
            return False
        return True

    def _ask(self, *words: str) -> str:
        daemon = f"--glusterd-sock={self._run}/cli.socket"
        log = f"--log-file={self.place.folder}/cli.log"
        return self.place.run([self._client, "--mode=script", daemon, log, "volume", *words])


@contextlib.contextmanager
def gluster_volume(
    members: int = 2,
    *,
    bytes_per_second: int | None = None,
    bricks: int = 1,
    redundancy: int = 0,
    ping_seconds: int = PING_SECONDS,
) -> Iterator[tuple[GlusterVolume, list[GlusterMount]]]:
    """A volume that `members` mount. Raises BackendMissing where it cannot run."""
    with Workplace("gluster") as place:
        volume = GlusterVolume(place, bricks=bricks, redundancy=redundancy, ping_seconds=ping_seconds)
        yield volume, [volume.mount(f"member{number}", bytes_per_second) for number in range(members)]


def _pid(pid_file: Path) -> int:
    return int(pid_file.read_text())


def _command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


def _option(words: list[str], name: str) -> str:
    """Raises ValueError if the option is not there: a process that is just starting or has just gone."""
    return words[words.index(name) + 1]
