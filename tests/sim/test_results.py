"""Results on disk: what is written is read, whole or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import ConfigError
from kvstrata.sim.metrics import RunResult
from kvstrata.sim.results import (
    StoredRun,
    read_results,
    read_runs,
    with_gaps,
    write_results,
    write_runs,
)

counts = st.integers(0, 2**62)
ratios = st.floats(0, 1)
RUNS = st.builds(
    RunResult,
    trace=st.text(max_size=8),
    policy=st.sampled_from(["lru", "arc", "tinylfu_slru"]),
    params=st.dictionaries(
        st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=3
    ),
    capacity_fraction=ratios,
    capacity_blocks=counts,
    capacity_bytes=counts,
    accesses=counts,
    requests=counts,
    unique_blocks=counts,
    block_hit_ratio=ratios,
    usable_prefix_hit_ratio=ratios,
    mean_usable_prefix_hit_ratio=ratios,
    request_hit_ratio=ratios,
    byte_hit_ratio=ratios,
    amplification=st.none() | st.floats(0, 1e9),
    wasted_ratio=st.none() | ratios,
    admits=counts,
    evictions=counts,
    hit_bytes=counts,
    populated_bytes=counts,
    recompute_tokens_saved=st.none() | counts,
    seconds=ratios,
)


def run_of(policy: str = "lru", hits: float = 0.5, **changes: object) -> RunResult:
    run = RunResult(
        trace="a", policy=policy, params={}, capacity_fraction=0.01, capacity_blocks=10, capacity_bytes=640,
        accesses=100, requests=10, unique_blocks=1000, block_hit_ratio=hits, usable_prefix_hit_ratio=hits,
        mean_usable_prefix_hit_ratio=hits, request_hit_ratio=0.1, byte_hit_ratio=hits, amplification=1.0,
        wasted_ratio=0.5, admits=50, evictions=40, hit_bytes=3200, populated_bytes=3200,
        recompute_tokens_saved=None, seconds=0.1,
    )  # fmt: skip
    return dataclasses.replace(run, **changes)  # type: ignore[arg-type]


@given(st.lists(RUNS, max_size=5, unique_by=lambda run: repr((run.trace, run.policy, run.params))))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, runs: list[RunResult]) -> None:
    path = tmp_path_factory.mktemp("results") / "runs.parquet"
    write_results(path, runs)
    assert read_results(path) == runs
    assert read_results(path.parent) == runs
    assert [file.name for file in path.parent.iterdir()] == ["runs.parquet"]


def test_the_columns(tmp_path: Path) -> None:
    write_runs(tmp_path / "a.parquet", [StoredRun(run_of(params={"b": 2.0, "a": 0.5}), "d1", "1%")])
    row = pq.read_table(tmp_path / "a.parquet").to_pylist()[0]
    assert row["params"] == '{"a": 0.5, "b": 2}'
    assert (row["trace_digest"], row["capacity_asked"]) == ("d1", "1%")
    assert list(row)[:-2] == [field.name for field in dataclasses.fields(RunResult)]


def test_of_two_answers_the_later_counts(tmp_path: Path) -> None:
    write_runs(
        tmp_path / "b.parquet", [StoredRun(run_of(hits=0.1), "d", "1%"), StoredRun(run_of(), "d", "2%")]
    )
    write_runs(tmp_path / "a.parquet", [StoredRun(run_of(hits=0.2), "d", "1%")])
    found = {run.capacity_asked: run.result.block_hit_ratio for run in read_runs(tmp_path)}
    assert found == {"1%": 0.2, "2%": 0.5}


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.parquet"
    write_results(path, [run_of()])

    def fail(table: pa.Table, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("no space left")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="no space"):
        write_results(path, [run_of(hits=0.9)])
    monkeypatch.undo()
    assert read_results(path) == [run_of()]
    assert len(list(tmp_path.iterdir())) == 1


def test_the_gap_to_the_oracle() -> None:
    elsewhere = run_of(capacity_blocks=20, capacity_bytes=1280)
    runs = with_gaps([run_of(hits=0.5), run_of("belady", 0.75), run_of("arc", 0.25), elsewhere])
    assert [run.gap_to_belady for run in runs] == [0.25, 0.0, 0.5, None]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_results(tmp_path / "none.parquet")
    with pytest.raises(ConfigError, match="no results here"):
        read_results(tmp_path)
    (tmp_path / "text.parquet").write_text("not columns")
    with pytest.raises(ConfigError, match=r"text\.parquet: not a Parquet file"):
        read_results(tmp_path)
    pq.write_table(pa.table({"trace": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(ConfigError, match=r"text\.parquet: not results"):
        read_results(tmp_path)
