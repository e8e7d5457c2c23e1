"""KVStrataTier: a BlockStore as a secondary tier of vLLM's tiering offload (vLLM 0.30 and later).

vLLM keeps a primary tier in host memory; this tier stands below it. Rows of the primary are read and
written in place: a row is the buffer of the O_DIRECT call. All methods run on vLLM's scheduler and only
touch tables and queues. A load that fails or is late makes its key a miss for the request at once, so that
vLLM computes the block instead of asking again.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvstrata.config import Config, MemoryTierConfig, NvmeTierConfig, TierConfig, load_config, parse_config
from kvstrata.connectors.vllm.identity import engine_namespace
from kvstrata.connectors.vllm.quarantine import Quarantine
from kvstrata.errors import ConfigError
from kvstrata.hashing import wrap_keys
from kvstrata.metrics import MetricsServer
from kvstrata.serving import open_store
from kvstrata.store import BlockStore
from kvstrata.transfer.buffers import Buffers, Region
from kvstrata.transfer.handle import Transfer
from kvstrata.transfer.huge_pages import HugePageCare, care_for
from kvstrata.types import BlockKey, BlockLayout, Lookup, Outcome, PrefixMatch

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _RequestChain:
    """What this tier remembers of one request: its blocks so far, and those that it could not have."""

    number: int
    keys: dict[OffloadKey, BlockKey] = field(default_factory=dict)
    asked: set[OffloadKey] = field(default_factory=set)
    failed: set[OffloadKey] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Job:
    transfer: Transfer
    keys: list[OffloadKey]
    rows: list[int]
    is_load: bool
    chain: _RequestChain


class KVStrataTier(SecondaryTierManager):
    """Give either config_file (a kvstrata.toml) or settings (the same as a mapping)."""

    medium: ClassVar[Medium | None] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        config_file: str | None = None,
        settings: Mapping[str, Any] | None = None,
        locality: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        if unknown:
            raise ConfigError(
                f"secondary_tiers: unknown keys {sorted(unknown)}; KVStrataTier takes config_file, "
                "settings and locality"
            )
        if (config_file is None) == (settings is None):
            raise ConfigError("secondary_tiers: give KVStrataTier either config_file or settings")
        config = load_config(config_file) if config_file else parse_config(settings or {}, "settings")
        config = _for_replica(config, offloading_spec.config.parallel)
        rows = np.asarray(primary_kv_view)
        row_bytes = rows.strides[0]
        cache = offloading_spec.config.cache
        tokens = offloading_spec.config.groups[0].tokens_per_block * cache.blocks_per_chunk
        namespace = engine_namespace(
            offloading_spec.config, row_bytes, config.vllm.model_revision, config.store.salt
        )
        self._rows: Region | None = Region(rows, row_bytes)
        self._row_bytes = row_bytes
        self._namespace = namespace.digest
        self._jobs: dict[int, _Job] = {}
        self._quarantine = Quarantine(offloading_spec)
        layout = BlockLayout(row_bytes, tokens)
        self.store = open_store(config, layout, namespace, memory=[primary_kv_view])
        self._metrics: MetricsServer | None = None
        try:
            if config.metrics.port:
                self._metrics = MetricsServer(self.store, config.metrics)
        except BaseException:
            self.store.close()
            raise
        self._pages: HugePageCare | None = None
        if config.vllm.huge_pages and isinstance(self.store, BlockStore):  # else the server does it
            self._pages = care_for(primary_kv_view, self.store.telemetry, "huge_page_bytes_total")
        # An engine that is only dropped, not shut down, must not lose what it has saved.
        atexit.register(self.store.close)
        for tier in self.store.status():
            log.info("kvstrata: tier %s: %d blocks found", tier.name, tier.blocks)

    def _chain(self, context: ReqContext) -> _RequestChain:
        chain: _RequestChain | None = context.get_state(_RequestChain)
        if chain is None:
            chain = _RequestChain(self.store.new_request())
            context.set_state(chain)
        return chain

    def _wrap(self, keys: Collection[OffloadKey], chain: _RequestChain) -> list[BlockKey]:
        """Our keys for vLLM's, computed once per request."""
        new = [key for key in keys if key not in chain.keys]
        chain.keys.update(zip(new, wrap_keys(self._namespace, new), strict=True))
        return [chain.keys[key] for key in keys]

    # vLLM asks

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._chain(req_context)
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        chain = self._chain(req_context)
        if key in chain.failed:
            return LookupResult.MISS
        asked = key in chain.asked
        chain.asked.add(key)
        match = self.store.lookup(self._wrap([key], chain), again=asked)
        if match.states[0] is Lookup.ASKING:
            return LookupResult.RETRY
        return LookupResult.HIT if match.blocks else LookupResult.MISS

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Remember that the request used these; the policies hear of it once, when it finishes."""
        self._wrap(keys, self._chain(req_context))

    def on_request_finished(self, req_context: ReqContext) -> None:
        chain = self._chain(req_context)
        positions = {key: req_context.get_offload_key_position(key) for key in chain.keys}
        ordered = sorted(chain.keys, key=lambda key: positions[key] or 0)
        self.store.touch([chain.keys[key] for key in ordered], request=chain.number)
        self.store.end_request(chain.number)

    # vLLM moves

    def _buffers(self, rows: list[int]) -> Buffers:
        assert self._rows is not None, "vLLM moves blocks after shutdown"
        return self._rows.rows(rows)

    def submit_store(self, job_metadata: TransferJob) -> None:
        chain = self._chain(job_metadata.req_context)
        keys, rows = list(job_metadata.keys), [int(row) for row in job_metadata.chunk_ids]
        wrapped = self._wrap(keys, chain)
        transfer = self.store.save(wrapped, self._buffers(rows), request=chain.number)
        self._jobs[job_metadata.job_id] = _Job(transfer, keys, rows, False, chain)

    def submit_load(self, job_metadata: TransferJob) -> None:
        chain = self._chain(job_metadata.req_context)
        keys, rows = list(job_metadata.keys), [int(row) for row in job_metadata.chunk_ids]
        wrapped = self._wrap(keys, chain)
        match = PrefixMatch(tuple(wrapped), len(wrapped), (Lookup.HIT,) * len(wrapped))
        transfer = self.store.load(match, self._buffers(rows))
        self._jobs[job_metadata.job_id] = _Job(transfer, keys, rows, True, chain)

    def get_finished_jobs(self) -> Iterator[JobResult]:
        self._quarantine.release()
        finished = [job_id for job_id, job in self._jobs.items() if self._is_over(job)]
        for job_id in finished:
            job = self._jobs.pop(job_id)
            outcomes = job.transfer.outcomes
            good = (Outcome.LOADED,) if job.is_load else (Outcome.SAVED, Outcome.PRESENT)
            moved = [key for key, end in zip(job.keys, outcomes, strict=True) if end in good]
            if job.is_load:
                job.chain.failed.update(set(job.keys).difference(moved))
            yield JobResult(
                job_id=job_id,
                success=len(moved) == len(job.keys),
                successful_keys=moved if job.is_load else None,
                transfer_bytes=len(moved) * self._row_bytes,
            )
            # vLLM has freed the rows of failed keys by now, before it asks for the next result.
            late = {
                row
                for row, end in zip(job.rows, outcomes, strict=True)
                if job.is_load and end is Outcome.LATE
            }
            if late and not job.transfer.released:
                self.store.telemetry.count("quarantined_rows_total", by=len(late))
                self._quarantine.hold(late, job.transfer)

    def _is_over(self, job: _Job) -> bool:
        """May vLLM hear of the end? A save may, unless another process may still take its rows for good."""
        if not job.transfer.done:
            return False
        withheld = job.is_load and self._quarantine.possible()
        harmless = not job.is_load and isinstance(self.store, BlockStore)
        return harmless or withheld or job.transfer.released

    def drain_jobs(self) -> None:
        for job in self._jobs.values():
            while not (job.transfer.wait(1.0) and job.transfer.wait_released(1.0)):
                pass
        self._quarantine.wait()

    def shutdown(self) -> None:
        if self._pages is not None:
            self._pages.stop()  # not waited for: it has a mapping of its own
            self._pages = None
        self.store.close()
        atexit.unregister(self.store.close)
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        self._jobs.clear()
        # vLLM releases its view next, which fails while somebody still holds it.
        self._rows = None


def _for_replica(config: Config, parallel: Any) -> Config:
    """Data-parallel replicas are processes of their own: each gets a folder, a share and a port."""
    count, index = parallel.data_parallel_size, parallel.data_parallel_index
    if count <= 1:
        return config
    if config.serve.connect:  # the server's tiers are one for all of them
        port = config.metrics.port and config.metrics.port + index
        return replace(config, metrics=replace(config.metrics, port=port))
    tiers: list[TierConfig] = []
    for tier in config.tiers:
        if not isinstance(tier, MemoryTierConfig | NvmeTierConfig):
            tiers.append(tier)  # one for all of them
            continue
        share = replace(tier, capacity_bytes=tier.capacity_bytes // count)
        if isinstance(share, NvmeTierConfig):
            share = replace(share, path=str(Path(share.path) / f"replica-{index}"))
        tiers.append(share)
    port = config.metrics.port and config.metrics.port + index
    return replace(config, tiers=tuple(tiers), metrics=replace(config.metrics, port=port))
