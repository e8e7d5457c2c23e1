"""`kvstrata trace capture`: what live stores have captured becomes one trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_kit import TINY, assert_one_error, namespace_of, run_program
from typer.testing import Result

from kvstrata.config import Config, MemoryTierConfig, StoreConfig
from kvstrata.hashing import chain_keys
from kvstrata.store import BlockStore
from kvstrata.traces.capture import capture_files
from kvstrata.traces.open import open_trace
from kvstrata.types import BlockLayout, Namespace

Run = Callable[..., Result]


def capture(folder: Path, lengths: list[int], namespace: Namespace = TINY) -> None:
    """One process's life: chains of one tree, of these lengths."""
    config = Config(StoreConfig(capture=str(folder)), (MemoryTierConfig(capacity_bytes=64 * 4096),))
    with BlockStore(config, BlockLayout(4096, 16), namespace) as store:
        keys = chain_keys(namespace.digest, range(16 * max(lengths)), 16)
        for length in lengths:
            assert store.save(keys[:length], [bytes(4096)] * length).wait(20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two lives of a process, and another tenant's."""
    folder = tmp_path / "capture"
    capture(folder, [3, 5])
    capture(folder, [5, 1, 7])
    capture(folder, [2], namespace_of(model="other"))
    return folder


def test_one_trace_of_several_processes(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "all.parquet"
    result = run("trace", "capture", folder, "-o", output)
    assert result.exit_code == 0, result.output
    assert f"wrote {output}: 6 requests, 23 accesses, 9 unique blocks, " in result.stdout
    assert "from 3 files of 2 tenants, 0 s" in result.stdout
    assert "skipped" not in result.output
    source = open_trace(output)
    lengths = np.concatenate([np.diff(batch.starts) for batch in source.batches()])
    assert lengths.tolist() == [3, 5, 5, 1, 7, 2]
    ids = np.concatenate([batch.ids for batch in source.batches()])
    assert ids.tolist() == [*range(3), *range(5), *range(5), 0, *range(7), 7, 8]
    info = run("trace", "info", output, "--json")
    (shown,) = json.loads(info.stdout)["traces"]
    assert (shown["format"], shown["tenants"], shown["block_bytes"]) == ("merged-capture", 2, 4096)
    assert len(shown["labels"]["tenant"]) == 2


def test_json_and_what_was_skipped(run: Run, folder: Path, tmp_path: Path) -> None:
    first, second, third = capture_files(folder)
    first.write_bytes(first.read_bytes()[:-100])
    third.rename(folder / f"{third.name}.part")
    result = run("trace", "capture", folder, "-o", tmp_path / "all.parquet", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["files"], found["requests"], found["accesses"], found["unique"]) == (1, 3, 13, 7)
    assert found["tenants"] == [TINY.digest[:8].hex()]
    assert 0 <= found["last_unix_seconds"] - found["first_unix_seconds"] < 60
    assert {Path(one["file"]).name for one in found["skipped"]} == {first.name, f"{third.name}.part"}
    assert result.stderr.count("warning: skipped ") == 2
    result = run("trace", "capture", folder, "-o", tmp_path / "all.parquet", "--force")
    assert "skipped 2 files" in result.stdout
    result = run("trace", "capture", second, "-o", tmp_path / "one.parquet", "--json")
    assert json.loads(result.stdout)["requests"] == 3


def test_a_single_file_is_a_trace(run: Run, folder: Path) -> None:
    result = run("trace", "info", *capture_files(folder), "--json")
    assert result.exit_code == 0, result.output
    assert [one["requests"] for one in json.loads(result.stdout)["traces"]] == [2, 3, 1]
    assert {one["format"] for one in json.loads(result.stdout)["traces"]} == {"capture"}


def test_what_is_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "all.parquet"
    (tmp_path / "empty").mkdir()
    assert_one_error(run("trace", "capture", tmp_path / "none", "-o", output), "none", "No such file")
    assert_one_error(run("trace", "capture", tmp_path / "empty", "-o", output), "no capture file")
    output.write_text("mine")
    assert_one_error(run("trace", "capture", folder, "-o", output), "exists; --force")
    assert output.read_text() == "mine"
    for path in capture_files(folder):
        path.write_bytes(b"PAR1")
    assert_one_error(
        run("trace", "capture", folder, "-o", output, "--force"), "no capture file can be read", "2 more"
    )
    assert output.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.parquet", "capture", "empty"]


def test_the_program(folder: Path, tmp_path: Path) -> None:
    done = run_program("trace", "capture", folder, "-o", tmp_path / "all.parquet")
    assert done.returncode == 0, done.stderr
    assert "6 requests" in done.stdout and done.stderr == ""
    shown = run_program("trace", "capture", "--help")
    assert "kvstrata trace capture /var/log/kv-capture" in shown.stdout
