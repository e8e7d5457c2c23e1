"""`kvstrata prepare`: makes what is missing, keeps what is there, and says clearly why it cannot."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_kit import BLOCK_BYTES, MIB, PROGRAM, Folder, assert_one_error, open_store, save_blocks
from typer.testing import Result

from kvstrata.transfer.file_io import FileIO

Run = Callable[..., Result]


def write_config(path: Path, folder: Path, *, capacity: str = "4MiB", tier: str = "nvme") -> Path:
    where = f'path = "{folder}"\nsegment_bytes = "1MiB"\n' if tier == "nvme" else ""
    path.write_text(f'[[tier]]\ntype = "{tier}"\ncapacity_bytes = "{capacity}"\n{where}')
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of the folder that the fixture `folder` makes."""
    return write_config(tmp_path / "kvstrata.toml", tmp_path / "kv")


def prepare(run: Run, *arguments: object) -> dict[str, Any]:
    result = run("prepare", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_new_folder(run: Run, config: Path, tmp_path: Path) -> None:
    found = prepare(run, config, "--block-bytes", BLOCK_BYTES)
    files = sorted((tmp_path / "kv").glob("seg-*.kv"))
    assert found["segments"] == found["prepared_segments"] == len(files) > 3
    assert found["written_bytes"] == sum(file.stat().st_size - 4096 for file in files)
    assert found["left_out_segments"] == 0 and found["block_bytes"] == BLOCK_BYTES
    assert sum(file.stat().st_blocks * 512 for file in files) <= 4 * MIB
    # Nothing was written down about a model that nobody named.
    assert not (tmp_path / "kv" / "namespaces.json").exists()
    with open_store(tmp_path / "kv") as store:
        report = store.status()[0].open_report
        assert report is not None and report.from_index and report.restored == 0
        save_blocks(store, 100)
        assert sorted((tmp_path / "kv").glob("seg-*.kv")) == files


def test_blocks_that_are_there_stay(run: Run, config: Path, folder: Folder) -> None:
    before = folder.segments
    found = prepare(run, config)
    assert found["block_bytes"] == 20_480  # what a slot of the folder holds
    assert found["prepared_segments"] == found["segments"] - len(before) > 0
    assert set(before) < set(folder.segments)
    assert all(folder.readable())
    assert prepare(run, config)["prepared_segments"] == 0


def test_text_for_people(run: Run, config: Path, folder: Folder) -> None:
    text = run("prepare", config).stdout
    assert "segments for blocks of 20.0 KiB prepared" in text
    made = int(re.findall(r"(\d+) of \d+ segments", text)[0])
    assert f"{len(folder.segments) - made} were there before" in text


def test_segments_of_another_size_keep_their_room(run: Run, config: Path, folder: Folder) -> None:
    before = folder.segments
    found = prepare(run, config, "--block-bytes", "64KiB")
    assert found["left_out_segments"] > 0
    assert set(before) < set(folder.segments)
    assert "are left out" in run("prepare", config, "--block-bytes", "64KiB").stdout
    assert_one_error(run("prepare", config), "20.0 KiB, 64.0 KiB", "--block-bytes")


def test_nobody_knows_the_block_size(run: Run, config: Path) -> None:
    assert_one_error(run("prepare", config), "holds no segments", "--block-bytes")


@pytest.mark.parametrize("size", ["", "much", "0", "-1", "1GiB"])
def test_a_wrong_size(run: Run, config: Path, size: str) -> None:
    assert_one_error(run("prepare", config, f"--block-bytes={size}"))


def test_no_nvme_tier(run: Run, tmp_path: Path) -> None:
    file = write_config(tmp_path / "memory.toml", tmp_path, tier="memory")
    assert_one_error(run("prepare", file), "memory.toml", "no [[tier]] of type nvme")


def test_no_configuration(run: Run, tmp_path: Path) -> None:
    assert_one_error(run("prepare", tmp_path / "none.toml"), "none.toml", "no such file")


def test_a_folder_in_use(run: Run, config: Path, folder: Folder) -> None:
    with open_store(folder.path):
        assert_one_error(run("prepare", config), "is in use by process", str(os.getpid()))


def test_a_full_disk(run: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    allocate = FileIO.allocate

    def full_soon(io: FileIO, fd: int, size: int) -> None:
        nonlocal made
        if made == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        made += 1
        allocate(io, fd, size)

    monkeypatch.setattr(FileIO, "allocate", full_soon)
    result = run("prepare", config, "--block-bytes", BLOCK_BYTES)
    assert_one_error(result, "No space left on device", "stays", str(tmp_path / "kv"))
    assert len(list((tmp_path / "kv").glob("seg-*.kv"))) == 2
    assert list((tmp_path / "kv").glob("*.tmp")) == []


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C: what is done stays, what is not is removed, and the folder opens from its index."""
    folder = tmp_path / "kv"
    file = write_config(tmp_path / "kvstrata.toml", folder, capacity="2GiB")
    process = subprocess.Popen(
        [str(PROGRAM), "prepare", str(file), "--block-bytes", str(BLOCK_BYTES)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    until = time.monotonic() + 60
    while len(list(folder.glob("seg-*.kv"))) < 2:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert list(folder.glob("*.tmp")) == []
    left = len(list(folder.glob("seg-*.kv")))
    assert left >= 2
    with open_store(folder) as store:
        save_blocks(store, 10)
