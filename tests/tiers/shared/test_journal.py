"""Journals tell every reader the same, whenever it looks and whatever breaks on the way."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.tiers.shared.batches import Added, Batch, BatchKind, decode_batches, encode_batch
from kvstrata.tiers.shared.catalog import Catalog
from kvstrata.tiers.shared.extent_file import ENTRY_DTYPE
from kvstrata.tiers.shared.format import MEMBERS, ExtentId, beat_name, journal_name
from kvstrata.tiers.shared.journal import Heard, JournalReader, JournalWriter
from kvstrata.tiers.shared.medium import PosixMedium

ME = 0xABC
PATIENCE = 10.0


def added(sequence: int, blocks: int = 2, *, adopted: bool = False, member: int = ME) -> Added:
    entries = np.zeros(blocks, ENTRY_DTYPE)
    entries["length"] = 100
    entries["number"] = np.arange(blocks)
    entries["key"] = np.array(
        [sequence.to_bytes(16, "big") + bytes([n]) * 16 for n in range(blocks)], "V32"
    )
    return Added(ExtentId(member, sequence), 8192 * blocks, 8192, bytes(32), entries, adopted)


class Journals:
    """A writer, a catalog that it feeds, and readers on one folder."""

    def __init__(self, root: Path) -> None:
        self.medium = PosixMedium(root)
        self.medium.prepare()
        self.medium.create(beat_name(ME), b"")
        self.catalog = Catalog()
        self.writer = JournalWriter(self.medium, ME, lambda batch: self.catalog.apply(ME, batch))

    def compact(self) -> None:
        self.writer.compact(
            lambda: [extent.added(adopted=False) for extent in self.catalog.of_member(ME)], [ME]
        )

    def hear(self, reader: JournalReader, catalog: Catalog, now: float = 0.0) -> Heard:
        tails = self.medium.tails(dict([reader.position]), MEMBERS, lambda name: "journal" in name)
        numbered = {int(name.rpartition("-")[2]): data for name, data in tails.items()}
        heard = reader.take({n: data for n, data in numbered.items() if reader.wants(n)}, now)
        catalog.apply_all(ME, heard.batches)
        return heard


def state(catalog: Catalog) -> dict[ExtentId, int]:
    return {extent.id: len(extent.entries) for extent in catalog.extents()}


def test_a_reader_follows(tmp_path: Path) -> None:
    journals, reader, catalog = Journals(tmp_path), JournalReader(ME, PATIENCE), Catalog()
    journals.writer.add([added(1), added(2)])
    assert len(journals.hear(reader, catalog).batches) == 1
    assert state(catalog) == {ExtentId(ME, 1): 2, ExtentId(ME, 2): 2}
    assert journals.hear(reader, catalog) == Heard()
    journals.writer.gone([ExtentId(ME, 1)])
    journals.writer.add([added(3, adopted=True)])
    journals.hear(reader, catalog)
    assert state(catalog) == state(journals.catalog) == {ExtentId(ME, 2): 2, ExtentId(ME, 3): 2}
    assert catalog.published_bytes(ME) == journals.writer.published_bytes == 2 * 2 * 8192


@given(st.lists(st.sampled_from(["add", "gone", "compact", "hear", "late"]), max_size=25), st.randoms())
@settings(max_examples=40)
def test_every_reader_comes_to_know_the_same(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str], rng: random.Random
) -> None:
    journals = Journals(tmp_path_factory.mktemp("journal"))
    readers = [(JournalReader(ME, PATIENCE), Catalog())]
    model: dict[ExtentId, int] = {}
    sequence = 0
    for step in steps:
        if step == "add":
            sequence += 1
            blocks = rng.randrange(4)
            journals.writer.add([added(sequence, blocks)])
            model[ExtentId(ME, sequence)] = blocks
        elif step == "gone" and model:
            victim = rng.choice(list(model))
            journals.writer.gone([victim])
            del model[victim]
        elif step == "compact":
            journals.compact()
        elif step == "late":
            readers.append((JournalReader(ME, PATIENCE), Catalog()))
        else:
            journals.hear(*rng.choice(readers))
    for reader, catalog in [*readers, (JournalReader(ME, PATIENCE), Catalog())]:
        assert not journals.hear(reader, catalog).damaged
        assert state(catalog) == state(journals.catalog) == model
        catalog.check_integrity()
        assert catalog.published_bytes(ME) == (journals.writer.published_bytes if sequence else 0)
    assert len(journals.medium.names(f"{MEMBERS}/{ME:016x}")) <= 2


def test_a_compacted_journal_still_says_what_is_gone(tmp_path: Path) -> None:
    """An extent of another member that this one declared gone must not come back for late readers."""
    journals = Journals(tmp_path)
    other = ExtentId(0xDEF, 1)
    journals.writer.gone([other, ExtentId(0x123, 1)])
    journals.writer.add([added(1)])
    journals.writer.compact(
        lambda: [extent.added(adopted=False) for extent in journals.catalog.of_member(ME)], [ME, 0xDEF]
    )
    reader, catalog = JournalReader(ME, PATIENCE), Catalog()
    journals.hear(reader, catalog)
    assert catalog.is_gone(other) and not catalog.is_gone(ExtentId(0x123, 1))
    catalog.apply(0xDEF, Batch(BatchKind.ADD, 0, 0, added=(added(1, member=0xDEF),)))
    assert state(catalog) == {ExtentId(ME, 1): 2}


def test_a_batch_that_comes_in_pieces(tmp_path: Path) -> None:
    journals, reader, catalog = Journals(tmp_path), JournalReader(ME, PATIENCE), Catalog()
    data = encode_batch(Batch(BatchKind.ADD, 0, 0, added=(added(1),)))
    path = journals.medium.path(journal_name(ME, 0))
    for end in range(0, len(data) + 1, 16):
        path.write_bytes(data[:end])
        assert not journals.hear(reader, catalog, now=end).damaged
    path.write_bytes(data)
    journals.hear(reader, catalog)
    assert len(catalog) == 1


def test_a_torn_end_is_damage_after_a_while_and_once(tmp_path: Path) -> None:
    journals, reader, catalog = Journals(tmp_path), JournalReader(ME, PATIENCE), Catalog()
    journals.writer.add([added(1)])
    path = journals.medium.path(journal_name(ME, 0))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    assert not journals.hear(reader, catalog, now=0.0).damaged
    assert len(catalog) == 1, "what is whole counts at once"
    assert not journals.hear(reader, catalog, now=PATIENCE - 0.1).damaged
    assert journals.hear(reader, catalog, now=PATIENCE + 0.1).damaged
    assert not journals.hear(reader, catalog, now=2 * PATIENCE + 1).damaged
    # The writer was only slow: what it says later is heard.
    path.write_bytes(whole)
    journals.writer.add([added(2)])
    assert not journals.hear(reader, catalog, now=100.0).damaged
    assert len(catalog) == 2


def test_reading_goes_on_behind_damage(tmp_path: Path) -> None:
    journals, reader, catalog = Journals(tmp_path), JournalReader(ME, PATIENCE), Catalog()
    for sequence in (1, 2, 3):
        journals.writer.add([added(sequence)])
    path = journals.medium.path(journal_name(ME, 0))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    journals.hear(reader, catalog, now=0.0)
    assert list(state(catalog)) == [ExtentId(ME, 1)]
    heard = journals.hear(reader, catalog, now=PATIENCE)
    assert heard.damaged and list(state(catalog)) == [ExtentId(ME, 1), ExtentId(ME, 3)]
    journals.writer.add([added(4)])
    assert not journals.hear(reader, catalog, now=PATIENCE + 1).damaged
    assert len(catalog) == 3


def test_a_compacted_journal_that_is_not_whole_yet(tmp_path: Path) -> None:
    """Readers keep what they know until the new one can be read."""
    journals, reader, catalog = Journals(tmp_path), JournalReader(ME, PATIENCE), Catalog()
    journals.writer.add([added(1), added(2)])
    journals.hear(reader, catalog)
    journals.writer.gone([ExtentId(ME, 1)])
    journals.compact()
    path = journals.medium.path(journal_name(ME, 1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    first = decode_batches(whole)[0][0]
    assert first.kind is BatchKind.SNAPSHOT
    path.write_bytes(whole[: len(encode_batch(first)) - 1])
    assert not journals.hear(reader, catalog, now=0.0).damaged
    assert len(catalog) == 2
    assert journals.hear(reader, catalog, now=PATIENCE).damaged
    path.write_bytes(whole)
    journals.hear(reader, catalog, now=PATIENCE + 1)
    assert state(catalog) == {ExtentId(ME, 2): 2}


class Failing(PosixMedium):
    """Appends fail, some of them after a part was written."""

    failing = 0
    torn = 0

    def append(self, name: str, offset: int, data: bytes) -> None:
        if self.failing:
            self.failing -= 1
            super().append(name, offset, data[: self.torn])
            raise OSError(errno.EIO, "the disk fails")
        super().append(name, offset, data)


@pytest.mark.parametrize("torn", [0, 10, 10_000])
def test_a_write_that_failed_is_made_again_in_order(tmp_path: Path, torn: int) -> None:
    journals, reader, catalog = Journals(tmp_path), JournalReader(ME, PATIENCE), Catalog()
    medium = Failing(tmp_path)
    medium.torn = torn
    writer = JournalWriter(medium, ME, lambda batch: journals.catalog.apply(ME, batch))
    writer.add([added(1)])
    medium.failing = 2
    with pytest.raises(OSError):
        writer.add([added(2)])
    journals.hear(reader, catalog)
    with pytest.raises(OSError):
        writer.gone([ExtentId(ME, 1)])
    assert writer.pending == 2 and len(journals.catalog) == 1, "what is not durable is not told"
    writer.flush()
    assert writer.pending == 0 and writer.published_bytes == 2 * 2 * 8192
    journals.hear(reader, catalog)
    assert state(catalog) == state(journals.catalog) == {ExtentId(ME, 2): 2}
