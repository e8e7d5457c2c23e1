"""The connector's parts alone, against vLLM's own classes."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvstrata.config import parse_config
from kvstrata.connectors.vllm.identity import weights_fingerprint
from kvstrata.errors import ConfigError
from kvstrata.transfer.handle import Transfer
from kvstrata.transfer.plan import Direction
from kvstrata.types import Outcome

pytest.importorskip("vllm", reason="vLLM is not installed (make setup does it)")

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    OffloadKey,
    ReqContext,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager

from kvstrata.connectors.vllm.cpu_spec import MemcpyWorker
from kvstrata.connectors.vllm.identity import engine_namespace
from kvstrata.connectors.vllm.quarantine import Quarantine
from kvstrata.connectors.vllm.tier import KVStrataTier, _for_replica
from store_kit import eventually

pytestmark = pytest.mark.vllm

WEIGHT_BYTES = 4 << 20


def make_weights(folder: Path, fill: int = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    rng = np.random.default_rng(fill)
    (folder / "model.safetensors").write_bytes(rng.bytes(WEIGHT_BYTES))
    return folder


def test_fingerprint_is_of_the_bytes_not_of_the_place(tmp_path: Path) -> None:
    a, b = make_weights(tmp_path / "a"), make_weights(tmp_path / "b")
    assert weights_fingerprint(str(a)) == weights_fingerprint(str(b))
    assert weights_fingerprint(str(a)) != weights_fingerprint(str(make_weights(tmp_path / "c", 1)))


@pytest.mark.parametrize("change", ["config", "head", "end", "size", "name"])
def test_fingerprint_changes_with_the_weights(tmp_path: Path, change: str) -> None:
    folder = make_weights(tmp_path / "a")
    before = weights_fingerprint(str(folder))
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if change == "config":
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    elif change == "head":
        data[100] ^= 1
    elif change == "end":
        data[-1] ^= 1
    elif change == "size":
        data += b"\0"
    weights.write_bytes(data)
    if change == "name":
        weights.rename(folder / "other.safetensors")
    assert weights_fingerprint(str(folder)) != before


def test_unknown_weights_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vllm\.model_revision"):
        weights_fingerprint("nobody/has-this-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"vllm\.model_revision"):
        weights_fingerprint(str(tmp_path / "empty"))


def test_a_name_is_told_apart_by_the_one_revision_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshots = tmp_path / "models--some--model" / "snapshots"
    first = make_weights(snapshots / "aaaa")
    assert weights_fingerprint("some/model") == weights_fingerprint(str(first))
    make_weights(snapshots / "bbbb", 1)
    with pytest.raises(ConfigError, match=r"2 revisions .* vllm\.model_revision"):
        weights_fingerprint("some/model")


OFFLOADING = OffloadingConfig(
    groups=(OffloadingGroupConfig(tokens_per_block=32, layer_names=("l0", "l1"), group_id=0),),
    worker_kv_bytes_per_block=4096,
    enable_kv_cache_events=False,
    extra_config={},
    engine_id="engine",
    model=OffloadingModelConfig(name="model", dtype="float16"),
    cache=OffloadingCacheConfig(tokens_per_hash=32, blocks_per_chunk=2),
    parallel=OffloadingParallelConfig(
        rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0,
        data_parallel_size=1, data_parallel_rank_local=None, is_parallelism_agnostic=False,
    ),
    kv_cache_layout="NHD",
)  # fmt: skip


def digest(
    config: OffloadingConfig = OFFLOADING, row: int = 8192, revision: str = "r1", salt: str = ""
) -> bytes:
    return engine_namespace(config, row, revision, salt).digest


def test_every_field_that_changes_the_bytes_changes_the_namespace() -> None:
    group = OFFLOADING.groups[0]
    others = [
        digest(replace(OFFLOADING, model=replace(OFFLOADING.model, dtype="bfloat16"))),
        digest(replace(OFFLOADING, cache=replace(OFFLOADING.cache, tokens_per_hash=16))),
        digest(replace(OFFLOADING, cache=replace(OFFLOADING.cache, blocks_per_chunk=4))),
        digest(replace(OFFLOADING, groups=(replace(group, tokens_per_block=16),))),
        digest(replace(OFFLOADING, groups=(replace(group, layer_names=("l0",)),))),
        digest(replace(OFFLOADING, groups=(group, replace(group, group_id=1)))),
        *(
            digest(replace(OFFLOADING, parallel=replace(OFFLOADING.parallel, **{name: 2})))
            for name in ("rank", "world_size", "tp_size", "pp_size", "pcp_size", "dcp_size")
        ),
        digest(replace(OFFLOADING, replicated_layout=True)),
        digest(replace(OFFLOADING, canonical_layout=True)),
        digest(replace(OFFLOADING, kv_cache_layout="HND")),
        digest(row=16384),
        digest(revision="r2"),
        digest(salt="tenant"),
    ]
    assert len({digest(), *others}) == 1 + len(others)


def test_what_does_not_change_the_bytes_leaves_the_namespace_alone() -> None:
    elsewhere = replace(OFFLOADING, model=replace(OFFLOADING.model, name="/other/place"))
    assert digest(elsewhere) == digest(replace(OFFLOADING, engine_id="second")) == digest()


def test_replicas_get_a_folder_a_share_and_a_port_of_their_own() -> None:
    config = parse_config(
        {
            "metrics": {"port": 9000},
            "tier": [
                {"type": "memory", "capacity_bytes": 1000},
                {"type": "nvme", "path": "/data", "capacity_bytes": "1GiB"},
            ],
        }
    )
    one = SimpleNamespace(data_parallel_size=1, data_parallel_index=0)
    assert _for_replica(config, one) is config
    second = _for_replica(config, SimpleNamespace(data_parallel_size=4, data_parallel_index=2))
    assert second.metrics.port == 9002
    assert [tier.capacity_bytes for tier in second.tiers] == [250, 2**28]
    assert second.tiers[1].path == "/data/replica-2"


class Rig:
    """A MemcpyWorker over vLLM's real shared region: two tensors, several blocks per chunk."""

    PAGES = (128, 64)
    BLOCKS, CHUNKS, BLOCKS_PER_CHUNK = 12, 6, 3

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.device = [
            torch.from_numpy(rng.integers(-128, 127, (self.BLOCKS, page), dtype=np.int8))
            for page in self.PAGES
        ]
        row = -(-sum(self.PAGES) * self.BLOCKS_PER_CHUNK // 4096) * 4096
        self.region = SharedOffloadRegion(
            engine_id=f"kvstrata-test-{uuid.uuid4().hex}", num_chunks=self.CHUNKS, rank=0,
            kv_bytes_per_chunk=row, cpu_page_size=sum(self.PAGES) * self.BLOCKS_PER_CHUNK,
        )  # fmt: skip
        caches = CanonicalKVCaches(
            [CanonicalKVCacheTensor(t, p) for t, p in zip(self.device, self.PAGES, strict=True)],
            [[CanonicalKVCacheRef(0, 128), CanonicalKVCacheRef(1, 64)]],
        )
        self.worker = MemcpyWorker(caches, self.BLOCKS_PER_CHUNK, self.region)


def test_memcpy_worker_moves_pages_to_their_place_and_back() -> None:
    rig = Rig()
    original = [tensor.clone() for tensor in rig.device]
    # Seven blocks that begin at the second block of a chunk: three chunks, the first one partly.
    blocks, chunks, index = [4, 0, 7, 2, 9, 11, 5], [5, 1, 3], 1
    spec = GPULoadStoreSpec(blocks, group_sizes=[len(blocks)], block_indices=[index])
    try:
        assert rig.worker.submit_store(1, spec, CPULoadStoreSpec(chunks))
        stored = rig.worker.get_finished()
        assert [(result.job_id, result.success) for result in stored] == [(1, True)]
        assert stored[0].transfer_size == len(blocks) * sum(rig.PAGES)
        for place, block in enumerate(blocks):
            chunk, part = divmod(index + place, rig.BLOCKS_PER_CHUNK)
            row = np.asarray(rig.region.create_kv_memoryview())[chunks[chunk]]
            assert np.array_equal(row[part * 128 : part * 128 + 128], original[0][block].numpy())
            second = 128 * rig.BLOCKS_PER_CHUNK + part * 64
            assert np.array_equal(row[second : second + 64], original[1][block].numpy())
            del row
        for tensor in rig.device:
            tensor.zero_()
        # vLLM 0.33 passes `expedited` too.
        assert rig.worker.submit_load(2, CPULoadStoreSpec(chunks), spec, expedited=True)
        assert [result.job_id for result in rig.worker.get_finished()] == [2]
        for tensor, before in zip(rig.device, original, strict=True):
            untouched = sorted(set(range(rig.BLOCKS)) - set(blocks))
            assert torch.equal(tensor[blocks], before[blocks])
            assert not tensor[untouched].any()
    finally:
        rig.worker.shutdown()


def test_quarantined_rows_are_not_handed_out_until_their_read_has_ended() -> None:
    region = SharedOffloadRegion(
        engine_id=f"kvstrata-test-{uuid.uuid4().hex}", num_chunks=8, rank=None,
        kv_bytes_per_chunk=4096, cpu_page_size=4096,
    )  # fmt: skip
    primary = CPUPrimaryTierOffloadingManager(num_chunks=8, mmap_region=region)
    spec = SimpleNamespace(get_manager=lambda: SimpleNamespace(primary_tier=primary))
    quarantine = Quarantine(spec)
    context = ReqContext(req_id="request")
    try:
        assert quarantine.possible()
        keys = [OffloadKey(b"key-%d" % n + bytes(4)) for n in range(5)]
        rows = primary.prepare_write(keys, context).store_spec.block_ids.tolist()
        late = {rows[1], rows[3]}
        transfer = Transfer(Direction.LOAD, 1, deadline_seconds=0.05)
        transfer.hold(1)  # a read that is in the kernel when the deadline passes
        transfer.wait()
        assert transfer.done and transfer.outcomes == [Outcome.LATE] and not transfer.released
        primary.complete_write(keys, context, False)  # vLLM hears of the failure and frees the rows
        quarantine.hold(late, transfer)
        others = [OffloadKey(b"other-%d" % n + bytes(4)) for n in range(6)]
        given = primary.prepare_write(others, context).store_spec.block_ids.tolist()
        assert sorted(given) == sorted(set(range(8)) - late)
        assert primary.prepare_write([OffloadKey(b"more" + bytes(4))], context) is None
        quarantine.release()
        assert primary.prepare_write([OffloadKey(b"more" + bytes(4))], context) is None
        assert not transfer.finish(np.array([0]), [Outcome.LOADED]).any()
        quarantine.release()
        more = [OffloadKey(b"more-%d" % n + bytes(4)) for n in range(2)]
        assert set(primary.prepare_write(more, context).store_spec.block_ids.tolist()) == late
    finally:
        primary.shutdown()


@pytest.mark.parametrize("wanted", [True, False])
def test_the_rows_of_an_embedded_tier_become_huge_pages_unless_that_is_switched_off(
    tmp_path: Path, wanted: bool
) -> None:
    row, rows = 1 << 20, 8
    region = SharedOffloadRegion(
        engine_id=f"kvstrata-test-{uuid.uuid4().hex}", num_chunks=rows, rank=None,
        kv_bytes_per_chunk=row, cpu_page_size=row,
    )  # fmt: skip
    primary = CPUPrimaryTierOffloadingManager(num_chunks=rows, mmap_region=region)
    view = primary.get_kv_memoryview()
    bytes_of_rows = np.asarray(view)
    bytes_of_rows[:] = np.random.default_rng(5).integers(-128, 127, bytes_of_rows.shape, dtype=np.int8)
    before = bytes_of_rows.tobytes()
    del bytes_of_rows
    settings = {
        "vllm": {"model_revision": "r1", "huge_pages": wanted},
        "tier": [{"type": "nvme", "path": str(tmp_path / "nvme"), "capacity_bytes": "64MiB"}],
    }
    spec = SimpleNamespace(config=OFFLOADING, get_manager=lambda: SimpleNamespace(primary_tier=primary))
    tier = KVStrataTier(spec, view, "KVStrataTier", settings=settings)
    store = tier.store
    try:
        if wanted:
            eventually(
                lambda: any("huge pages" in event.kind for event in store.telemetry.events()),
                "nothing was tried",
            )
        if "no huge pages" in [event.kind for event in store.telemetry.events()]:
            pytest.skip("this system makes no huge pages of shared memory")
        assert store.telemetry.value("huge_page_bytes_total") == rows * row * wanted
        assert np.asarray(view).tobytes() == before
    finally:
        tier.shutdown()
        primary.shutdown()  # BufferError while somebody still held its view
