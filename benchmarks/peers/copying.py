"""numpy's copy of the same bytes, block by block into rows that were touched once: what memory can do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstrata.transfer.buffers import Arena
from peers.base import Peer, Shape


class NumpyCopy(Peer):
    PACKAGES = ("numpy",)

    def __init__(self, shape: Shape, arena: Arena) -> None:
        super().__init__(shape, arena)
        size = shape.block_bytes
        self.there = Arena(2 * shape.blocks * size)
        memory = np.frombuffer(self.there.view, dtype=np.uint8)
        memory[:] = 1
        self.slots = memory[: 2 * shape.blocks * size].reshape(2 * shape.blocks, size)
        self.mine = [np.frombuffer(row, dtype=np.uint8) for row in self.rows]

    def plan(self, blocks: Sequence[int]) -> list[int]:
        return list(blocks)

    def start_save(self, plan: list[int]) -> None:
        for n in plan:
            np.copyto(self.slots[n % len(self.slots)], self.mine[n % len(self.mine)])

    def start_load(self, plan: list[int]) -> None:
        for n in plan:
            np.copyto(self.mine[n % len(self.mine)], self.slots[n % len(self.slots)])

    def wait(self, tickets: Sequence[None]) -> None:
        """A copy has ended when it returns."""

    def sync(self) -> None:
        """Memory is not durable."""
