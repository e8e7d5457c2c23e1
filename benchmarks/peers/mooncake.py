"""Mooncake Store in this process: the memory tier's peer. It owns the segment, so a transfer is a copy.

Its ports bind to every address, so it runs in a network namespace of its own, which needs root.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from kvstrata.config import MIB
from kvstrata.transfer.buffers import Arena
from peers.base import Peer, PeerError, Shape

CLONE_NEWNET = 0x40000000
RPC, METRICS = 50151, 9903
START_SECONDS = 20.0


class Entries(NamedTuple):
    keys: list[str]
    addresses: list[int]
    sizes: list[int]


class Mooncake(Peer):
    """Batches of put_from and get_into over registered rows."""

    PACKAGES = ("mooncake-transfer-engine-non-cuda",)

    def __init__(self, shape: Shape, arena: Arena) -> None:
        super().__init__(shape, arena)
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        os.environ.setdefault("GLOG_minloglevel", "3")
        _network_of_our_own()
        from mooncake.store import MooncakeDistributedStore  # noqa: PLC0415

        beside = Path(sys.executable).with_name("mooncake_master")
        program = str(beside) if beside.exists() else shutil.which("mooncake_master")
        if program is None:
            raise PeerError("mooncake_master is not installed")
        self.master = subprocess.Popen(
            [
                program, "-rpc_address=127.0.0.1", f"-rpc_port={RPC}", f"-metrics_port={METRICS}",
                "-rpc_thread_num=2", "-default_kv_lease_ttl=100",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            self.store = self._connect(MooncakeDistributedStore)
            if self.store.register_buffer(self.base, shape.blocks * shape.block_bytes):
                raise PeerError("register_buffer failed")
        except BaseException:
            self._stop_master()
            raise

    def _connect(self, make: Any) -> Any:
        segment = 3 * self.shape.blocks * self.shape.block_bytes + 64 * MIB
        until = time.monotonic() + START_SECONDS
        while True:
            store = make()
            answer = store.setup(
                "127.0.0.1", "P2PHANDSHAKE", segment, 256 * MIB, "tcp", "", f"127.0.0.1:{RPC}"
            )
            if answer == 0:
                return store
            if time.monotonic() > until:
                raise PeerError(f"setup answered {answer}")
            time.sleep(0.2)

    def plan(self, blocks: Sequence[int]) -> Entries:
        size = self.shape.block_bytes
        return Entries(
            [f"block-{n}" for n in blocks],
            [self.base + n % self.shape.blocks * size for n in blocks],
            [size] * len(blocks),
        )

    def start_save(self, plan: Entries) -> None:
        if any(self.store.batch_put_from(plan.keys, plan.addresses, plan.sizes)):
            raise PeerError("a block was not saved")

    def start_load(self, plan: Entries) -> None:
        if list(self.store.batch_get_into(plan.keys, plan.addresses, plan.sizes)) != plan.sizes:
            raise PeerError("a block was not loaded")

    def wait(self, tickets: Sequence[None]) -> None:
        """Both calls have ended when they return."""

    def sync(self) -> None:
        """Memory is not durable."""

    def forget(self, plan: Entries) -> None:
        for key in plan.keys:
            self.store.remove(key, force=True)

    def close(self) -> None:
        try:
            self.store.close()
        finally:
            self._stop_master()

    def _stop_master(self) -> None:
        self.master.terminate()
        try:
            self.master.wait(5)
        except subprocess.TimeoutExpired:
            self.master.kill()
            self.master.wait()


@cache
def _network_of_our_own() -> None:
    """Move this process into a new network namespace that has only the loopback. Once."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise PeerError("no network namespace of its own (run as root)")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
