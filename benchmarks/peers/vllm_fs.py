"""vLLM's `fs` tier, a file per block: its own class, driven as its scheduler drives it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager

from kvstrata.transfer.buffers import Arena
from kvstrata.types import BlockKey


class FilePerBlock:
    """vLLM's class itself, driven as its scheduler does."""

    def __init__(self, folder: str, block_bytes: int, batch_blocks: int) -> None:
        parallel = OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True)
        config = OffloadingConfig(
            groups=(OffloadingGroupConfig(16, ("layer",), 0),),
            worker_kv_bytes_per_block=block_bytes,
            enable_kv_cache_events=False,
            extra_config={},
            engine_id="benchmark",
            model=OffloadingModelConfig("model", "bfloat16"),
            cache=OffloadingCacheConfig(16, 1),
            parallel=parallel,
        )
        arena = Arena(batch_blocks * block_bytes)
        arena.view[:] = os.urandom(block_bytes) * batch_blocks
        self._arena = arena
        view = memoryview(np.frombuffer(arena.view, np.int8).reshape(batch_blocks, block_bytes))
        self._tier = FileSystemTierManager(
            SimpleNamespace(config=config, blocks_per_chunk=1), view, "fs", folder
        )
        self._number = 0

    def _transfer(self, keys: Sequence[BlockKey], *, load: bool) -> None:
        self._number += 1
        context = ReqContext(req_id=f"request-{self._number}")
        chunks = np.arange(len(keys))
        job = TransferJob(self._number, [make_offload_key(key, 0) for key in keys], chunks, load, context)
        (self._tier.submit_load if load else self._tier.submit_store)(job)
        self._tier.drain_jobs()
        results = list(self._tier.get_finished_jobs())
        assert len(results) == 1 and results[0].success, results

    def store(self, keys: Sequence[BlockKey]) -> None:
        self._transfer(keys, load=False)

    def load(self, keys: Sequence[BlockKey]) -> None:
        self._transfer(keys, load=True)

    def lookup(self, keys: Sequence[BlockKey]) -> int:
        """Each call is a request of its own, which asks in every step until it knows."""
        self._number += 1
        context = ReqContext(req_id=f"request-{self._number}")
        names = [make_offload_key(key, 0) for key in keys]
        while True:
            found = [self._tier.lookup(name, context) for name in names]
            self._tier.on_schedule_end(ScheduleEndContext((), ()))
            if LookupResult.RETRY not in found:
                break
            time.sleep(0.001)
        self._tier.on_request_finished(context)
        return found.count(LookupResult.HIT)

    def close(self) -> None:
        self._tier.shutdown()
