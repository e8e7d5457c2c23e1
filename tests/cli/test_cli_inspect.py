"""`kvstrata inspect`: what it says of real folders, whole, damaged, and in use."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_kit import (
    BLOCK_BYTES,
    Folder,
    assert_one_error,
    assert_program_error,
    make_folder,
    namespace_of,
    open_store,
    run_program,
    save_blocks,
)
from typer.testing import Result

Run = Callable[..., Result]
STRIDE = 4096 + 20_480


def look(run: Run, path: Path) -> dict[str, Any]:
    result = run("inspect", path, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def snapshot(path: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.iterdir()}


def test_counts_what_was_saved(run: Run, folder: Folder) -> None:
    found = look(run, folder.path)
    assert (found["format"], found["version"], found["in_use"]) == ("kvstrata-nvme", 1, False)
    assert (found["index"], found["index_blocks"]) == ("intact", 40)
    assert (found["blocks"], found["payload_bytes"]) == (40, 40 * BLOCK_BYTES)
    assert found["slots"]["used"] == 40
    assert sum(found["slots"].values()) * 20_480 == found["slot_payload_bytes"]
    assert found["bytes_on_disk"] == sum(
        path.stat().st_blocks * 512 for path in [folder.path, *folder.path.iterdir()]
    )
    assert [segment["file"] for segment in found["segments"]] == [path.name for path in folder.segments]
    assert all(
        segment["file_bytes"] == segment["full_bytes"] == path.stat().st_size
        for segment, path in zip(found["segments"], folder.segments, strict=True)
    )
    (namespace,) = found["namespaces"]
    assert namespace["digest"] == folder.namespace.digest.hex()
    assert namespace["fields"] == {"model": "tiny", "dtype": "float16", "rank": 0}
    oldest, newest = namespace["oldest_unix_seconds"], namespace["newest_unix_seconds"]
    assert time.time() - 60 < oldest <= newest <= time.time()


def test_table_shows_the_same(run: Run, folder: Folder) -> None:
    result = run("inspect", folder.path)
    assert result.exit_code == 0
    for words in (
        "kvstrata-nvme version 1",
        "not in use",
        "40 with 781.2 KiB, 0 of them expired",
        "of a clean close, with 40 blocks",
        "figures here are from slot headers",
        folder.namespace.digest.hex()[:16],
        "model tiny, dtype float16, rank 0",
        folder.segments[0].name,
    ):
        assert words in result.stdout


def test_changes_nothing(run: Run, folder: Folder) -> None:
    before = snapshot(folder.path)
    look(run, folder.path)
    assert snapshot(folder.path) == before


def test_two_namespaces_and_two_block_sizes(run: Run, folder: Folder) -> None:
    other = namespace_of(model="other [bold]name[/bold]\x1b[31m", rank=1)
    make_folder(folder.path, 3, namespace=other)
    found = look(run, folder.path)
    assert {space["digest"]: space["blocks"] for space in found["namespaces"]} == {
        folder.namespace.digest.hex(): 40,
        other.digest.hex(): 3,
    }
    text = run("inspect", folder.path).stdout
    assert "[bold]name[/bold]" in text and "\x1b" not in text


def test_expired_blocks_are_told_apart(run: Run, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "kv", 5, ttl=0.2)
    time.sleep(0.3)
    found = look(run, folder.path)
    assert (found["blocks"], found["expired_blocks"]) == (5, 5)


def test_names_that_were_lost_leave_the_digest(run: Run, folder: Folder) -> None:
    (folder.path / "namespaces.json").write_text("{")
    (namespace,) = look(run, folder.path)["namespaces"]
    assert (namespace["fields"], namespace["blocks"]) == ({}, 40)
    assert "not written down" in run("inspect", folder.path).stdout


def test_every_kind_of_damage_has_its_count(run: Run, folder: Folder) -> None:
    first, second = folder.segments[:2]
    before = look(run, folder.path)
    slots = before["segments"][0]["slots"]["used"]
    overwrite(first, 4096 + 10, b"\xff")
    with first.open("rb") as file:
        file.seek(4096 + 2 * STRIDE)
        third = file.read(4096)
    overwrite(first, 4096 + STRIDE, third)
    os.truncate(first, 4096 + (slots - 3) * STRIDE + 100)
    overwrite(second, 0, b"\xff")
    (folder.path / "index.kv").write_bytes(b"no index")
    found = look(run, folder.path)
    assert found["index"] == "damaged"
    assert found["unreadable_segments"] == [second.name]
    assert found["segments"][0]["slots"] == {
        "empty": 0, "used": slots - 5, "damaged": 1, "misplaced": 1, "missing": 3,
    }  # fmt: skip
    text = run("inspect", folder.path).stdout
    assert "truncated" in text and f"warning: {second.name}" in text


def test_folder_in_use_says_by_whom(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "kv"
    with open_store(path) as store:
        save_blocks(store, 4)
        found = look(run, path)
        assert found["in_use"] and found["figures_may_be_moving"]
        assert f"process {os.getpid()} on" in found["holder"]
        assert (found["blocks"], found["index"]) == (4, "absent")
        text = run_program("inspect", path).stdout
        assert f"in use by process {os.getpid()}" in text and "may be moving" in text
        save_blocks(store, 4, seed=1)  # the lock was not disturbed
    assert not look(run, path)["in_use"]


def test_folder_that_changes_meanwhile(run: Run, tmp_path: Path) -> None:
    """Blocks come and go, and segments of another size are given up, while it is read."""
    path = tmp_path / "kv"
    make_folder(path, 150)
    stop = threading.Event()
    failed: list[BaseException] = []

    def churn() -> None:
        try:
            for seed in range(1, 10_000):
                if stop.is_set():
                    return
                with open_store(path, block_bytes=BLOCK_BYTES * (1 + seed % 3)) as store:
                    save_blocks(store, 20, seed=seed)
        except BaseException as error:
            failed.append(error)
            raise

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        seen = [look(run, path) for _ in range(25)]
    finally:
        stop.set()
        thread.join()
    assert not failed
    assert any(found["in_use"] for found in seen)
    assert len({found["blocks"] for found in seen}) > 1


@pytest.mark.parametrize("columns", ["40", "80", "250"])
def test_names_stay_whole_in_any_terminal(
    folder: Folder, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    result = run_program("inspect", folder.path)
    assert (result.returncode, result.stderr) == (0, "")
    assert all(f"  {path.name}" in result.stdout for path in folder.segments)


def test_no_kvstrata_folder(run: Run, tmp_path: Path) -> None:
    assert_one_error(run("inspect", tmp_path / "no"), "no such folder")
    assert_one_error(run("inspect", tmp_path), "not a kvstrata folder", "kvstrata.json")
    (tmp_path / "file").touch()
    assert_one_error(run("inspect", tmp_path / "file"), "not a folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ('{"format": "kvstrata-nvme", "version": 2}', ["version 2", "reads kvstrata-nvme version 1"]),
        ('{"format": "other", "version": 1}', ["format other"]),
        ("[]", ["kvstrata.json", "not a marker"]),
        ("\xff{", ["kvstrata.json", "not a marker"]),
        ("", ["kvstrata.json", "not a marker"]),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_other_formats(run: Run, folder: Folder, command: str, marker: str, words: list[str]) -> None:
    (folder.path / "kvstrata.json").write_text(marker, encoding="latin-1")
    assert_one_error(run(command, folder.path), *words)


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize("closed", [".", "kvstrata.json", "segment", "LOCK", "index.kv"])
def test_permission_denied(folder: Folder, command: str, closed: str) -> None:
    path = folder.segments[0] if closed == "segment" else folder.path / closed
    path.chmod(0)
    try:
        assert_program_error(
            run_program(command, folder.path, unprivileged=True), "Permission denied", "as the user"
        )
    finally:
        path.chmod(0o700)


def test_empty_folder_of_ours(run: Run, tmp_path: Path) -> None:
    with open_store(tmp_path / "kv"):
        pass
    found = look(run, tmp_path / "kv")
    assert (found["blocks"], found["segments"]) == (0, [])


def test_asking_who_holds_the_folder_keeps_nobody_out(folder: Folder) -> None:
    """`inspect` touches the lock to ask for it; a store that opens at that moment must get it."""
    with (folder.path / "LOCK").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(0.03, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        timer.start()
        with open_store(folder.path) as store:
            assert store.status()[0].blocks == 40
        timer.join()
