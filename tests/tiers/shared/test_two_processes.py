"""Real processes on one plain folder: what one writes all read; kill -9 costs nobody a published block."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fs_kit import HERE, TESTS, events, next_line, open_shared, start_writer, tier_of
from writer_process import BLOCKS

from kvstrata.tiers.shared.format import MEMBERS, WRITING
from kvstrata.types import Lookup, Outcome
from store_kit import chain, check_quiet, eventually, load, served


def test_a_writes_b_reads_a_is_killed_and_its_blocks_stay(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    with open_shared(folder) as store:
        writer = start_writer(folder, 1)
        tier = tier_of(store)
        try:
            until = 0
            while until < 3:
                until = int(next_line(writer))
            keys = chain(1_000_001, BLOCKS)
            eventually(lambda: tier.table.lookup(keys) == [Lookup.HIT] * BLOCKS, "nothing is found")
            assert served(store, keys) == set(keys)
            published = int(next_line(writer))
        finally:
            writer.kill()  # in the middle of a save
            writer.wait()
        for count in range(1, published + 1):
            keys = chain(1_000_000 + count, BLOCKS)
            eventually(
                lambda keys=keys: tier.table.lookup(keys) == [Lookup.HIT] * BLOCKS, "a block is lost"
            )
            assert load(store, keys) == [Outcome.LOADED] * BLOCKS
        # Whoever is left takes over what the dead one wrote, and removes what it did not finish.
        eventually(lambda: len(list((folder / MEMBERS).iterdir())) == 1, "the dead member is not removed")
        eventually(lambda: not list((folder / WRITING).iterdir()), "its part file is not removed")
        for count in range(1, published + 1):
            keys = chain(1_000_000 + count, BLOCKS)
            assert load(store, keys) == [Outcome.LOADED] * BLOCKS, events(store)
        check_quiet(store)
        tier.catalog.check_integrity()
    with open_shared(folder, room=False) as late:
        for count in range(1, published + 1):
            keys = chain(1_000_000 + count, BLOCKS)
            assert served(late, keys) == set(keys)


def test_three_that_are_killed_and_one_that_stays(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    with open_shared(folder) as store:
        tier = tier_of(store)
        writers = [start_writer(folder, number) for number in (1, 2, 3)]
        published = []
        try:
            for writer in writers:
                published.append(int(next_line(writer)))
        finally:
            for writer in writers:
                writer.kill()
                writer.wait()
        for number, count in zip((1, 2, 3), published, strict=True):
            keys = chain(number * 1_000_000 + count, BLOCKS)
            eventually(
                lambda keys=keys: tier.table.lookup(keys) == [Lookup.HIT] * BLOCKS, "a block is lost"
            )
            assert load(store, keys) == [Outcome.LOADED] * BLOCKS
        eventually(lambda: len(list((folder / MEMBERS).iterdir())) == 1, "the dead members are not removed")
        assert load(store, keys) == [Outcome.LOADED] * BLOCKS
        check_quiet(store)


LOOKUPS = """
import gc, os, sys
sys.path[:0] = {path!r}
from pathlib import Path
from fs_kit import open_shared, tier_of
from store_kit import chain, eventually, load
from kvstrata.types import Outcome, Lookup

with open_shared(Path({folder!r}), refresh_seconds=30.0, room=False) as store:
    keys, others = chain(1_000_001, 20), chain(77, 20)
    eventually(lambda: tier_of(store).table.lookup(keys) == [Lookup.HIT] * 20, "nothing is found")
    assert load(store, keys) == [Outcome.LOADED] * 20
    assert store.lookup(keys).blocks == 20 and store.lookup(others).blocks == 0
    gc.collect()  # what frees the load's buffers is loaded, and has run
    os.access("/mark-begin", os.F_OK)
    for _ in range(200):
        assert store.lookup(keys).blocks == 20
        assert store.lookup(others).blocks == 0
    os.access("/mark-end", os.F_OK)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_lookup_makes_no_system_call(tmp_path: Path) -> None:
    folder, log = tmp_path / "shared", tmp_path / "strace"
    writer = start_writer(folder, 1, chains=1)
    try:
        assert next_line(writer) == "1"
        code = LOOKUPS.format(path=[str(TESTS), str(HERE)], folder=str(folder))
        done = subprocess.run(
            ["strace", "-f", "-o", str(log), sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        writer.kill()
        writer.wait()
    if "Operation not permitted" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    text = log.read_text()
    begin, end = text.index("/mark-begin"), text.index("/mark-end")
    thread = re.search(r"^(\d+) .*mark-begin", text, re.MULTILINE)
    assert thread is not None
    mine = [line for line in text[begin:end].splitlines()[1:-1] if line.startswith(thread[1] + " ")]
    # The interpreter's turn may have to be waited for, and it may need memory; nothing else is asked for.
    own = ("futex", "access resumed", "MAP_ANONYMOUS")
    asked = [line for line in mine if not any(word in line for word in own)]
    assert asked == []
