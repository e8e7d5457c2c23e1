"""A mounted folder as a medium: small files, whole or not at all, seen by whoever opens them anew."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from kvstrata.tiers.shared.format import FOLDERS, ExtentId
from kvstrata.tiers.shared.medium import PosixMedium

MEMBER = "members/0123456789abcdef"


@pytest.fixture
def medium(tmp_path: Path) -> PosixMedium:
    made = PosixMedium(tmp_path / "deep" / "folder", "me")
    made.prepare()
    return made


def test_prepare_makes_the_tree_and_leaves_what_is_there(medium: PosixMedium) -> None:
    (medium.root / "members" / "kept").write_text("x")
    medium.prepare()
    assert sorted(path.name for path in medium.root.iterdir()) == sorted(FOLDERS)
    assert medium.fetch("members/kept") == b"x"


def test_create_is_exclusive(medium: PosixMedium) -> None:
    assert medium.create("collector/epoch-1", b"first")
    assert not medium.create("collector/epoch-1", b"second")
    assert medium.fetch("collector/epoch-1") == b"first"
    names = [path.name for path in (medium.root / "collector").iterdir()]
    assert names == ["epoch-1"], "a temporary file is left"


def test_one_of_many_creates(medium: PosixMedium) -> None:
    made: list[int] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        mine = PosixMedium(medium.root)
        start.wait()
        for epoch in range(20):
            if mine.create(f"collector/epoch-{epoch}", str(number).encode()):
                made.append(epoch)
                assert mine.fetch(f"collector/epoch-{epoch}") == str(number).encode()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == list(range(20))


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
def test_create_without_hard_links(medium: PosixMedium, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert medium.create("collector/epoch-1", b"first")
    assert not medium.create("collector/epoch-1", b"second")
    assert medium.fetch("collector/epoch-1") == b"first"


def test_a_link_whose_answer_was_lost(medium: PosixMedium, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server made it and answered a retry that it is there: it is ours."""
    real = os.link

    def twice(source: Path, target: Path) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert medium.create("collector/epoch-1", b"mine")


def test_replace_shows_old_or_new(medium: PosixMedium) -> None:
    medium.create(f"{MEMBER}/beat", b"a" * 5000)
    seen: set[bytes | None] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(medium.fetch(f"{MEMBER}/beat"))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        medium.replace(f"{MEMBER}/beat", b"ab"[number % 2 : number % 2 + 1] * 5000)
    done.set()
    reader.join()
    assert seen <= {b"a" * 5000, b"b" * 5000}


def test_a_removed_member_does_not_come_back(medium: PosixMedium) -> None:
    medium.create(f"{MEMBER}/beat", b"1")
    medium.append(f"{MEMBER}/journal-0", 0, b"abc")
    medium.remove_folder(MEMBER)
    for call in (
        lambda: medium.replace(f"{MEMBER}/beat", b"2"),
        lambda: medium.append(f"{MEMBER}/journal-0", 3, b"def"),
        lambda: medium.append(f"{MEMBER}/journal-1", 0, b"def"),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.ENOENT
    assert medium.folders("members") == []
    medium.remove_folder(MEMBER)
    medium.remove(f"{MEMBER}/beat")


def test_an_append_that_failed_is_made_again(medium: PosixMedium) -> None:
    medium.create(f"{MEMBER}/beat", b"1")
    name = f"{MEMBER}/journal-0"
    medium.append(name, 0, b"abc")
    (medium.root / name).write_bytes(b"abcde")  # a piece of the next one came through
    medium.append(name, 3, b"defg")
    assert medium.fetch(name) == b"abcdefg"
    assert medium.fetch(name, 5) == b"fg" and medium.fetch(name, 9) == b""
    assert medium.fetch("members/none/beat") is None


def test_tails_are_what_is_new_and_wanted(medium: PosixMedium) -> None:
    other = "members/fedcba9876543210"
    for member in (MEMBER, other):
        medium.create(f"{member}/beat", b"beat")
        medium.append(f"{member}/journal-0", 0, b"0123456789")
        medium.append(f"{member}/access-0", 0, b"zz")
    (medium.root / MEMBER / "beat.someone.tmp").write_text("half")
    (medium.root / "members" / "a file").write_text("foreign")
    known = {f"{MEMBER}/journal-0": 4, f"{other}/journal-0": 10}
    found = medium.tails(known, "members", lambda name: "access" not in name)
    assert found == {f"{MEMBER}/beat": b"beat", f"{other}/beat": b"beat", f"{MEMBER}/journal-0": b"456789"}
    assert medium.tails({}, "nowhere") == {}


def test_much_comes_in_several_calls(medium: PosixMedium, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstrata.tiers.shared.medium.TAILS_BYTES", 15)
    for number in range(4):
        medium.create(f"members/{number:016x}/journal-0", b"0123456789")
    known: dict[str, int] = {}
    sizes = []
    while found := medium.tails(known, "members"):
        sizes.append(len(found))
        known |= {name: known.get(name, 0) + len(data) for name, data in found.items()}
    assert sizes == [2, 2] and len(known) == 4


def test_names_and_folders(medium: PosixMedium) -> None:
    medium.create(f"{MEMBER}/beat", b"beat")
    medium.create("extents/a", b"x" * 10_000)
    occupied = medium.names("extents")
    assert list(occupied) == ["extents/a"] and occupied["extents/a"] % 512 == 0
    assert occupied["extents/a"] >= 10_000
    assert medium.names("members") == {} and medium.folders("members") == [MEMBER.split("/")[1]]
    assert medium.names("nowhere") == {} and medium.folders("nowhere") == []


def test_extents(medium: PosixMedium) -> None:
    extent = ExtentId(1, 2)
    occupied = medium.write_extent(extent.name, iter([b"a" * 4096, b"b" * 4096]))
    assert occupied >= 8192 and medium.names("writing") == {}
    assert medium.read_extent(extent.name, 4000, 200) == b"a" * 96 + b"b" * 104
    assert medium.read_extent(extent.name, -10, 10) == b"b" * 10
    assert medium.read_extent(extent.name, -(10**6), 4) == b"aaaa"
    assert medium.read_extent(ExtentId(1, 3).name, 0, 10) is None


def test_an_extent_that_cannot_be_written_leaves_nothing(medium: PosixMedium) -> None:
    def pieces() -> object:
        yield b"a" * 4096
        raise OSError(errno.EIO, "the source failed")

    with pytest.raises(OSError, match="source failed"):
        medium.write_extent(ExtentId(1, 2).name, pieces())
    assert medium.names("writing") == {} and medium.names("extents") == {}
