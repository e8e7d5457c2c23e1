"""LMCache's L2 adapters, driven as its storage manager drives them, without an engine.

Stores and loads are submitted in as many tasks as the depth says, because an adapter works on the keys of
one task one after the other; completion is an eventfd. The adapters never ask the medium to keep anything:
the benchmark's sync does it for them.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from kvstrata.config import MIB
from kvstrata.transfer.buffers import PAGE, Arena
from peers.base import Peer, PeerError, Shape, parts, written_file
from peers.lmcache_memory import memory_objects

WAIT_MS = 120_000
META_BYTES = 64 * MIB

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")


class Objects(NamedTuple):
    keys: list[Any]
    objects: list[Any]


class LmcacheL2(Peer):
    """options: adapter is "fs", "fs_native" or "raw_block"; keys of its JSON configuration beside."""

    PACKAGES = ("lmcache", "lmcache-rust-raw-block-io", "torch")

    def __init__(self, shape: Shape, arena: Arena) -> None:
        super().__init__(shape, arena)
        from lmcache.v1.distributed.api import ObjectKey  # noqa: PLC0415
        from lmcache.v1.distributed.internal_api import L1MemoryDesc  # noqa: PLC0415
        from lmcache.v1.distributed.l2_adapters import create_l2_adapter  # noqa: PLC0415
        from lmcache.v1.platform import consume_fd  # noqa: PLC0415

        self._key, self._consume = ObjectKey, consume_fd
        self._undo = ExitStack()
        self._saved: dict[int, Any] = {}  # of every ticket: an adapter hands out all that ended
        self.kind = shape.options["adapter"]
        settings = self._settings()
        size = shape.block_bytes
        self.objects = memory_objects(arena, shape)
        described = L1MemoryDesc(ptr=self.base, size=shape.blocks * size, align_bytes=PAGE)
        self.adapter = create_l2_adapter(_config(settings), l1_memory_desc=described)

    def _settings(self) -> dict[str, Any]:
        shape = self.shape
        rest = {name: value for name, value in shape.options.items() if name != "adapter"}
        if self.kind != "raw_block":
            folder = shape.folder / "lmcache"
            folder.mkdir()
            return {"type": self.kind, "base_path": str(folder)} | rest
        path = shape.folder / "lmcache.bin"
        slot = shape.block_bytes + PAGE
        size = META_BYTES + 2 * shape.blocks * slot
        self._undo.enter_context(written_file(path, size, self.arena))
        return {
            "type": "raw_block",
            "device_path": str(path),
            "slot_bytes": slot,
            "capacity_bytes": size,
            "meta_total_bytes": META_BYTES,
            "iouring_queue_depth": 256,
        } | rest

    def plan(self, blocks: Sequence[int]) -> list[Objects]:
        keys = [
            self._key(chunk_hash=n.to_bytes(16, "big"), model_name="benchmark", kv_rank=0) for n in blocks
        ]
        objects = [self.objects[n % self.shape.blocks] for n in blocks]
        return [Objects(*both) for both in zip(
            parts(keys, self.shape.depth), parts(objects, self.shape.depth), strict=True
        )]  # fmt: skip

    def start_save(self, plan: list[Objects]) -> tuple[str, set[int]]:
        return "save", {self.adapter.submit_store_task(part.keys, part.objects) for part in plan}

    def start_load(self, plan: list[Objects]) -> tuple[str, dict[int, int]]:
        return "load", {
            self.adapter.submit_load_task(part.keys, part.objects): len(part.keys) for part in plan
        }

    def wait(self, tickets: Sequence[tuple[str, Any]]) -> None:
        loads = [ticket for kind, ticket in tickets if kind == "load"]
        for left in loads:
            while left:
                self._block_on(self.adapter.get_load_event_fd())
                for task in list(left):
                    bitmap = self.adapter.query_load_result(task)
                    if bitmap is not None and bitmap.popcount() != left.pop(task):
                        raise PeerError("a block was not loaded")
        for left in (ticket for kind, ticket in tickets if kind == "save"):
            while left := left - self._saved.keys():
                self._block_on(self.adapter.get_store_event_fd())
                self._saved |= self.adapter.pop_completed_store_tasks()
        for task in set().union(*(ticket for kind, ticket in tickets if kind == "save")):
            if not self._saved.pop(task).is_successful():
                raise PeerError("a block was not saved")

    def _block_on(self, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(WAIT_MS):
            raise PeerError(f"nothing was done for {WAIT_MS // 1000} s")
        self._consume(fd)

    def forget(self, plan: list[Objects]) -> None:
        for part in plan:
            self.adapter.delete(part.keys)

    def close(self) -> None:
        self.adapter.close()
        self._undo.close()


def _config(settings: dict[str, Any]) -> Any:
    import argparse  # noqa: PLC0415
    import json  # noqa: PLC0415

    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config  # noqa: PLC0415

    asked = argparse.Namespace(l2_adapter=[json.dumps(settings)])
    return parse_args_to_l2_adapters_config(asked).adapters[0]
