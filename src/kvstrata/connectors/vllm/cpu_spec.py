"""KVStrataCPUSpec: vLLM's own tiering offload on a machine without a GPU.

vLLM's TieringOffloadingSpec refuses a CPU platform because its worker copies with CUDA. This spec is that
spec with a worker that copies with memcpy; manager, primary tier, secondary tiers and metrics are vLLM's.
On CUDA and XPU it is vLLM's spec unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from kvstrata.errors import ConfigError

Bytes = NDArray[np.int8]


class MemcpyWorker(OffloadingWorker):
    """Copies between the engine's KV cache and the shared region, both host memory, at once.

    Each canonical tensor of the engine is (blocks, page bytes); its part of a row of the region is
    (chunks, blocks per chunk, page bytes).
    """

    def __init__(
        self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion
    ) -> None:
        self._region: SharedOffloadRegion | None = region
        self._blocks_per_chunk = blocks_per_chunk
        self._groups = kv_caches.group_data_refs
        self._device: list[Bytes] = []
        self._host: list[Bytes] = []
        for canonical in kv_caches.tensors:
            page = canonical.page_size_bytes
            self._device.append(canonical.tensor.view(torch.int8).view(-1, page).numpy())
            host = region.create_next_worker_view(page * blocks_per_chunk)
            self._host.append(host.unflatten(1, (blocks_per_chunk, page)).numpy())
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, device=src_spec, host=dst_spec, to_host=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:
        # expedited (vLLM 0.33) asks for haste: a copy that is over on return cannot be hastier.
        return self._copy(job_id, device=dst_spec, host=src_spec, to_host=False)

    def _copy(self, job_id: int, device: GPULoadStoreSpec, host: Any, to_host: bool) -> bool:
        started = time.monotonic()
        moved = 0
        for tensor, size, block, chunk, part in self._pages(device, host):
            inner = self._device[tensor][block, :size]
            outer = self._host[tensor][chunk, part, :size]
            if to_host:
                outer[:] = inner
            else:
                inner[:] = outer
            moved += size
        self._finished.append(TransferResult(job_id, True, moved, time.monotonic() - started))
        return True

    def _pages(self, device: GPULoadStoreSpec, host: Any) -> Iterator[tuple[int, int, int, int, int]]:
        """(tensor, bytes, engine block, host chunk, place in the chunk) of every page to copy.

        The first block of a group may lie in the middle of its first chunk: block_indices says where.
        """
        blocks, chunks = device.block_ids.tolist(), host.block_ids.tolist()
        first_block = first_chunk = 0
        for refs, count, index in zip(self._groups, device.group_sizes, device.block_indices, strict=True):
            if count == 0:
                continue
            skip = index % self._blocks_per_chunk
            for offset in range(count):
                chunk, part = divmod(skip + offset, self._blocks_per_chunk)
                for ref in refs:
                    yield (
                        ref.tensor_idx,
                        ref.page_size_bytes,
                        blocks[first_block + offset],
                        chunks[first_chunk + chunk],
                        part,
                    )
            first_block += count
            first_chunk += -(-(skip + count) // self._blocks_per_chunk)

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Every copy is over when it was submitted."""

    def shutdown(self) -> None:
        self._device.clear()
        self._host.clear()
        if self._region is not None:
            self._region.cleanup()
            self._region = None


class KVStrataCPUSpec(TieringOffloadingSpec):
    """spec_name for --kv-transfer-config where vLLM runs on a CPU."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        if self.config.canonical_layout:
            raise ConfigError("canonical_layout needs a GPU; remove it from kv_connector_extra_config")
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=0 if self.replicated_layout else self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            try:
                worker = MemcpyWorker(kv_caches, self.blocks_per_chunk, region)
            except BaseException:
                region.cleanup()
                raise
            self._worker: OffloadingWorker | None = worker
        return self._worker
