"""NIXL's POSIX back-end (io_uring or Linux AIO): slots in one file, no index, no checksum.

NIXL moves descriptors and joins neighbours by itself; which block lies where is the caller's. A transfer
is polled: once per millisecond for a batch, as LMCache polls it, and faster for a single block.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from kvstrata.transfer.buffers import Arena
from peers.base import Peer, PeerError, Shape, written_file

POLL_SECONDS, POLL_SECONDS_FEW = 1e-3, 5e-5
FEW = 4
BACKENDS = ["POSIX"]


class Slots(NamedTuple):
    rows: Any
    slots: Any


class Moving(NamedTuple):
    agent: Any
    handle: Any
    count: int


class Nixl(Peer):
    """options: engine is "uring" or "aio"."""

    PACKAGES = ("nixl-cu12",)

    def __init__(self, shape: Shape, arena: Arena) -> None:
        os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
        from nixl_cu12._api import nixl_agent, nixl_agent_config  # noqa: PLC0415

        super().__init__(shape, arena)
        self.count = 2 * shape.blocks
        size = shape.block_bytes
        self._undo = ExitStack()
        self.fd = self._undo.enter_context(
            written_file(shape.folder / "nixl.bin", self.count * size, arena)
        )
        # An agent must not be used by two threads, and a benchmark saves and loads in two.
        self.agents: dict[str, Any] = {}
        self.lists: dict[str, tuple[Any, Any]] = {}
        for operation in ("WRITE", "READ"):
            agent = nixl_agent(operation, nixl_agent_config(backends=[]))
            agent.create_backend("POSIX", {f"use_{shape.options['engine']}": "true"})
            agent.register_memory([(0, self.count * size, self.fd, "")], "FILE", BACKENDS)
            agent.register_memory([(self.base, shape.blocks * size, 0, "")], "DRAM", BACKENDS)
            rows = [(self.base + n * size, size, 0) for n in range(shape.blocks)]
            slots = [(n * size, size, self.fd) for n in range(self.count)]
            self.agents[operation] = agent
            self.lists[operation] = (
                agent.prep_xfer_dlist("NIXL_INIT_AGENT", rows, "DRAM", BACKENDS),
                agent.prep_xfer_dlist(operation, slots, "FILE", BACKENDS),
            )

    def plan(self, blocks: Sequence[int]) -> Slots:
        numbers = np.asarray(blocks, dtype=np.int64)
        return Slots(
            (numbers % self.shape.blocks).astype(np.int32), (numbers % self.count).astype(np.int32)
        )

    def _start(self, operation: str, plan: Slots) -> Moving:
        agent, (local, remote) = self.agents[operation], self.lists[operation]
        handle = agent.make_prepped_xfer(operation, local, plan.rows, remote, plan.slots, b"", BACKENDS)
        agent.transfer(handle)
        return Moving(agent, handle, len(plan.rows))

    def start_save(self, plan: Slots) -> Moving:
        return self._start("WRITE", plan)

    def start_load(self, plan: Slots) -> Moving:
        return self._start("READ", plan)

    def wait(self, tickets: Sequence[Moving]) -> None:
        pause = POLL_SECONDS_FEW if sum(moving.count for moving in tickets) <= FEW else POLL_SECONDS
        flying = list(tickets)
        while flying:
            left = []
            for moving in flying:
                state = moving.agent.check_xfer_state(moving.handle)
                if state == "PROC":
                    left.append(moving)
                elif state == "DONE":
                    moving.agent.release_xfer_handle(moving.handle)
                else:
                    raise PeerError(f"NIXL says {state}")
            flying = left
            if left:
                time.sleep(pause)

    def sync(self) -> None:
        os.fdatasync(self.fd)

    def close(self) -> None:
        self.lists.clear()
        self.agents.clear()
        self._undo.close()
