"""Grids: every cell once, stored at once, here or in workers."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
from pathlib import Path

import joblib
import numpy as np
import pytest
from sim_kit import random_tree_chains, trace_of

from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.sim import grid as grid_module
from kvstrata.sim.grid import Variant, make_cells, run_grid, split
from kvstrata.sim.metrics import RunResult
from kvstrata.sim.replay import simulate
from kvstrata.sim.results import read_results, read_runs
from kvstrata.sim.specs import TraceSpec, short_name, trace_specs, workload_of
from kvstrata.traces.open import OpenOptions
from kvstrata.traces.parquet import write_parquet

VARIANTS: list[Variant] = [("lru", {}), ("arc", {}), ("belady", {}), ("twoq", {"kin": 0.5})]
CAPACITIES = ["5%", "20b", "2KiB"]


@pytest.fixture
def specs(tmp_path: Path) -> list[TraceSpec]:
    """Two small traces of ours."""
    for seed in (1, 2):
        chains = random_tree_chains(np.random.default_rng(seed), 150, 300)
        write_parquet(trace_of(chains, block_bytes=64), tmp_path / f"t{seed}.parquet")
    return trace_specs([tmp_path / "t1.parquet", tmp_path / "t2.parquet"])


def untimed(results: tuple[RunResult, ...] | list[RunResult]) -> list[RunResult]:
    return [dataclasses.replace(run, seconds=0.0) for run in results]


def in_order(results: list[RunResult]) -> list[RunResult]:
    return sorted(untimed(results), key=repr)


def hand_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "LOOK_SECONDS", -1.0)
    monkeypatch.setattr(grid_module, "START_SECONDS", -1e9)


def test_every_cell_in_order(specs: list[TraceSpec]) -> None:
    seen: list[tuple[int, int]] = []
    grid = run_grid(specs, VARIANTS, CAPACITIES, jobs=1, progress=lambda *pair: seen.append(pair))
    assert (grid.ran, grid.reused, len(grid.results)) == (24, 0, 24)
    wanted = itertools.product(["t1", "t2"], ["lru", "arc", "belady", "twoq"])
    assert [(run.trace, run.policy) for run in grid.results[::3]] == list(wanted)
    assert grid.results[0].capacity_fraction == 0.05
    assert {run.capacity_blocks for run in grid.results[2::3]} == {32}
    assert all(run.gap_to_belady is not None and run.gap_to_belady >= -0.01 for run in grid.results)
    assert seen[0] == (0, 24) and seen[-1] == (24, 24) and seen == sorted(seen)
    first = grid.cells[0]
    workload = workload_of(specs[0])
    alone = simulate(workload, "lru", grid_module.resolve(first.capacity, workload.footprint))
    assert untimed([dataclasses.replace(grid.results[0], gap_to_belady=None)]) == untimed([alone])


def test_a_cell_that_is_asked_for_twice_is_one(specs: list[TraceSpec]) -> None:
    cells = make_cells(specs[:1], [("lru", {}), ("lru", {})], ["1%", "1.0 %", "64KiB", "65536B"])
    assert [cell.capacity for cell in cells] == ["1%", "65536B"]


def test_what_is_there_is_not_run_again(
    specs: list[TraceSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = run_grid(specs[:1], VARIANTS[:3], CAPACITIES, out=out, jobs=1)
    again = run_grid(specs, VARIANTS, CAPACITIES, out=out, jobs=1)
    assert (first.ran, again.ran, again.reused) == (9, 15, 9)
    assert in_order(read_results(out)) == in_order(list(again.results))

    def never(*_: object) -> None:
        raise AssertionError("nothing is left to read")

    monkeypatch.setattr(grid_module, "workload_of", never)
    # Another spelling, another name, and a default that is said: still the same cells.
    specs[0].path.rename(tmp_path / "moved.parquet")
    moved = trace_specs([tmp_path / "moved.parquet"])
    same: list[Variant] = [("lru", {}), ("twoq", {"kin": 0.5, "kout": 0.5})]
    third = run_grid(moved, same, ["5.0%", "2048B"], out=out)
    assert (third.ran, third.reused) == (0, 4)
    assert {run.trace for run in third.results} == {"moved"}


def test_other_options_or_content_are_another_trace(specs: list[TraceSpec], tmp_path: Path) -> None:
    spec = specs[0]
    coarse = dataclasses.replace(spec, options=OpenOptions(block_bytes=128))
    assert len({spec.digest(), coarse.digest(), specs[1].digest()}) == 3
    assert spec.digest() == dataclasses.replace(spec, name="x", path=Path(spec.path)).digest()
    out = tmp_path / "out"
    run_grid([spec], VARIANTS[:1], ["20b"], out=out, jobs=1)
    grid = run_grid([coarse], VARIANTS[:1], ["20b"], out=out, jobs=1)
    assert grid.ran == 1 and grid.results[0].capacity_bytes == 20 * 128
    assert len(read_runs(out)) == 2


def test_interrupted_it_keeps_what_is_finished(specs: list[TraceSpec], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_grid(specs, VARIANTS, CAPACITIES, out=out, jobs=1, progress=interrupt)
    assert len(read_runs(out)) == 15
    grid = run_grid(specs, VARIANTS, CAPACITIES, out=out, jobs=1)
    assert (grid.ran, grid.reused) == (9, 15)
    assert len(read_runs(out)) == 24


def test_workers_find_the_same(
    specs: list[TraceSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = run_grid(specs, VARIANTS, CAPACITIES, jobs=1)
    hand_over_at_once(monkeypatch)
    there = run_grid(specs, VARIANTS, CAPACITIES, out=tmp_path / "out", jobs=2)
    assert untimed(there.results) == untimed(here.results)
    assert in_order(read_results(tmp_path / "out")) == in_order(list(here.results))
    # The first cell was run here, the rest of its trace and the other trace by workers.
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize("backend", ["threading", "multiprocessing"])
def test_a_backend_that_was_chosen_gets_all_the_work(
    specs: list[TraceSpec], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One gives results as they come, as Dask does, the other all at the end, as Ray does."""
    here = run_grid(specs[:1], VARIANTS, CAPACITIES, jobs=1)
    monkeypatch.setattr(grid_module, "_run_here", None)
    with joblib.parallel_config(backend=backend, n_jobs=2):
        there = run_grid(specs[:1], VARIANTS, CAPACITIES)
    assert untimed(there.results) == untimed(here.results)


def test_the_oracle_stays_in_one_piece(specs: list[TraceSpec]) -> None:
    cells = make_cells(specs[:1], VARIANTS, CAPACITIES)
    pieces = split(cells, 3)
    assert sorted(map(len, pieces)) == [4, 4, 4]
    assert sum(any(cell.policy == "belady" for cell in piece) for piece in pieces) == 1
    assert len(split(cells[:2], 5)) == 2


@pytest.mark.parametrize(
    ("variant", "capacity", "words"),
    [
        (("nope", {}), "1%", "nope.*known"),
        (("lru", {"x": 1.0}), "1%", "lru.*'x'"),
        (("belady", {"x": 1.0}), "1%", "belady.*'x'"),
        (("twoq", {"kin": 7.0}), "1%", "kin"),
        (("lru", {}), "many", "many"),
    ],
)
def test_what_cannot_be_run_is_told_first(
    specs: list[TraceSpec], tmp_path: Path, variant: Variant, capacity: str, words: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=words):
        run_grid(specs, [("arc", {}), variant], ["1%", capacity], out=out, jobs=1)
    assert not out.exists()


@pytest.mark.parametrize("jobs", [0, -1])
def test_jobs_have_bounds(specs: list[TraceSpec], jobs: int) -> None:
    with pytest.raises(ConfigError, match="jobs"):
        run_grid(specs, VARIANTS, CAPACITIES, jobs=jobs)


def test_a_broken_trace_stops_the_grid_and_is_named(specs: list[TraceSpec], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"timestamp": 0, "input_length": 1, "output_length": 1}\n')
    bad = trace_specs([tmp_path / "bad.jsonl"], "mooncake")
    with pytest.raises(TraceFormatError, match=r"bad\.jsonl"):
        run_grid([*specs, *bad], VARIANTS[:1], ["5%"], out=tmp_path / "out", jobs=1)
    assert len(read_runs(tmp_path / "out")) == 2


def test_names(tmp_path: Path) -> None:
    (tmp_path / "mon").mkdir()
    (tmp_path / "tue").mkdir()
    paths = [tmp_path / "mon" / "a.jsonl.gz", tmp_path / "tue" / "a.jsonl.gz", tmp_path / "b.v2.parquet"]
    paths += [tmp_path / "mon" / "c.json", tmp_path / "mon" / "c.csv"]
    for path in paths:
        path.write_bytes(gzip.compress(b""))
    assert [spec.name for spec in trace_specs(paths)] == ["mon/a", "tue/a", "b.v2", "mon/c", "mon/c-2"]
    assert short_name(Path("llama3.1-8b.log.zst")) == "llama3.1-8b"
    with pytest.raises(ConfigError, match="2 times"):
        trace_specs([paths[0], tmp_path / "mon" / ".." / "mon" / "a.jsonl.gz"])
    with pytest.raises(FileNotFoundError):
        trace_specs([tmp_path / "none.csv"])
