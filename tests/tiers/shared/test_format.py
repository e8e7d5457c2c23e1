"""What lies in a shared folder decodes to what was encoded, and anything else to a value that says so."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tiers.shared.batches import (
    Added,
    Batch,
    BatchKind,
    Tail,
    Touched,
    decode_batches,
    encode_batch,
    find_batch,
)
from kvstrata.tiers.shared.extent_file import (
    ENTRY_DTYPE,
    TRAILER_BYTES,
    Footer,
    extent_bytes,
    slot_stride,
    slots_within,
)
from kvstrata.tiers.shared.format import (
    ExtentId,
    MemberFile,
    access_name,
    beat_name,
    epoch_name,
    journal_name,
    parse_member,
    parse_member_file,
    parse_numbered,
)
from kvstrata.tiers.shared.small_files import Beat, FolderSettings, Grant, Grants
from kvstrata.transfer.buffers import PAGE

words = st.integers(0, 2**64 - 1)
extent_ids = st.builds(ExtentId, words, words)


@st.composite
def entry_arrays(draw: st.DrawFn, stride: int) -> np.ndarray:
    count = draw(st.integers(0, 6))
    entries = np.zeros(count, ENTRY_DTYPE)
    for row in range(count):
        entries[row] = (
            draw(st.binary(min_size=32, max_size=32)), row, draw(st.integers(1, stride - PAGE)),
            draw(words), draw(st.integers(0, 2**62)), draw(st.integers(0, 2**62)),
        )  # fmt: skip
    return entries


@st.composite
def extents_added(draw: st.DrawFn) -> Added:
    stride = PAGE * draw(st.integers(2, 40))
    return Added(
        draw(extent_ids), draw(words), stride, draw(st.binary(min_size=32, max_size=32)),
        draw(entry_arrays(stride)), draw(st.booleans()),
    )  # fmt: skip


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    kind = draw(st.sampled_from(BatchKind))
    number, published = draw(words), draw(words)
    if kind in (BatchKind.ADD, BatchKind.SNAPSHOT):
        return Batch(kind, number, published, added=tuple(draw(st.lists(extents_added(), max_size=3))))
    if kind is BatchKind.GONE:
        return Batch(kind, number, published, gone=tuple(draw(st.lists(extent_ids, max_size=5))))
    touched = draw(
        st.lists(
            st.builds(
                Touched,
                st.integers(0, 2**32 - 1),
                st.lists(words, max_size=5).map(lambda each: np.array(each, np.uint64)),
            ),
            max_size=3,
        )
    )
    return Batch(kind, number, published, touched=tuple(touched))


def same(first: Batch, second: Batch) -> bool:
    return encode_batch(first) == encode_batch(second) and first.kind is second.kind


@given(st.lists(batches(), max_size=4))
def test_batches_come_back_as_they_were(many: list[Batch]) -> None:
    data = b"".join(encode_batch(batch) for batch in many)
    found, end, tail = decode_batches(data)
    assert end == len(data) and tail is Tail.NOTHING
    assert len(found) == len(many) and all(map(same, found, many))
    for before, after in zip(many, found, strict=True):
        assert [one.extent for one in after.added] == [one.extent for one in before.added]
        assert all((a.entries == b.entries).all() for a, b in zip(after.added, before.added, strict=True))
        assert after.gone == before.gone


@given(batches(), batches(), st.data())
def test_a_batch_that_is_cut_off_is_short(first: Batch, second: Batch, data: st.DataObject) -> None:
    whole, more = encode_batch(first), encode_batch(second)
    cut = data.draw(st.integers(1, len(more) - 1))
    found, end, tail = decode_batches(whole + more[:cut])
    assert len(found) == 1 and end == len(whole) and tail is Tail.SHORT
    # The rest comes later: reading goes on where it stopped.
    found, end, tail = decode_batches(whole + more, end)
    assert len(found) == 1 and same(found[0], second) and tail is Tail.NOTHING


@given(batches(), batches(), batches(), st.data())
def test_damage_is_never_another_batch(
    first: Batch, second: Batch, third: Batch, data: st.DataObject
) -> None:
    parts = [encode_batch(batch) for batch in (first, second, third)]
    at = data.draw(st.integers(0, len(parts[1]) - 1))
    spoiled = bytearray(parts[1])
    spoiled[at] ^= data.draw(st.integers(1, 255))
    whole = parts[0] + bytes(spoiled) + parts[2]
    found, end, tail = decode_batches(whole)
    assert len(found) == 1 and end == len(parts[0])
    assert tail in (Tail.WRONG, Tail.SHORT)
    place = find_batch(whole, end + 1)
    assert place == len(parts[0]) + len(parts[1])
    assert same(decode_batches(whole, place)[0][0], third)


@given(st.binary(max_size=300))
def test_any_bytes_decode_to_something(data: bytes) -> None:
    found, end, _ = decode_batches(data)
    assert end <= len(data) and (found == []) == (end == 0)
    assert Footer.decode(data, ExtentId(1, 2)) is None
    for kind in (FolderSettings, Beat, Grants):
        kind.decode(data)


@given(extents_added(), st.data())
def test_footers(added: Added, data: st.DataObject) -> None:
    slots = len(added.entries) + data.draw(st.integers(0, 3))
    footer = Footer(added.extent, added.stride, added.namespace, slots, added.entries)
    encoded = footer.encode()
    assert len(encoded) % PAGE == 0 and Footer.size_in(encoded) == len(encoded)
    before = data.draw(st.binary(max_size=50))
    back = Footer.decode(before + encoded, added.extent)
    assert back is not None and (back.entries == added.entries).all()
    assert (back.stride, back.namespace, back.slots) == (added.stride, added.namespace, slots)
    assert Footer.decode(encoded, ExtentId(added.extent.member ^ 1, added.extent.sequence)) is None
    assert Footer.decode(encoded[:-1], added.extent) is None
    body = len(added.entries) * ENTRY_DTYPE.itemsize
    places = st.integers(len(encoded) - TRAILER_BYTES, len(encoded) - 1)
    at = data.draw(st.one_of(st.integers(0, body - 1), places) if body else places)
    spoiled = bytearray(encoded)
    spoiled[at] ^= 1
    assert Footer.decode(bytes(spoiled), added.extent) is None


@given(words, st.integers(0, 10**12))
def test_names(member: int, number: int) -> None:
    assert parse_member_file(beat_name(member)) == MemberFile(member, "beat", 0)
    assert parse_member_file(journal_name(member, number)) == MemberFile(member, "journal", number)
    assert parse_member_file(access_name(member, number)) == MemberFile(member, "access", number)
    assert parse_numbered(epoch_name(number), "epoch") == number
    extent = ExtentId(member, number)
    assert (
        ExtentId.parse(extent.name) == ExtentId.parse(extent.part) == ExtentId.parse(extent.word) == extent
    )
    assert -(2**63) <= extent.segment < 2**63


@pytest.mark.parametrize(
    "name",
    ["", "x", "lost+found", "0123456789ABCDEF", "0123456789abcde", ".nfs000000", "0" * 17, "\u0660" * 16],
)
def test_foreign_names(name: str) -> None:
    assert parse_member(name) is None
    assert ExtentId.parse(f"extents/{name}") is None
    assert parse_member_file(f"members/{name}/beat") is None
    assert parse_numbered(f"collector/epoch-{name}", "epoch") is None


@pytest.mark.parametrize(
    "name", ["journal-01", "journal--1", "journal-1.tmp", "journal-", "beat.x.tmp", "journal-\u0663"]
)
def test_foreign_files_of_members(name: str) -> None:
    assert parse_member_file(f"members/{'0' * 16}/{name}") is None


@given(st.integers(1, 10**8), st.integers(1, 2**31))
def test_slots_fit_into_what_they_are_given(block_bytes: int, size: int) -> None:
    stride = slot_stride(block_bytes)
    slots = slots_within(size, stride)
    assert slots == 0 or extent_bytes(slots, stride) <= size
    assert extent_bytes(slots + 1, stride) > size


@given(st.dictionaries(words, st.builds(Grant, st.integers(0, 2**60), st.integers(0, 2**60)), max_size=4))
def test_grants(members: dict[int, Grant]) -> None:
    grants = Grants(3, "ab", 7, 100, 200, members=members)
    assert Grants.decode(grants.encode()) == grants


SMALL = [
    FolderSettings("ab", 10, 5, 1.5, "0.1"),
    Beat("ab", 3, "open", 10, 20, True, "host", 7, "0.1", 100, 10.0),
    Grants(1, "ab", members={5: Grant(7)}),
]


@pytest.mark.parametrize("small", SMALL, ids=lambda small: type(small).__name__)
def test_small_files(small: FolderSettings | Beat | Grants) -> None:
    data = small.encode()
    assert type(small).decode(data) == small
    raw = json.loads(data)
    assert type(small).decode(json.dumps({**raw, "from_a_later_version": [1]}).encode()) == small
    for name, value in raw.items():
        for wrong in (None, [], {}, "x" if not isinstance(value, str) else 1, True, 1e400):
            if isinstance(wrong, bool) and isinstance(value, bool):
                continue
            if isinstance(value, dict) and wrong == {}:
                continue
            if name == "format" and isinstance(wrong, str):
                continue
            spoiled = json.dumps({**raw, name: wrong}).encode()
            assert type(small).decode(spoiled) is None, (name, wrong)


def test_settings_of_another_version_decode() -> None:
    settings = FolderSettings("ab", 10, 5, 1.5, version=9)
    assert FolderSettings.decode(settings.encode()) == settings
    assert FolderSettings.decode(FolderSettings("ab", 0, 5, 1.5).encode()) is None
