"""A real store that captures its own traffic: the trace is what was asked, and replays to the same hits."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_faults import mounted

from kvstrata.config import Config, MemoryTierConfig, NvmeTierConfig
from kvstrata.errors import ConfigError
from kvstrata.sim.capacity import resolve
from kvstrata.sim.replay import Workload, simulate
from kvstrata.store import BlockStore
from kvstrata.traces.capture import capture_files
from kvstrata.traces.capture_merge import merge_captures
from kvstrata.traces.parquet import ParquetTrace
from kvstrata.types import BlockLayout, Lookup, Namespace, Outcome, PrefixMatch
from live_kit import BLOCK_BYTES, DIGEST, FIELDS, SAMPLE, SLOT_BYTES, Chains, Hits, LiveReplay, read_chains
from store_kit import (
    LAYOUT,
    chain,
    check_quiet,
    content,
    eventually,
    finished,
    memory_tier,
    nvme_tier,
    save,
    store_config,
)
from store_kit import open_store as open_any


@pytest.fixture(scope="module")
def sample() -> Chains:
    return read_chains(SAMPLE)


def open_capturing(folder: Path, *tiers: MemoryTierConfig | NvmeTierConfig, **fields: Any) -> BlockStore:
    settings = store_config(
        io_threads=2, io_store_threads=1, batch_blocks=1_024, io_deadline_seconds=60, capture=str(folder),
        **fields,
    )  # fmt: skip
    return BlockStore(Config(settings, tiers), BlockLayout(BLOCK_BYTES, 512), Namespace(DIGEST, FIELDS))


def chains_of(trace: ParquetTrace) -> Chains:
    chains = []
    for batch in trace.batches():
        for start, end in zip(batch.starts[:-1], batch.starts[1:], strict=True):
            chains.append(batch.ids[start:end].tolist())
    return chains


def renumbered(chains: Chains) -> Chains:
    """Blocks numbered in order of first appearance."""
    numbers: dict[int, int] = {}
    return [[numbers.setdefault(block, len(numbers)) for block in one] for one in chains]


def assert_captured(folder: Path, asked: Chains) -> ParquetTrace:
    """The folder holds exactly these requests, in this order."""
    merged = merge_captures([folder], folder / "merged.parquet")
    assert merged.skipped == []
    trace = ParquetTrace(folder / "merged.parquet")
    assert chains_of(trace) == renumbered(asked)
    return trace


def test_memory_alone(sample: Chains, tmp_path: Path) -> None:
    blocks = 3_000
    with open_capturing(tmp_path, MemoryTierConfig(capacity_bytes=blocks * SLOT_BYTES)) as store:
        hits = Hits.of(LiveReplay(store).run(sample))
        telemetry = store.telemetry
    assert telemetry.value("capture_requests_total", "captured") == len(sample)
    trace = assert_captured(tmp_path, sample)
    assert (trace.head.block_bytes, trace.head.block_tokens) == (BLOCK_BYTES, 512)
    workload = Workload(trace)
    result = simulate(workload, "lru", resolve(f"{blocks}b", workload.footprint))
    assert result.block_hit_ratio * result.accesses == pytest.approx(sum(hits.blocks))
    assert result.usable_prefix_hit_ratio * result.accesses == pytest.approx(sum(hits.prefix))
    assert sum(hits.prefix) > 0


def test_memory_above_nvme(sample: Chains, tmp_path: Path) -> None:
    """Write-back is no request. Nvme holds all that memory does, so its hits are the store's."""
    memory = MemoryTierConfig(capacity_bytes=400 * SLOT_BYTES, promote=False)
    nvme = NvmeTierConfig(path=str(tmp_path / "nvme"), capacity_bytes=25 * 2**20)
    with open_capturing(tmp_path / "capture", memory, nvme, capture_seconds=0.05) as store:
        slots = store.tiers[1].table.slots
        hits = Hits.of(LiveReplay(store).run(sample))
    assert len(capture_files(tmp_path / "capture")) > 1
    workload = Workload(assert_captured(tmp_path / "capture", sample))
    result = simulate(workload, "lru", resolve(f"{slots}b", workload.footprint))
    assert result.block_hit_ratio * result.accesses == pytest.approx(sum(hits.blocks))
    assert result.usable_prefix_hit_ratio * result.accesses == pytest.approx(sum(hits.prefix))


def test_as_an_engine_asks(sample: Chains, tmp_path: Path) -> None:
    """Look-ups and polls, a load, saves of what was computed, a touch of the whole chain at the end.

    A save under a number touches what it names only, and the touch at the end is no second reference: the
    policies are told of each request once, and so is the trace.
    """
    blocks, asked, hits = 3_000, sample[:150], 0
    with open_capturing(tmp_path, MemoryTierConfig(capacity_bytes=blocks * SLOT_BYTES)) as store:
        replay = LiveReplay(store)
        for one in asked:
            keys = replay.chain_keys(one)
            match = store.lookup(keys)
            store.lookup(keys, again=True)
            if match.blocks:
                targets = [bytearray(BLOCK_BYTES) for _ in range(match.blocks)]
                part = PrefixMatch(match.keys[: match.blocks], match.blocks, (Lookup.HIT,) * match.blocks)
                assert set(finished(store.load(part, targets))) == {Outcome.LOADED}
            hits += match.blocks
            number = store.new_request()
            computed = list(range(match.blocks, len(one)))
            for half in (computed[: len(computed) // 2], computed[len(computed) // 2 :]):
                sources = [replay.payloads[one[n]] for n in half]
                finished(store.save([keys[n] for n in half], sources, request=number))
            store.touch(keys, request=number)
            store.end_request(number, input_tokens=512 * len(one), output_tokens=7)
    trace = assert_captured(tmp_path, asked)
    tokens = np.concatenate([batch.features["input_tokens"] for batch in trace.batches()])
    assert tokens.tolist() == [512 * len(one) for one in asked]
    workload = Workload(trace)
    result = simulate(workload, "lru", resolve(f"{blocks}b", workload.footprint))
    assert result.usable_prefix_hit_ratio * result.accesses == pytest.approx(hits)


def test_restarts_add_to_the_folder(sample: Chains, tmp_path: Path) -> None:
    for part in (sample[:20], sample[20:50]):
        with open_capturing(tmp_path, MemoryTierConfig(capacity_bytes=400 * SLOT_BYTES)) as store:
            LiveReplay(store).run(part)
    assert len(capture_files(tmp_path)) == 2
    assert_captured(tmp_path, sample[:50])


def test_off_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_any(memory_tier(8)) as store:
        save(store, chain(1, 4))
        store.touch(chain(1, 4))
        store.end_request(1)
        assert store.capture_held_bytes == 0
        assert not any(name.startswith("capture") for name in store.telemetry.counters())
    assert list(tmp_path.iterdir()) == []


def test_without_pyarrow_the_store_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kvstrata.traces.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvstrata\[traces\]'"):
        open_any(nvme_tier(tmp_path / "nvme", 2**21), capture=str(tmp_path / "capture"))
    monkeypatch.undo()
    open_any(nvme_tier(tmp_path / "nvme", 2**21)).close()  # the folder was not left locked


# What goes wrong

WRITER = """
import sys
from pathlib import Path
from test_store_capture import MemoryTierConfig, LiveReplay, open_capturing, read_chains, SAMPLE, SLOT_BYTES

store = open_capturing(
    Path(sys.argv[1]), MemoryTierConfig(capacity_bytes=400 * SLOT_BYTES), capture_seconds=0.2
)
replay = LiveReplay(store)
while True:
    for chain in read_chains(SAMPLE):
        replay.request(chain)
"""


@pytest.mark.parametrize("files", [1, 3])
def test_kill_9_leaves_readable_files(sample: Chains, tmp_path: Path, files: int) -> None:
    here = Path(__file__).parent
    path = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]"
    process = subprocess.Popen([sys.executable, "-c", f"{path}\n{WRITER}", str(tmp_path)])
    try:
        eventually(
            lambda: len(list(tmp_path.glob("*.parquet"))) >= files or process.poll() is not None,
            "nothing is captured",
        )
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    merged = merge_captures([tmp_path], tmp_path / "merged.parquet")
    assert merged.files >= files
    assert all(skipped.path.name.endswith(".part") for skipped in merged.skipped)
    found = chains_of(ParquetTrace(tmp_path / "merged.parquet"))
    asked = sample * (1 + len(found) // len(sample))
    assert found == renumbered(asked[: len(found)]), "the latest may be lost, nothing before it"


def test_a_full_disk_ends_the_capture_and_the_store_serves_on(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=48k", "tmpfs") as small:
        with open_any(memory_tier(64), capture=str(small / "capture"), capture_seconds=0.02) as store:
            number = 0
            while not store.telemetry.value("capture_errors_total", "ENOSPC"):
                number += 1
                assert number < 5_000, "the disk does not fill"
                assert save(store, chain(number, 6)) == [Outcome.SAVED] * 6
                time.sleep(0.002)
            for last in range(number + 1, number + 20):
                assert save(store, chain(last, 6)) == [Outcome.SAVED] * 6
                targets = [bytearray(LAYOUT.block_bytes) for _ in range(6)]
                outcomes = finished(store.load(store.lookup(chain(last, 6)), targets))
                assert outcomes == [Outcome.LOADED] * 6
                assert [bytes(target) for target in targets] == [content(key) for key in chain(last, 6)]
            check_quiet(store)
            assert store.capture_held_bytes == 0
            kinds = [event.kind for event in store.telemetry.events()]
            assert kinds.count("capture stopped") == 1
            captured = store.telemetry.value("capture_requests_total", "captured")
        merged = merge_captures([small / "capture"], tmp_path / "merged.parquet")
        assert merged.requests == captured > 0
        assert merged.skipped == []


def test_a_disk_that_hangs_does_not_hold_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving goes on, close gives up after its time, and what waits stays in bounds."""
    go = threading.Event()
    monkeypatch.setattr("kvstrata.traces.parquet.os.fsync", lambda descriptor: go.wait(60))
    store = open_any(
        memory_tier(64), capture=str(tmp_path), capture_seconds=0.02, capture_queue_bytes=2**20,
        close_seconds=0.5,
    )  # fmt: skip
    keys = chain(1, 50)
    try:
        for _ in range(2_000):
            store.touch(keys)
            assert store.capture_held_bytes <= 2**20
        assert save(store, keys) == [Outcome.SAVED] * 50
        assert store.telemetry.value("capture_requests_total", "dropped") > 500
        started = time.monotonic()
        store.close()
        assert time.monotonic() - started < 20
    finally:
        go.set()
