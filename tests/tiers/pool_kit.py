"""What the tests of the pool tier share: a real Mooncake to be a member of, and lenders."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import store_kit
from backends.mooncake import MooncakeMaster, MooncakeMember
from backends.netns import command_in
from kvstrata.config import Config, MediumFields, MemoryTierConfig, PoolTierConfig, StoreConfig
from kvstrata.store import BlockStore
from kvstrata.types import BlockKey, BlockLayout, Namespace, Outcome, PrefixMatch
from store_kit import LAYOUT, NAMESPACE, WAIT_SECONDS, eventually, save

LENT_BYTES = 64 << 20
LENDER = """
import os, sys, time
os.environ.update(MC_LOG_LEVEL="ERROR", GLOG_minloglevel="3")
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
code = store.setup(sys.argv[1], "P2PHANDSHAKE", int(sys.argv[3]), 16 << 20, "tcp", "", sys.argv[2])
print("ready" if code == 0 else f"setup gives {code}", flush=True)
time.sleep(3600)
"""
_numbers = itertools.count()


@dataclass
class Pool:
    """A master, and where this process and its lenders are members."""

    master: MooncakeMaster
    member: MooncakeMember

    def lend(self, size: int = LENT_BYTES) -> subprocess.Popen[bytes]:
        """A process that lends memory and does nothing else."""
        role = f"lender{next(_numbers)}"
        arguments = [self.member.address, self.member.master, str(size)]
        process = self.master.place.spawn(
            command_in(self.member.namespace, [sys.executable, "-c", LENDER, *arguments]), role
        )
        self.master.place.await_true("it lends", lambda: "ready" in self.master.place.log(role), role)
        return process

    def raw(self) -> Any:
        """A client of Mooncake's own that lends nothing. To be closed by the caller."""
        return self.member.connect(segment_bytes=0, buffer_bytes=16 << 20)

    def tier(self, **fields: Any) -> PoolTierConfig:
        given: dict[str, Any] = {"there_seconds": 60.0, "missing_seconds": 0.2, "rpc_seconds": 0.5}
        return PoolTierConfig(master=self.member.master, **(given | fields))

    def store(
        self,
        *above: MemoryTierConfig | MediumFields,
        namespace: Namespace = NAMESPACE,
        layout: BlockLayout = LAYOUT,
        settings: dict[str, Any] | None = None,
        **fields: Any,
    ) -> BlockStore:
        """A store with the pool as its last tier."""
        chosen = {"breaker_retry_seconds": 0.2, "io_deadline_seconds": 10.0} | (settings or {})
        tiers: Any = (*above, self.tier(**fields))
        return BlockStore(Config(StoreConfig(**chosen), tiers), layout, namespace)


def name_of(key: bytes) -> str:
    """A block's name in the pool, as the documentation has it."""
    return f"kvstrata/1/{key.hex()}"


def found(store: BlockStore, keys: list[BlockKey]) -> PrefixMatch:
    """A look-up, asked again until the pool has answered and nothing is being saved."""
    until = time.monotonic() + WAIT_SECONDS
    while True:
        match = store.lookup(keys)
        if not any(state.value in ("pending", "asking") for state in match.states):
            return match
        assert time.monotonic() < until, "the pool does not say whether the blocks are there"
        time.sleep(0.005)


def load(store: BlockStore, keys: list[BlockKey], size: int = 0) -> list[Outcome]:
    """`store_kit.load`, when the pool has said what is there."""
    found(store, keys)
    return store_kit.load(store, keys, size)


def settle(store: BlockStore, keys: list[BlockKey]) -> None:
    """Save until the pool serves it: what fails or is out of service meanwhile comes back by itself."""

    def served() -> bool:
        save(store, keys)
        return set(load(store, keys)) == {Outcome.LOADED}

    eventually(served, "the pool does not come back")
