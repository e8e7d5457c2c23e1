"""Members that differ in clock, version or configuration, and folders with damaged and strange files."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fault_kit import OWN, THEIRS, await_found, open_member, published, shared, told
from fs_kit import HERE, TESTS, events

from kvstrata.config import MIB
from kvstrata.errors import FormatVersionError
from kvstrata.tiers.shared.batches import BATCH_MAGIC
from kvstrata.tiers.shared.format import EXTENTS, MEMBERS, SETTINGS_FILE, WRITING, ExtentId
from kvstrata.types import Outcome
from store_kit import chain, check_quiet, load, overwrite

CLOCK = """
import sys, time
offset = float(sys.argv[2])
real, real_ns = time.time, time.time_ns
time.time = lambda: real() + offset
time.time_ns = lambda: real_ns() + int(offset * 1e9)
from pathlib import Path
from store_kit import chain, load
from kvstrata.types import Outcome
from fault_kit import THEIRS, await_found, open_member, published

with open_member(Path(sys.argv[1]), ttl_seconds=60.0) as store:
    await_found(store, THEIRS)
    assert load(store, THEIRS) == [Outcome.LOADED] * 8
    published(store, chain(int(sys.argv[3]), 8))
    print("ready", flush=True)
    sys.stdin.readline()
    assert load(store, THEIRS) == [Outcome.LOADED] * 8
    assert store.telemetry.value("rejoins_total") == 0
"""


def test_clocks_that_are_10_seconds_off(tmp_path: Path) -> None:
    """Wall clocks that differ, and monotonic ones that began at other times: nobody compares any."""
    folder = tmp_path / "shared"
    unshare = shutil.which("unshare")
    path = os.pathsep.join([str(TESTS), str(HERE)])
    with open_member(folder, ttl_seconds=60.0) as store:
        published(store, THEIRS)
        members = []
        for number, offset in enumerate((-10.0, 10.0)):
            command = [sys.executable, "-c", CLOCK, str(folder), str(offset), str(20 + number)]
            if unshare is not None and os.geteuid() == 0:
                shift = ["--monotonic", str(100_000 * (number + 1)), "--boottime", str(200_000)]
                command = [unshare, "--time", *shift, "--fork", *command]
            members.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"PYTHONPATH": path},
                )
            )
        try:
            for number, process in enumerate(members):
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n", process.communicate()[1]
                await_found(store, chain(20 + number, 8))
                assert load(store, chain(20 + number, 8)) == [Outcome.LOADED] * 8
            # Longer than a lease: a member that is taken for dead would have to join anew.
            time.sleep(1.5)
        finally:
            errors = [process.communicate("\n")[1] for process in members]
        assert [process.returncode for process in members] == [0, 0], errors
        assert store.telemetry.value("rejoins_total") == 0


def test_a_newer_format_is_refused_and_a_newer_kvstrata_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    with open_member(folder) as store:
        published(store, THEIRS)
        tier = shared(store)
        tier.session.member._beat = replace(tier.session.member.last_beat, version="999.0")  # type: ignore[union-attr]
        with open_member(folder) as other:
            await_found(other, THEIRS)
            assert load(other, THEIRS) == [Outcome.LOADED] * 8
            told(other, lambda: "kvstrata 999.0" in events(other), "another version is not told")
            # Words of a later version in a journal: what they say is read from the extents' footers.
            published(store, OWN)
            await_found(other, OWN)
            member = MEMBERS + "/" + tier.session.member.word  # type: ignore[union-attr]
            with (folder / member / "journal-0").open("ab") as file:
                file.write(BATCH_MAGIC + struct.pack("<HHIQQQ", 99, 1, 64, 9, 0, 0) + bytes(64))
            told(
                other,
                lambda: other.telemetry.value("damaged_files_total", "shared_fs", "journal") == 1,
                "words of a later version are not noticed",
            )
            assert f"{member}/journal-0" in events(other)
            assert load(other, [*THEIRS, *OWN]) == [Outcome.LOADED] * 16
    settings = folder / SETTINGS_FILE
    settings.write_text(settings.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(FormatVersionError, match="version 2, this kvstrata reads version 1"):
        open_member(folder)


def test_members_with_other_configurations(tmp_path: Path) -> None:
    """The folder's settings hold for all; who wanted others is told what to do."""
    folder = tmp_path / "shared"
    with open_member(folder) as store:
        published(store, THEIRS)
        with open_member(
            folder, capacity_bytes=999 * MIB, extent_bytes=2 * MIB, lease_seconds=7.0
        ) as other:
            for name in ("capacity_bytes", "extent_bytes", "lease_seconds"):
                assert f"{name} is" in events(other)
            assert f"delete {SETTINGS_FILE}" in events(other)
            assert shared(other).settings == shared(store).settings
            await_found(other, THEIRS)
            published(other, OWN)
            await_found(store, OWN)
            assert load(store, OWN) == [Outcome.LOADED] * 8


# Damage


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.99])
def test_a_flipped_bit_in_a_journal(tmp_path: Path, place: float) -> None:
    """A newcomer finds what stands before it at once, and everything once it believes in the damage."""
    folder = tmp_path / "shared"
    with open_member(folder) as store:
        chains = [chain(number, 4) for number in range(5)]
        for keys in chains:
            published(store, keys)
        word = shared(store).session.member.word  # type: ignore[union-attr]
        journal = folder / MEMBERS / word / "journal-0"
        data = journal.read_bytes()
        at = int(place * len(data))
        overwrite(journal, at, bytes([data[at] ^ 4]))
        with open_member(folder) as other:
            for keys in chains:
                await_found(other, keys)
                assert load(other, keys) == [Outcome.LOADED] * 4
            assert other.telemetry.value("damaged_files_total", "shared_fs", "journal") == 1
            assert f"{MEMBERS}/{word}/journal-0" in events(other)
            # Those who have read it before the damage go on.
            published(store, chain(9, 4))
            await_found(other, chain(9, 4))
            assert load(other, chain(9, 4)) == [Outcome.LOADED] * 4
            check_quiet(other)
        check_quiet(store)


def test_a_half_written_extent_and_a_foreign_file(tmp_path: Path) -> None:
    """Nobody's half an extent is removed once its writer is known to be dead; what is not ours stays."""
    folder = tmp_path / "shared"
    with open_member(folder) as store:
        published(store, THEIRS)
        whole = next((folder / EXTENTS).iterdir()).read_bytes()
        (folder / EXTENTS / ExtentId(5, 5).word).write_bytes(whole[: len(whole) // 2])
        (folder / WRITING / ExtentId(5, 6).word).write_bytes(whole[:10_000])
        (folder / EXTENTS / "notes.txt").write_text("not ours")
        (folder / "README").write_text("not ours")
        told(store, lambda: "extents/notes.txt" in events(store), "a foreign file is not told")
        told(store, lambda: not (folder / WRITING / ExtentId(5, 6).word).exists(), "a part stays")
        told(store, lambda: not (folder / EXTENTS / ExtentId(5, 5).word).exists(), "half an extent stays")
        assert store.telemetry.value("shared_foreign_files_total", "shared_fs") == 1
        told(
            store,
            lambda: store.telemetry.value("shared_orphans_total", "shared_fs") == 2,
            "orphans are not counted",
        )
        assert (folder / EXTENTS / "notes.txt").read_text() == (folder / "README").read_text() == "not ours"
        assert load(store, THEIRS) == [Outcome.LOADED] * 8
