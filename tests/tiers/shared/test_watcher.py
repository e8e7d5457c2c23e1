"""The watcher takes in what all others say: much, little, torn, or of members that went away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvstrata.telemetry import Telemetry
from kvstrata.tiers.shared.batches import Added
from kvstrata.tiers.shared.catalog import Catalog
from kvstrata.tiers.shared.extent_file import ENTRY_DTYPE, Footer
from kvstrata.tiers.shared.format import MEMBERS, ExtentId, beat_name, journal_name, member_folder
from kvstrata.tiers.shared.journal import JournalWriter
from kvstrata.tiers.shared.medium import PosixMedium
from kvstrata.tiers.shared.watcher import Round, Watcher, read_footer

SPACE = bytes(32)
LEASE = 10.0
STRIDE = 8192


def added(extent: ExtentId, blocks: int = 2) -> Added:
    entries = np.zeros(blocks, ENTRY_DTYPE)
    entries["length"] = 100
    entries["number"] = np.arange(blocks)
    entries["key"] = np.frombuffer(
        b"".join(f"{extent.word}{n:015}".encode()[-32:] for n in range(blocks)), "V32"
    )
    return Added(extent, STRIDE * blocks, STRIDE, SPACE, entries)


class Folder:
    def __init__(self, root: Path) -> None:
        self.medium = PosixMedium(root)
        self.medium.prepare()
        self.telemetry = Telemetry(100)
        self.catalog = Catalog()
        self.now = 0.0
        self.turns = 0
        self.watcher = Watcher(
            self.medium,
            self.catalog,
            self.telemetry,
            tier="test",
            lease_seconds=LEASE,
            between=self.turn,
            clock=lambda: self.now,
        )

    def turn(self) -> None:
        self.turns += 1

    def join(self, member: int) -> JournalWriter:
        self.medium.create(beat_name(member), b"{}")
        return JournalWriter(self.medium, member)

    def poll(self, me: int | None = None) -> Round:
        return self.watcher.poll(me, lambda members: None)

    @property
    def known(self) -> list[tuple[int, int]]:
        return sorted(extent.id for extent in self.catalog.extents())

    def publish(self, one: Added) -> None:
        slots = bytes(STRIDE * len(one.entries))
        footer = Footer(one.extent, STRIDE, SPACE, len(one.entries), one.entries).encode()
        self.medium.write_extent(one.extent.name, [slots, footer])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_it_hears_all_others_and_itself_not(folder: Folder) -> None:
    for member in (1, 2, 3):
        folder.join(member).add([added(ExtentId(member, 1))])
    round_ = folder.poll(me=2)
    assert sorted(round_.members) == [1, 2, 3] and sorted(round_.beats) == [1, 2, 3]
    assert folder.known == [(1, 1), (3, 1)]


def test_who_is_away_for_a_lease_is_forgotten(folder: Folder) -> None:
    """Not sooner: another member may take over what it wrote, and say so."""
    folder.join(1).add([added(ExtentId(1, 1)), added(ExtentId(1, 2))])
    adopter = folder.join(2)
    folder.poll()
    adopter.add([added(ExtentId(1, 1))])
    folder.medium.remove_folder(member_folder(1))
    folder.poll()
    assert folder.known == [(1, 1), (1, 2)]
    folder.now = LEASE - 1
    folder.poll()
    assert folder.known == [(1, 1), (1, 2)]
    folder.now = LEASE
    folder.poll()
    assert folder.known == [(1, 1)]
    folder.catalog.check_integrity()


def test_a_folder_that_is_not_the_folder_changes_nothing(folder: Folder) -> None:
    folder.join(1).add([added(ExtentId(1, 1))])
    folder.poll()
    folder.medium.remove_folder(member_folder(1))

    def check(members: list[int]) -> None:
        assert members == []
        raise OSError("not mounted")

    for _ in range(3):
        folder.now += LEASE
        with pytest.raises(OSError, match="not mounted"):
            folder.watcher.poll(None, check)
    assert folder.known == [(1, 1)]


def test_much_is_taken_in_piece_by_piece(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("medium", "watcher"):
        monkeypatch.setattr(f"kvstrata.tiers.shared.{module}.TAILS_BYTES", 1000)
    for member in range(1, 8):
        writer = folder.join(member)
        for sequence in range(5):
            writer.add([added(ExtentId(member, sequence))])
    folder.poll()
    assert len(folder.known) == 35 and folder.turns >= 7


def test_a_large_journal_that_cannot_be_read_keeps_nobody_waiting(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("medium", "watcher"):
        monkeypatch.setattr(f"kvstrata.tiers.shared.{module}.TAILS_BYTES", 1000)
    folder.join(1)
    folder.medium.append(journal_name(1, 0), 0, b"nonsense" * 1000)
    folder.join(2).add([added(ExtentId(2, 1))])
    folder.poll()
    assert folder.known == [(2, 1)]


def test_footers_stand_in_for_a_damaged_journal(folder: Folder) -> None:
    writer = folder.join(1)
    for sequence in (1, 2, 3):
        one = added(ExtentId(1, sequence))
        folder.publish(one)
        writer.add([one])
    folder.publish(added(ExtentId(5, 1)))
    folder.medium.path(ExtentId(1, 3).name).write_bytes(b"no footer")
    folder.medium.path(journal_name(1, 0)).write_bytes(b"x" * 500)
    folder.poll()
    assert folder.known == []
    folder.now = LEASE
    folder.poll()
    assert folder.known == [(1, 1), (1, 2)]
    assert folder.telemetry.value("damaged_files_total", "test", "journal") == 1
    assert folder.telemetry.value("damaged_files_total", "test", "footer") == 1
    folder.now = 3 * LEASE
    folder.poll()
    assert folder.telemetry.value("damaged_files_total", "test", "journal") == 1


def test_footers_longer_than_the_first_guess(folder: Folder) -> None:
    one = added(ExtentId(1, 1), blocks=2_000)
    slots = bytes(4096)
    footer = Footer(one.extent, STRIDE, SPACE, 2_000, one.entries)
    folder.medium.write_extent(one.extent.name, [slots, footer.encode()])
    found = read_footer(folder.medium, one.extent)
    assert found is not None and (found.entries == one.entries).all()
    assert read_footer(folder.medium, ExtentId(1, 2)) is None


def test_each_answer_is_watched_alone(folder: Folder) -> None:
    """Storage that is slow but answers must not look as if it hung: beats go on between two files."""
    open_watches, most = 0, 0
    reads: list[int] = []

    @contextmanager
    def watch() -> Iterator[None]:
        nonlocal open_watches, most
        open_watches += 1
        most = max(most, open_watches)
        reads.append(0)
        yield
        open_watches -= 1

    folder.watcher._watch = watch
    for member in range(1, 9):
        folder.join(member).add([added(ExtentId(member, 1))])
    folder.poll()
    assert most == 1 and open_watches == 0
    assert len(reads) > 16 and folder.turns > 16, "a beat and a journal of each member"


def test_foreign_files_among_the_members(folder: Folder) -> None:
    (folder.medium.root / MEMBERS / "lost+found").mkdir()
    (folder.medium.root / MEMBERS / "note").write_text("x")
    folder.join(1).add([added(ExtentId(1, 1))])
    (folder.medium.path(member_folder(1)) / "journal-0.bak").write_text("x")
    assert folder.poll().members == [1] and folder.known == [(1, 1)]
