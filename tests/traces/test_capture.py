"""The recorder alone, and the merge of what recorders leave: chains, bounds, damage, several processes."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_kit import assert_same

from kvstrata.config import MIB, StoreConfig
from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.hashing import chain_keys, namespace_digest
from kvstrata.telemetry import Telemetry
from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.capture import FILE_NAME, Capture, capture_files
from kvstrata.traces.capture_merge import Merged, merge_captures
from kvstrata.traces.open import open_trace
from kvstrata.traces.parquet import ParquetTrace, ParquetWriter
from kvstrata.traces.trace import Batch, Trace, TraceSource
from kvstrata.types import BlockKey, BlockLayout, Namespace

LAYOUT = BlockLayout(block_bytes=4096, block_tokens=16)
NAMESPACE = Namespace(namespace_digest({"model": "capture"}))
WAIT_SECONDS = 60.0


def chain(number: int, length: int) -> list[BlockKey]:
    return chain_keys(NAMESPACE.digest, [number] * length, 1)


def names(keys: Sequence[BlockKey]) -> list[int]:
    return [int.from_bytes(key[:8], "little", signed=True) for key in keys]


def eventually(what: Callable[[], bool], message: str) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not what():
        assert time.monotonic() < until, message
        time.sleep(0.005)


class Rig:
    """A started recorder on a folder."""

    def __init__(self, folder: Path, layout: BlockLayout = LAYOUT, **fields: Any) -> None:
        self.folder = folder
        self.telemetry = Telemetry()
        fields = {"capture_seconds": 1000.0, **fields}
        self.capture = Capture(
            StoreConfig(capture=str(folder), **fields), layout, NAMESPACE, self.telemetry
        )
        self.capture.start()
        self._numbers = itertools.count(1000)

    def ask(self, keys: list[BlockKey]) -> None:
        self.capture.record(next(self._numbers), keys, ended=True)

    def count(self, result: str) -> int:
        return self.telemetry.value("capture_requests_total", result)

    def close(self) -> None:
        assert self.capture.close(WAIT_SECONDS)
        if self.capture.held_bytes:
            raise AssertionError(f"{self.capture.held_bytes} bytes were never let go")

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in capture_files(self.folder))


def raw_chains(folder: Path) -> list[list[int]]:
    """What the folder's files hold, file by file: 64 bits of every key."""
    import pyarrow.parquet as pq

    chains = []
    for path in capture_files(folder):
        rows = pq.read_table(path, columns=["request", "block"]).to_pydict()
        for _, group in itertools.groupby(zip(*rows.values(), strict=True), key=lambda row: row[0]):
            chains.append([block for _, block in group])
    return chains


def whole_of(source: TraceSource) -> Batch:
    """All batches of a small trace as one."""
    batches = list(source.batches())
    lengths = np.concatenate([np.diff(batch.starts) for batch in batches])

    def joined(name: str) -> Any:
        return np.concatenate([getattr(batch, name) for batch in batches])

    names = ("ids", "parents", "depths", "sizes", "time_s", "session", "tenant")
    features = {
        name: np.concatenate([batch.features[name] for batch in batches]) for name in batches[0].features
    }
    return Batch(0, np.concatenate([[0], np.cumsum(lengths)]), *map(joined, names), features)


# One recorder


def test_a_file_holds_what_was_asked(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "in" / "here")
    before = time.time()
    asked = [chain(1, 3), chain(2, 1), chain(1, 5), chain(1, 2)]
    for keys in asked:
        rig.ask(keys)
    rig.close()
    after = time.time()
    assert raw_chains(rig.folder) == [names(keys) for keys in asked]
    assert rig.count("captured") == 4 and rig.count("dropped") == 0
    (path,) = capture_files(rig.folder)
    assert rig.telemetry.value("capture_bytes_total") == path.stat().st_size
    source = open_trace(path)
    head = source.head
    assert (head.source_format, head.requests, head.accesses, head.unique) == ("capture", 4, 11, 6)
    assert (head.block_bytes, head.block_tokens) == (4096, 16)
    assert head.labels == {"tenant": (NAMESPACE.digest[:8].hex(),)}
    batch = whole_of(source)
    assert batch.ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5, 0, 1]
    assert batch.parents.tolist() == [-1, 0, 1, -1, -1, 0, 1, 2, 4, -1, 0]
    assert batch.depths.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1]
    assert (batch.sizes == 4096).all() and (batch.tenant == 0).all() and (batch.session == -1).all()
    assert (np.diff(batch.time_s) >= 0).all()
    merged = merge_captures([rig.folder], tmp_path / "all.parquet")
    assert before - 1 < merged.first_unix_s <= merged.last_unix_s < after + 1


def test_calls_of_one_request_are_one_record(tmp_path: Path) -> None:
    """Saves of parts, in any order, and a touch of the whole at the end, as an engine does it."""
    rig = Rig(tmp_path)
    whole, other = chain(1, 9), chain(2, 4)
    rig.capture.record(1, whole[:4], ended=False)
    rig.capture.record(2, other, ended=False)
    rig.capture.record(1, whole[6:8], ended=False)
    rig.capture.record(1, whole[4:6], ended=False)
    rig.capture.record(1, whole, ended=False)
    rig.capture.end(2, input_tokens=70)
    rig.capture.end(1, input_tokens=100, output_tokens=44)
    rig.capture.record(1, whole[8:], ended=False)  # too late: the request has ended
    rig.capture.end(1)
    rig.capture.end(99)  # never heard of
    rig.close()
    assert raw_chains(tmp_path) == [names(whole), names(other)]
    (path,) = capture_files(tmp_path)
    batch = whole_of(open_trace(path))
    assert batch.features["input_tokens"].tolist() == [100, 70]
    assert batch.features["output_tokens"].tolist() == [44, -1]
    assert rig.count("captured") == 2


def test_a_chain_that_grows_is_appended_to(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    whole = chain(1, 6)
    for start in (0, 2, 4):
        rig.capture.record(1, whole[start : start + 2], ended=False)
    rig.close()  # what did not end ends here
    assert raw_chains(tmp_path) == [names(whole)]


def test_the_time_is_that_of_the_first_call(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.capture.record(1, chain(1, 2), ended=False)
    rig.ask(chain(7, 1))
    rig.capture.record(1, chain(1, 3), ended=True)
    rig.close()
    assert raw_chains(tmp_path) == [names(chain(1, 3)), names(chain(7, 1))]


def test_a_block_twice_in_a_chain_counts_once(tmp_path: Path) -> None:
    """As in the tables: the second time is no other use."""
    rig = Rig(tmp_path)
    keys = chain(1, 3)
    rig.ask([keys[0], keys[1], keys[0], keys[2], keys[1]])
    rig.close()
    assert raw_chains(tmp_path) == [names(keys)]


def test_parts_of_chains_make_a_sound_trace(tmp_path: Path) -> None:
    """Parents must come before their children, whatever parts a caller asks for."""
    rig = Rig(tmp_path)
    keys = chain(1, 6)
    for part in (keys[3:], keys[1:2] + keys[4:], keys, keys[:1]):
        rig.ask(part)
    rig.close()
    (path,) = capture_files(tmp_path)
    batch = whole_of(open_trace(path))
    assert batch.ids.tolist() == [0, 1, 2, 3, 1, 2, 4, 3, 5, 0, 1, 2, 4]
    assert merge_captures([tmp_path], tmp_path / "all.parquet").unique == 6
    batch = whole_of(open_trace(tmp_path / "all.parquet"))
    assert batch.ids.tolist() == [0, 1, 2, 3, 1, 2, 4, 3, 5, 0, 1, 2, 4]


def test_requests_without_blocks_and_odd_keys_are_no_harm(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.ask([])
    rig.ask([BlockKey(b"short")])
    rig.close()
    assert capture_files(tmp_path) == []
    assert rig.count("captured") == 0 and rig.count("dropped") == 1


def test_a_file_is_written_while_requests_go_on(tmp_path: Path) -> None:
    rig = Rig(tmp_path, capture_seconds=0.02)
    for number in range(3):
        rig.ask(chain(number, 4))
        eventually(lambda n=number: rig.count("captured") == n + 1, "a record was not written")
    assert len(capture_files(tmp_path)) == 3
    assert raw_chains(tmp_path) == [names(chain(number, 4)) for number in range(3)]
    rig.close()
    assert len(capture_files(tmp_path)) == 3


def test_an_idle_request_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstrata.traces.capture.IDLE_SECONDS", 0.05)
    rig = Rig(tmp_path, capture_seconds=0.02)
    rig.capture.record(1, chain(1, 3), ended=False)
    eventually(lambda: rig.count("captured") == 1, "an idle request was kept")
    rig.capture.record(1, chain(1, 4), ended=True)
    rig.close()
    assert raw_chains(tmp_path) == [names(chain(1, 3))], "one request makes one record"


def test_without_pyarrow_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "kvstrata.traces.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvstrata\[traces\]'"):
        Capture(StoreConfig(capture=str(tmp_path)), LAYOUT, NAMESPACE, Telemetry())


# Bounds


def test_the_bound_on_disk_holds_at_every_moment(tmp_path: Path) -> None:
    """The oldest files go; a second recorder on the folder counts what the first has left."""
    rng = np.random.default_rng(0)
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            total = 0
            for entry in os.scandir(tmp_path):
                try:
                    total += entry.stat().st_size
                except FileNotFoundError:
                    continue
            most[0] = max(most[0], total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    removed = 0
    last: list[list[int]] = []
    for _ in range(2):
        rig = Rig(tmp_path, capture_bytes=MIB, capture_seconds=0.05)
        for _ in range(120):
            keys = [BlockKey(rng.bytes(32)) for _ in range(1000)]
            last = [*last[-20:], names(keys)]
            rig.ask(keys)
        rig.close()
        assert rig.count("captured") == 120
        removed += rig.telemetry.value("capture_removed_total")
    stop.set()
    watcher.join()
    assert removed > 0
    assert most[0] <= MIB
    assert rig.size > MIB // 2, "the room is used"
    kept = raw_chains(tmp_path)
    assert kept[-len(last) :] == last, "the latest are kept"


def test_a_request_larger_than_the_bound_is_dropped(tmp_path: Path) -> None:
    rig = Rig(tmp_path, capture_bytes=MIB)
    rng = np.random.default_rng(0)
    rig.ask([BlockKey(rng.bytes(32)) for _ in range(20_000)])
    rig.ask(chain(1, 3))
    rig.close()
    assert rig.count("dropped") == 1 and rig.count("captured") == 1
    assert raw_chains(tmp_path) == [names(chain(1, 3))]


def hold_writes(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until the event is set a write to the disk hangs."""
    go = threading.Event()
    sync = os.fsync

    def held(descriptor: int) -> None:
        assert go.wait(WAIT_SECONDS)
        sync(descriptor)

    monkeypatch.setattr("kvstrata.traces.parquet.os.fsync", held)
    return go


def test_a_full_memory_drops_whole_requests_and_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = hold_writes(monkeypatch)
    rig = Rig(tmp_path, capture_queue_bytes=MIB, capture_seconds=0.01)
    rig.capture.record(1, chain(1, 100), ended=False)
    long = chain(2, 1000)
    for number in range(2, 302):
        rig.capture.record(number, long, ended=True)
        assert rig.capture.held_bytes <= MIB
    rig.capture.record(1, chain(1, 200), ended=True)  # a part of it found no room
    dropped = rig.count("dropped")
    assert dropped > 150
    go.set()
    eventually(lambda: rig.capture.held_bytes == 0, "memory was not let go")
    assert rig.count("captured") + dropped == 301
    rig.capture.record(1, chain(1, 300), ended=True)  # there is room again, but not for half a request
    rig.capture.record(400, chain(6, 2), ended=True)
    rig.close()
    chains = raw_chains(tmp_path)
    assert len(chains) == 302 - dropped and chains[-1] == names(chain(6, 2))
    assert set(map(tuple, chains[:-1])) == {tuple(names(long))}, "never a part of a request"
    assert rig.telemetry.value("capture_errors_total") == 0


def test_short_requests_do_not_fill_the_memory_for_long(tmp_path: Path) -> None:
    """What is ready is written early when memory runs low, and requests that never end are ended."""
    rig = Rig(tmp_path, capture_queue_bytes=MIB)
    keys = chain(1, 1)
    for number in range(1, 6001):
        while rig.capture.held_bytes > MIB * 0.9:
            time.sleep(0.001)
        rig.capture.record(number, keys, ended=number % 2 == 0)
    rig.close()
    assert rig.count("captured") == 6000 and rig.count("dropped") == 0
    assert len(capture_files(tmp_path)) > 1


# Errors


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_an_error_ends_the_capture_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    rig = Rig(tmp_path, capture_seconds=0.02)
    rig.ask(chain(1, 3))
    eventually(lambda: rig.count("captured") == 1, "nothing was written")
    with monkeypatch.context() as patch:
        patch.setattr("kvstrata.traces.parquet.os.fsync", fail)
        rig.ask(chain(2, 3))
        eventually(lambda: not rig.capture.running, "it did not stop")
    for number in range(3, 50):
        rig.ask(chain(number, 3))
    eventually(lambda: rig.count("dropped") == 1, "what was lost is counted")
    rig.close()
    assert rig.telemetry.value("capture_errors_total", errno.errorcode[code]) == 1
    assert [event.kind for event in rig.telemetry.events()] == ["capture stopped"]
    assert raw_chains(tmp_path) == [names(chain(1, 3))]
    assert all(not path.name.endswith(".part") for path in tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rig = Rig(tmp_path / "file" / "folder")
    eventually(lambda: not rig.capture.running, "it did not stop")
    rig.ask(chain(1, 3))
    rig.close()
    assert rig.telemetry.value("capture_errors_total", "ENOTDIR") == 1
    assert rig.count("captured") == 0


def test_a_folder_that_is_removed_is_made_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "folder", capture_seconds=0.02)
    rig.ask(chain(1, 3))
    eventually(lambda: rig.count("captured") == 1, "nothing was written")
    (old,) = capture_files(rig.folder)
    old.unlink()
    rig.folder.rmdir()
    rig.ask(chain(2, 3))
    rig.close()
    assert raw_chains(rig.folder) == [names(chain(2, 3))]


# Merging


def write_file(path: Path, rows: list[tuple[float, list[int]]], tenant: str = "aa", size: int = 10) -> Path:
    """A file as a recorder writes it, of (unix seconds, 64-bit names)."""
    rows = sorted(rows, key=lambda row: row[0])
    lengths = [len(blocks) for _, blocks in rows]
    blocks = np.array([block for _, blocks in rows for block in blocks], np.int64)
    _, first, inverse = np.unique(blocks, return_index=True, return_inverse=True)
    place = np.concatenate([np.arange(length) for length in lengths])
    before = np.concatenate([[0], blocks[:-1]])
    with ParquetWriter(
        path, name=tenant, source_format="capture", block_tokens=16, block_bytes=size
    ) as writer:
        writer.append(
            starts=np.concatenate([[0], np.cumsum(lengths)]),
            blocks=blocks,
            parents=before[first][inverse],
            depths=place[first][inverse],
            sizes=np.full(len(blocks), size),
            time_s=np.array([time_s for time_s, _ in rows]),
            session=np.full(len(rows), -1),
            tenant=np.zeros(len(rows), np.int32),
            features={name: np.full(len(rows), -1) for name in ("input_tokens", "output_tokens")},
            labels={"tenant": (tenant,)},
        )
    return path


def named(folder: Path, number: int) -> Path:
    name = f"capture-{1_700_000_000_000 + number}-{'0123abcd'}.parquet"
    assert FILE_NAME.fullmatch(name)
    return folder / name


def reference(rows: list[tuple[float, list[int]]]) -> Trace:
    builder = TraceBuilder("capture", "merged-capture", 16, 10)
    for time_s, blocks in rows:
        builder.add(time_s, blocks, tenant="aa", input_tokens=None, output_tokens=None)
    trace = builder.build()
    features = {name: trace.features[name] for name in ("input_tokens", "output_tokens")}
    head = dataclasses.replace(trace.head, labels={"tenant": ("aa",)})
    return dataclasses.replace(trace, head=head, features=features)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), files=st.integers(1, 6), batch=st.sampled_from([1, 50, 1 << 20]))
def test_a_merge_is_what_one_recorder_would_have_written(
    tmp_path_factory: pytest.TempPathFactory, seed: int, files: int, batch: int
) -> None:
    """Files that overlap in time, with parts of chains in them, against the builder of all readers."""
    folder = tmp_path_factory.mktemp("merge")
    rng = np.random.default_rng(seed)
    trees = rng.integers(-(2**63), 2**63, (5, 30))
    everything: list[tuple[float, list[int]]] = []
    for number in range(files):
        rows = []
        for _ in range(rng.integers(1, 20)):
            start = int(rng.integers(0, 10)) if rng.random() < 0.2 else 0
            end = start + int(rng.integers(1, 20))
            rows.append(
                (float(number * 10 + rng.uniform(0, 25)), trees[rng.integers(5)][start:end].tolist())
            )
        write_file(named(folder, number), rows)
        everything += sorted(rows, key=lambda row: row[0])
    output = folder / "all.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvstrata.traces.capture_merge.BATCH_ACCESSES", batch)
        merged = merge_captures([folder], output)
    trace = reference(everything)
    assert (merged.files, merged.skipped, merged.requests) == (files, [], len(everything))
    assert (merged.accesses, merged.unique) == (trace.head.accesses, trace.head.unique)
    times = [time_s for time_s, _ in everything]
    assert (merged.first_unix_s, merged.last_unix_s) == (min(times), max(times))
    found = ParquetTrace(output)
    assert found.head.source_format == "merged-capture"
    assert_same(trace, found, 64)


def merge(folder: Path, output: str = "all.parquet") -> Merged:
    return merge_captures([folder], folder / output)


def reasons(merged: Merged) -> dict[str, str]:
    return {skipped.path.name: skipped.why for skipped in merged.skipped}


def test_what_cannot_be_read_is_named_and_left_out(tmp_path: Path) -> None:
    rows = [(float(n), [n, n + 100]) for n in range(2000)]
    files = [write_file(named(tmp_path, n), [(t + n * 5000, b) for t, b in rows]) for n in range(6)]
    good = files[0].read_bytes()
    files[1].write_bytes(good[: len(good) // 2])
    spoilt = bytearray(files[2].read_bytes())
    spoilt[200:260] = bytes(60)
    files[2].write_bytes(spoilt)
    files[3].write_bytes(b"")
    files[4].rename(tmp_path / f"{files[4].name}.part")
    (tmp_path / "notes.txt").write_text("not looked at")
    merged = merge(tmp_path)
    assert merged.files == 2 and merged.requests == 4000
    why = reasons(merged)
    assert set(why) == {files[1].name, files[2].name, files[3].name, f"{files[4].name}.part"}
    assert "not complete" in why[f"{files[4].name}.part"]
    assert all(str(tmp_path) not in text and "\n" not in text for text in why.values())
    assert ParquetTrace(tmp_path / "all.parquet").head.requests == 4000


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_are_noticed_or_no_harm(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    write_file(named(tmp_path, 0), [(float(n), [n, n + 1]) for n in range(1000)])
    path = write_file(named(tmp_path, 1), [(float(n), [n, n + 1]) for n in range(1000)])
    good = path.read_bytes()
    for _ in range(25):
        data = bytearray(good)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        merged = merge(tmp_path)
        assert merged.requests == 1000 * merged.files and merged.files + len(merged.skipped) == 2


def test_other_traces_are_refused_and_folders_without_any_too(tmp_path: Path) -> None:
    with pytest.raises(TraceFormatError, match="no capture file can be read; a store with `capture`"):
        merge(tmp_path)
    with pytest.raises(FileNotFoundError):
        merge_captures([tmp_path / "none"], tmp_path / "all.parquet")
    write_file(named(tmp_path, 0), [(1.0, [5])])
    merge(tmp_path)
    with pytest.raises(TraceFormatError, match="not one that a store captured"):
        merge_captures([tmp_path / "all.parquet"], tmp_path / "again.parquet")
    assert not (tmp_path / "again.parquet").exists()
    assert not list(tmp_path.glob("*.part"))


def test_a_file_given_twice_counts_once(tmp_path: Path) -> None:
    path = write_file(named(tmp_path, 0), [(1.0, [5, 6])])
    merged = merge_captures([tmp_path, path, tmp_path / "." / path.name], tmp_path / "all.parquet")
    assert merged.files == 1 and merged.requests == 1


def test_sizes_and_tenants_of_several_stores(tmp_path: Path) -> None:
    write_file(named(tmp_path, 0), [(1.0, [1, 2]), (3.0, [1])], tenant="aa", size=10)
    write_file(named(tmp_path, 1), [(2.0, [7])], tenant="bb", size=20)
    merged = merge(tmp_path)
    assert merged.tenants == ["aa", "bb"]
    trace = ParquetTrace(tmp_path / "all.parquet")
    assert trace.head.block_bytes == 0 and trace.head.block_tokens == 16
    assert trace.head.labels["tenant"] == ("aa", "bb")
    batch = whole_of(trace)
    assert batch.tenant.tolist() == [0, 1, 0] and batch.sizes.tolist() == [10, 10, 20, 10]


def test_two_recorders_at_once(tmp_path: Path) -> None:
    rigs = [Rig(tmp_path, capture_seconds=0.01) for _ in range(2)]
    asked = []
    for number in range(60):
        keys = chain(number % 7, 1 + number % 5)
        rigs[number % 2].ask(keys)
        asked.append(names(keys))
        if number % 20 == 0:
            time.sleep(0.02)
    for rig in rigs:
        rig.close()
    merged = merge(tmp_path)
    assert merged.requests == 60 and merged.files == len(capture_files(tmp_path)) > 2
    batch = whole_of(ParquetTrace(tmp_path / "all.parquet"))
    lengths = np.diff(batch.starts).tolist()
    assert sorted(lengths) == sorted(map(len, asked))
    assert (np.diff(batch.time_s) >= 0).all()
