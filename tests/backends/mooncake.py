"""A real Mooncake Store: its master in a network namespace of its own, and members that lend it memory.

Mooncake's transfer ports accept anyone on every address, so nothing here listens outside the namespaces. A
process may use one of them only: Mooncake keeps threads that stay where they were started.
"""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends import BackendMissing, require_module
from backends.netns import Network, command_in, entered
from backends.workplace import Workplace

REQUIREMENT = "mooncake-transfer-engine-non-cuda>=0.3.13; platform_machine == 'x86_64'"
RPC_PORT = 50051
METRICS_PORT = 9003
LEASE_MS = 200
"""How long a value that was read cannot be removed or evicted; Mooncake's default is some seconds."""


@dataclass(frozen=True)
class MooncakeMember:
    """Where a member's processes run, and what they tell Mooncake about themselves."""

    namespace: str
    address: str
    master: str
    """Host and port of the master."""

    def connect(self, *, segment_bytes: int, buffer_bytes: int = 64 << 20) -> Any:
        """A `MooncakeDistributedStore` that lends `segment_bytes`. Only within the namespace."""
        from mooncake.store import MooncakeDistributedStore

        store = MooncakeDistributedStore()
        code = store.setup(
            self.address, "P2PHANDSHAKE", segment_bytes, buffer_bytes, "tcp", "", self.master
        )
        if code != 0:
            raise ConnectionError(f"mooncake at {self.master}: setup gives {code}")
        return store


class MooncakeMaster:
    """A running master; members join it. Values lie with the members: killing it loses their index."""

    def __init__(self, place: Workplace) -> None:
        """Raises BackendMissing without Mooncake."""
        require_module("mooncake", REQUIREMENT)
        found = importlib.util.find_spec("mooncake")
        assert found is not None and found.submodule_search_locations is not None
        self._program = Path(found.submodule_search_locations[0]) / "mooncake_master"
        if not self._program.exists():
            raise BackendMissing(f"mooncake came without its master; run: pip install '{REQUIREMENT}'")
        self.place = place
        self.network = Network(place)
        self.start()

    def start(self) -> None:
        """Again after `kill`."""
        command = [
            str(self._program),
            f"-rpc_address={self.network.address}",
            f"-rpc_port={RPC_PORT}",
            f"-metrics_port={METRICS_PORT}",
            "-rpc_thread_num=2",
            f"-default_kv_lease_ttl={LEASE_MS}",
        ]
        self.place.spawn(command_in(self.network.server, command), "master")
        self.place.await_true("mooncake_master listens", self._listens, "master")

    def kill(self) -> None:
        """kill -9: calls fail until `start`."""
        self.place.kill("master")

    def freeze(self) -> None:
        """SIGSTOP: calls hang until `thaw`, or until the client gives up."""
        self.place.signal("master", signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo `freeze`."""
        self.place.signal("master", signal.SIGCONT)

    def join(self, member: str, bytes_per_second: int | None = None) -> MooncakeMember:
        """A namespace for a member's processes, its link limited each way."""
        namespace = self.network.join(member, bytes_per_second)
        address = self.network.address_of(member)
        return MooncakeMember(namespace, address, f"{self.network.address}:{RPC_PORT}")

    def _listens(self) -> bool:
        with entered(self.network.server), socket.socket() as probe:
            return probe.connect_ex((self.network.address, RPC_PORT)) == 0


@contextlib.contextmanager
def mooncake_master() -> Iterator[MooncakeMaster]:
    """A running master. Raises BackendMissing where it cannot run."""
    with Workplace("mooncake") as place:
        yield MooncakeMaster(place)
