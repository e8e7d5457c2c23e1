"""Networks between namespaces: one server, members that reach it over links with a bandwidth limit.

It shapes bytes per second and cuts links; it adds no latency, because few kernels come with netem.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from backends import BackendMissing, require_command
from backends.workplace import NAMESPACES, CommandError, Workplace, claim

BURST_BYTES = 256 << 10
"""What may pass at once. The kernel's timer ticks need about a tick's worth of bytes here."""
DEVICE_LETTERS = 15
"""What Linux allows in the name of a network device."""
UPLINK = "uplink"
"""A member's end of its link, within its namespace."""
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


class Network:
    """A namespace for a server, with a bridge, and members that join it. It goes with its workplace."""

    def __init__(self, place: Workplace) -> None:
        """Raises BackendMissing without iproute2, or where namespaces are not allowed."""
        self._ip = require_command("ip", "iproute2")
        self._tc = require_command("tc", "iproute2")
        require_command("nsenter", "util-linux")
        self._place = place
        number = claim("subnet", range(1, 4096), place.name)
        self._subnet = f"10.{100 + number // 256}.{number % 256}"
        self._root_link = f"{place.name.split('-')[0]}{number}"
        self._members: dict[str, str | None] = {}
        self.address = f"{self._subnet}.1"
        """The server's."""
        self.server = f"{place.name}-server"
        """The namespace's name."""
        try:
            self._make(self.server)
        except CommandError as e:
            raise BackendMissing(f"network namespaces cannot be made here: {e}") from e
        self._inside(self.server, self._ip, "link", "add", "bridge", "type", "bridge")
        self._inside(self.server, self._ip, "address", "add", f"{self.address}/24", "dev", "bridge")
        self._inside(self.server, self._ip, "link", "set", "bridge", "up")

    def join(self, member: str, bytes_per_second: int | None = None) -> str:
        """A namespace of the member's own, linked to the server; returns its name.

        A member's name is that of a network device too: at most 15 letters.
        """
        assert len(member) <= DEVICE_LETTERS, member
        namespace = f"{self._place.name}-{member}"
        self._make(namespace)
        self._link(member, namespace, UPLINK)
        self.limit(member, bytes_per_second)
        return namespace

    def join_host(self, bytes_per_second: int | None = None) -> str:
        """Let processes outside every namespace reach the server; returns the host's address."""
        if Path(f"/sys/class/net/{self._root_link}").exists():
            self._place.run([self._ip, "link", "delete", self._root_link])
        self._link("host", None, self._root_link)
        self.limit("host", bytes_per_second)
        return self.address_of("host")

    def address_of(self, member: str) -> str:
        """In the order of joining."""
        return f"{self._subnet}.{2 + list(self._members).index(member)}"

    def limit(self, member: str, bytes_per_second: int | None) -> None:
        """Each way, from now on; None lifts it. Headers count: about 4 % at full packets."""
        self._shape(self.server, member, bytes_per_second)
        namespace = self._members[member]
        self._shape(namespace, UPLINK if namespace else self._root_link, bytes_per_second)

    def cut(self, member: str) -> None:
        """No packet passes until `mend`: for its programs the server hangs."""
        self._inside(self.server, self._ip, "link", "set", "dev", member, "down")

    def mend(self, member: str) -> None:
        """Undo `cut`."""
        self._inside(self.server, self._ip, "link", "set", "dev", member, "up")

    def _make(self, namespace: str) -> None:
        self._place.run([self._ip, "netns", "add", namespace])
        self._inside(namespace, self._ip, "link", "set", "lo", "up")

    def _link(self, member: str, namespace: str | None, device: str) -> None:
        """A veth pair: `device` on the member's side or the host's, one called `member` at the bridge."""
        self._members[member] = namespace
        peer = ["netns", namespace] if namespace else []
        add = [self._ip, "link", "add", "name", device, *peer, "type", "veth"]
        self._place.run([*add, "peer", "name", member, "netns", self.server])
        self._inside(self.server, self._ip, "link", "set", "dev", member, "master", "bridge", "up")
        address = f"{self.address_of(member)}/24"
        self._inside(namespace, self._ip, "address", "add", address, "dev", device)
        self._inside(namespace, self._ip, "link", "set", "dev", device, "up")

    def _shape(self, namespace: str | None, device: str, bytes_per_second: int | None) -> None:
        if bytes_per_second is None:
            if "tbf" in self._inside(namespace, self._tc, "qdisc", "show", "dev", device):
                self._inside(namespace, self._tc, "qdisc", "delete", "dev", device, "root")
            return
        shape = ["rate", f"{bytes_per_second * 8}bit", "burst", str(BURST_BYTES), "latency", "20ms"]
        self._inside(namespace, self._tc, "qdisc", "replace", "dev", device, "root", "tbf", *shape)

    def _inside(self, namespace: str | None, *command: str) -> str:
        return self._place.run(command_in(namespace, command) if namespace else list(command))


def command_in(namespace: str, command: Sequence[str]) -> list[str]:
    """A command line that runs in a network namespace, and in the mount namespace of everyone."""
    return ["nsenter", f"--net={NAMESPACES / namespace}", *command]


@contextlib.contextmanager
def entered(namespace: str) -> Iterator[None]:
    """This thread, and the threads and processes it starts meanwhile, are in the network namespace."""
    with Path("/proc/thread-self/ns/net").open() as before, (NAMESPACES / namespace).open() as inside:
        _set_namespace(inside.fileno())
        try:
            yield
        finally:
            _set_namespace(before.fileno())


def _set_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "setns")
