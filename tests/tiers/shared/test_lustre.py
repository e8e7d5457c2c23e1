"""Layouts on Lustre, with a stand-in `lfs` that records what it is asked: no Lustre runs where tests do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fs_kit import events, fs_config, open_shared

from kvstrata.tiers.shared import lustre

SCRIPT = """#!/bin/sh
echo "$@" >> {log}
[ "$1" = df ] && exit {df}
{then}
"""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *, df: int = 0, then: str = "exit 0") -> Path:
    """Put an `lfs` on PATH; returns the file of its arguments."""
    folder.mkdir()
    log = folder / "calls"
    log.touch()
    command = folder / "lfs"
    command.write_text(SCRIPT.format(log=log, df=df, then=then))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


def test_extents_are_striped_and_small_files_lie_on_the_metadata_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, folder = stand_in(tmp_path / "bin", monkeypatch), tmp_path / "shared"
    with open_shared(folder, room=False, stripe_count=4) as store:
        told = events(store)
    assert log.read_text().splitlines() == [
        f"df {folder}",
        f"setstripe -c 4 -S 4194304 {folder}/writing",
        f"setstripe -c 4 -S 4194304 {folder}/extents",
        f"setstripe -E 65536 -L mdt -E -1 -c 1 {folder}/members",
        f"setstripe -E 65536 -L mdt -E -1 -c 1 {folder}/collector",
    ]
    assert "stripes of 4.0 MiB over 4 targets" in told and "metadata server" in told
    with open_shared(folder, room=False, stripe_count=4):
        pass
    assert len(log.read_text().splitlines()) == 5, "a folder is laid out once, by whoever makes it"


def test_what_is_turned_off_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = stand_in(tmp_path / "bin", monkeypatch)
    assert lustre.lay_out(tmp_path, fs_config(tmp_path, dom_bytes=0)) == []
    assert log.read_text().splitlines() == [f"df {tmp_path}"]


def test_other_file_systems_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = stand_in(tmp_path / "bin", monkeypatch, df=1)
    assert lustre.lay_out(tmp_path, fs_config(tmp_path, stripe_count=4)) == []
    assert log.read_text().splitlines() == [f"df {tmp_path}"]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert lustre.lay_out(tmp_path, fs_config(tmp_path, stripe_count=4)) == []


def test_a_server_without_these_layouts_is_told_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path / "bin", monkeypatch, then="echo 'no DoM on this MDT' >&2; exit 22")
    with open_shared(tmp_path / "shared") as store:
        assert "members: lfs setstripe failed: no DoM on this MDT" in events(store)


def test_a_command_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lustre, "COMMAND_SECONDS", 0.2)
    stand_in(tmp_path / "bin", monkeypatch, then="exec sleep 60")
    notes = lustre.lay_out(tmp_path, fs_config(tmp_path))
    assert len(notes) == 2 and all("timed out" in note for note in notes)
