"""kill -9 at 200 random moments of a process that saves and evicts, and what is there afterwards.

After every kill: the folder opens, no wrong byte is served, the bound holds on the disk, and every
block that was reported saved and flushed is there, unless what was submitted since could have evicted
it. LRU evicts in the order of submission, so a block is safe while everything submitted from its own
chain on, finished or not, fits into the slots with room to spare.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.nvme_format import INDEX_FILE
from store_kit import bytes_on_medium, chain, nvme_tier, open_store, served

ROUNDS = 200
ROUNDS_PER_FOLDER = 10
CAPACITY_BYTES = 2_500_000
SPARE_BLOCKS = 24
"""Blocks that may leave out of order: what loads hold pinned, and what is under way to the lower tier."""


@dataclass
class Submitted:
    """One chain, at its place in the order of all submissions to a folder."""

    number: int
    length: int
    flushed: bool = False


@dataclass
class Model:
    """What the parent knows of a folder from the reports."""

    slots: int = 0
    order: list[Submitted | int] = field(default_factory=list)
    chains: dict[int, Submitted] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def read(self, report: Path) -> None:
        for line in report.read_bytes().split(b"\n"):
            try:
                told: dict[str, Any] = json.loads(line)
            except ValueError:
                continue  # the kill cut the last line
            if "open" in told:
                self.slots = told["open"][0]
            elif "submit" in told:
                chain_ = Submitted(*told["submit"])
                self.order.append(chain_)
                self.chains[chain_.number] = chain_
            elif "touch" in told:
                self.order.append(told["touch"])
            elif "flushed" in told:
                for number in told["flushed"]:
                    self.chains[number].flushed = True
            else:
                self.notes.append(told["note"])

    def required(self) -> list[Submitted]:
        """Flushed chains that nothing submitted since can have evicted."""
        room = self.slots - SPARE_BLOCKS
        safe = []
        for entry in reversed(self.order):
            room -= entry if isinstance(entry, int) else entry.length
            if room < 0:
                break
            if isinstance(entry, Submitted) and entry.flushed:
                safe.append(entry)
        return safe

    @property
    def next_number(self) -> int:
        return 1 + max(self.chains, default=0)


@contextlib.contextmanager
def writer_process() -> Iterator[subprocess.Popen[str]]:
    here = Path(__file__).resolve().parent
    process = subprocess.Popen(
        [sys.executable, str(here / "crash_writer.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(here.parent)},
    )
    try:
        yield process
    finally:
        assert process.stdin and process.stdout
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_at_random_moments(tmp_path: Path) -> None:
    rng = random.Random(20)
    promised = 0
    opened = 0
    submitted = 0
    with writer_process() as process:
        assert process.stdin and process.stdout
        for turn in range(ROUNDS):
            if turn % ROUNDS_PER_FOLDER == 0:
                folder = tmp_path / f"folder-{turn}"
                model = Model()
                memory, direct = rng.random() < 0.4, rng.random() < 0.7
            report = tmp_path / f"report-{turn}"
            # The first round of a folder makes its segments; a few kills fall into opening it.
            seconds = rng.choice([rng.uniform(0.0, 0.02), rng.uniform(0.02, 0.5)])
            order = {
                "folder": str(folder),
                "report": str(report),
                "seed": turn,
                "seconds": seconds,
                "capacity": CAPACITY_BYTES,
                "memory": memory,
                "direct": direct,
                "first": model.next_number,
            }
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            model.read(report)
            assert not model.notes, model.notes
            assert json.loads(answer) == {"killed": True}, "the writer ended before it was killed"
            if not folder.exists():
                continue
            assert bytes_on_medium(folder) <= CAPACITY_BYTES, "the bound was passed before the kill"
            required, from_index = check_folder(folder, model, direct)
            promised += required
            opened += 1
            submitted = max(submitted, sum(entry.length for entry in model.chains.values()))
            # Half of the writers find the index of a clean close, the others have to scan.
            if rng.random() < 0.5 and not from_index:
                (folder / INDEX_FILE).unlink(missing_ok=True)
    assert opened >= ROUNDS * 0.9
    assert submitted > 3 * model.slots, "the writer never had to evict"
    assert promised > 20 * ROUNDS, f"only {promised} promises were put to the test"
    print(f"{ROUNDS} kills, {promised} promised blocks were there")


def check_folder(folder: Path, model: Model, direct: bool) -> tuple[int, bool]:
    """Open the folder and check every promise; blocks promised, and whether there was an index."""
    recent = list(model.chains.values())[-60:]
    with open_store(nvme_tier(folder, CAPACITY_BYTES, direct_io=direct), io_threads=4) as store:
        status = store.status()[0]
        assert status.opened and status.readable and status.writable, status
        assert status.open_report is not None
        if model.slots:
            assert status.open_report.slots == model.slots
        keys = [key for entry in recent for key in chain(entry.number, entry.length)]
        # Whatever is loaded has exactly the bytes that follow from its key.
        there = served(store, keys)
        required = [key for entry in model.required() for key in chain(entry.number, entry.length)]
        lost = set(required) - there
        assert not lost, f"{len(lost)} of {len(required)} flushed blocks are not there"
        store.check_integrity()
        assert bytes_on_medium(folder) <= CAPACITY_BYTES
    assert bytes_on_medium(folder) <= CAPACITY_BYTES
    return len(required), status.open_report.from_index


def test_the_required_set_is_neither_empty_nor_too_large() -> None:
    """The model of the test itself, by hand: room for 10 blocks beside the spare ones."""
    model = Model(slots=SPARE_BLOCKS + 10)
    for number, length in ((1, 4), (2, 3), (3, 4), (4, 2)):
        entry = Submitted(number, length, flushed=number != 4)
        model.chains[number] = entry
        model.order.append(entry)
    assert [entry.number for entry in model.required()] == [3, 2]
    model.order.append(2)
    assert [entry.number for entry in model.required()] == [3]
