"""The collector of a shared folder, on a real folder with real extents."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from folder_kit import PAGE, STRIDE, Crash, MortalMedium, Node, World, pieces, slot
from kvstrata.tiers.shared.format import ExtentId
from kvstrata.tiers.shared.grants import read_grants
from kvstrata.tiers.shared.medium import PosixMedium

BLOCKS = 7
"""Of a whole extent of 64 KiB."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def fill(world: World, node: Node, count: int, *, first: int = 0, others: tuple[Node, ...] = ()) -> int:
    """Save runs of blocks until so many are published; returns the next free number."""
    number = first
    for _ in range(20 * count):
        if number >= first + count * BLOCKS:
            break
        if node.save(list(range(number, number + BLOCKS))) is not None:
            number += BLOCKS
        else:
            world.run(node, *others)
        assert world.occupied() <= world.settings.capacity_bytes
    else:
        raise AssertionError("no room was made")
    return number


def test_the_first_member_collects_and_gives_room(world: World) -> None:
    node = world.node()
    assert node.save([1]) is None, "nobody has given it room"
    world.run(node)
    assert node.collector.holder
    world.run(node)
    assert node.save([1]) is not None
    assert node.serve() == {1: 1}


def test_a_folder_stays_within_its_capacity_and_keeps_what_is_used(world: World) -> None:
    node = world.node()
    world.run(node)
    hot = [1_000_000 + number for number in range(BLOCKS)]
    world.run(node)
    assert node.save(hot) is not None
    number = 0
    for _ in range(12):
        number = fill(world, node, 10, first=number)
        node.touch(hot)
        world.run(node)
    assert node.written > 1.5 * world.settings.capacity_bytes
    served = node.serve()
    assert set(hot) <= set(served)
    assert set(range(number - 20 * BLOCKS, number)) <= set(served), "the newest blocks are there"
    assert 0 not in served
    assert node.telemetry.value("shared_collected_bytes_total") > world.settings.capacity_bytes
    assert node.telemetry.value("evictions_total") > 0
    assert node.telemetry.value("shared_lost_blocks_total") == 0


def test_survivors_are_rewritten(world: World) -> None:
    """One block of each extent is used all the time: all of them stay, in far fewer extents."""
    node = world.node()
    world.run(node)
    world.run(node)
    number, kept = 0, list[int]()
    for _ in range(14):
        number = fill(world, node, 8, first=number)
        kept = list(range(0, number, BLOCKS))[-60:]
        node.touch(kept)
        world.run(node)
    assert node.telemetry.value("shared_rewritten_bytes_total") > 0
    served = node.serve()
    assert set(kept) <= set(served)
    assert node.telemetry.value("shared_lost_blocks_total") == 0
    assert world.occupied() <= world.settings.capacity_bytes


def test_a_damaged_block_is_not_copied(world: World) -> None:
    node = world.node()
    world.run(node)
    world.run(node)
    extent = node.save(list(range(BLOCKS)))
    assert extent is not None
    with open(world.root / extent.name, "r+b") as file:
        file.seek(3 * STRIDE + PAGE + 5)
        file.write(b"damaged")
        file.seek(5 * STRIDE)
        file.write(slot(77, extent, 4))  # whole in itself, and another block
    number = 100
    for _ in range(14):
        number = fill(world, node, 8, first=number)
        node.touch([block for block in range(100, number) if (block - 100) % BLOCKS < 3][-90:])
        node.touch([3, 5, 6])
        world.run(node)
    assert node.telemetry.value("shared_rewritten_bytes_total") > 0
    assert node.telemetry.value("shared_damaged_blocks_total") == 2
    assert not (world.root / extent.name).exists()
    assert 6 in node.serve() and not {3, 5, 77} & set(node.serve())


def test_small_extents_become_few(tmp_path: Path) -> None:
    world = World(tmp_path, capacity=2**23, extent=2**18)
    node = world.node()
    world.run(node)
    world.run(node)
    for number in range(64):
        while node.save([number], stride=STRIDE if number % 2 else 3 * PAGE) is None:
            world.run(node)
    for _ in range(12):
        world.run(node)
    assert world.extents() <= 24
    assert node.serve() == dict.fromkeys(range(64), 1)


def test_expired_blocks_make_room_first(world: World) -> None:
    node = world.node()
    world.run(node)
    world.run(node)
    mortal = node.save(list(range(BLOCKS)), expires_ms=1000)
    assert mortal is not None
    fill(world, node, 2, first=100)
    world.unix_ms = 2000
    world.run(node)
    assert node.telemetry.value("shared_expired_total") == BLOCKS
    while node.telemetry.value("shared_collected_extents_total") == 0:
        fill(world, node, 1, first=1000)
    assert node.catalog.get(mortal) is None and 100 in node.serve()


def test_what_a_dead_member_published_lives_on(world: World) -> None:
    first, second = world.node(), world.node(offset=1e6)
    world.run(first, second)
    world.run(first, second)
    assert first.collector.holder and not second.collector.holder
    assert second.save(list(range(BLOCKS))) is not None
    # A part that it was writing, an extent that it did not tell of, and half of one.
    one, two, three = (ExtentId(second.member.id, 90 + n) for n in range(3))
    (world.root / one.part).write_bytes(b"x" * 20_000)
    second.medium.write_extent(two.name, pieces(two, [500, 501]))
    second.medium.write_extent(three.name, [pieces(three, [600, 601])[0]])
    for _ in range(30):
        world.run(first)
    assert not (world.root / "members" / second.member.word).exists()
    assert not (world.root / one.part).exists() and not (world.root / three.name).exists()
    assert first.serve() == dict.fromkeys([*range(BLOCKS), 500, 501], 1)
    assert first.telemetry.value("shared_orphans_total", "shared_fs", "part") == 1
    assert first.telemetry.value("shared_orphans_total", "shared_fs", "extent") == 1
    assert first.telemetry.value("shared_adopted_extents_total") == 2
    report = first.cycle()
    assert report.outstanding_bytes <= first.allowance.limit_bytes - first.journal.published_bytes


def test_a_collector_that_dies_is_followed_after_a_lease(world: World) -> None:
    first, second = world.node(), world.node(offset=-50.0, speed=1.3)
    world.run(first, second)
    world.run(first, second)
    number = fill(world, first, 20, others=(second,))
    started = world.now
    while not second.collector.holder:
        world.run(second)
        assert world.now - started < 3 * world.settings.lease_seconds
    assert world.now - started >= world.settings.lease_seconds / 1.3
    # It waits out its quarantine before it hands out room.
    fill(world, second, 60, first=number)
    assert second.telemetry.value("shared_takeovers_total") == 1
    assert not first.collector._means.lease.check()


def test_a_clean_close_hands_over_at_once(world: World) -> None:
    first, second = world.node(), world.node()
    world.run(first, second)
    world.run(first, second)
    fill(world, first, 5, others=(second,))
    first.collector.close()
    first.member.beat(state="closed")
    world.run(second)
    assert second.collector.holder
    world.run(second)
    assert not (world.root / "members" / first.member.word).exists()
    assert set(second.serve()) == set(range(5 * BLOCKS))


def test_files_that_vanish_and_files_of_others(world: World) -> None:
    node = world.node()
    world.run(node)
    world.run(node)
    fill(world, node, 6)
    gone = node.catalog.extents()[2].id
    (world.root / gone.name).unlink()
    (world.root / "extents" / "notes.txt").write_bytes(b"n" * 40_000)
    (world.root / "writing" / "core").write_bytes(b"c" * 40_000)
    free = node.cycle().free_bytes
    for _ in range(12):
        world.run(node)
    assert node.catalog.get(gone) is None
    assert node.telemetry.value("shared_missing_extents_total") == 1
    assert (world.root / "extents" / "notes.txt").exists() and (world.root / "writing" / "core").exists()
    assert node.telemetry.value("shared_foreign_files_total") == 2
    named = [event.detail for event in node.telemetry.events() if event.kind == "shared foreign file"]
    assert len(named) == 2 and "notes.txt" in named[1]
    assert node.cycle().free_bytes <= free + 64 * 1024 - 80_000 + 8192, "they count"


def test_an_extent_that_is_gone_by_word_and_still_there_is_removed(world: World) -> None:
    node = world.node()
    world.run(node)
    world.run(node)
    fill(world, node, 3)
    extent = node.catalog.extents()[0].id
    node.journal.gone([extent])
    assert (world.root / extent.name).exists()
    for _ in range(8):
        world.run(node)
    assert not (world.root / extent.name).exists()


def test_grants_that_cannot_be_read_make_everybody_begin_anew(world: World) -> None:
    first, second = world.node(), world.node()
    world.run(first, second)
    world.run(first, second)
    number = fill(world, first, 10, others=(second,))
    first.collector.close()
    [grants] = (world.root / "collector").glob("grants-*")
    grants.write_bytes(grants.read_bytes()[:-20])
    report = second.cycle()
    assert report.holder and report.lost_blocks == 0 and report.collected_extents == 0
    for node in (first, second):
        read_grants(node.medium, node.allowance)
        assert node.allowance.expelled
        node.member.beat(state="closed")
    second.collector.close()
    third = world.node()
    for _ in range(30):
        world.run(third)
    assert set(third.serve()) == set(range(number))
    fill(world, third, 10, first=number)


def test_an_epoch_that_was_lost_and_found_goes_on(world: World) -> None:
    """Its beats came too late, and nobody took over: limits and acknowledgements still mean the same."""
    node = world.node()
    world.run(node)
    world.run(node)
    number = fill(world, node, 3)
    counter = node.allowance.counter
    world.now += world.settings.lease_seconds
    assert not node.cycle().holder
    number = fill(world, node, 60, first=number)
    assert node.collector.holder and node.cycle().epoch == 1
    assert node.allowance.counter > counter


def test_a_quiet_cycle_costs_two_calls_and_no_look_at_a_block(world: World) -> None:
    node = world.node(wrap=lambda inner: MortalMedium(inner, world.root))
    world.run(node)
    world.run(node)
    fill(world, node, 20)
    for _ in range(100):
        world.run(node, collect=False)
        if node.cycle().audited:
            break
    term = node.collector._term
    assert term is not None
    calls, visited = len(node.medium.calls), term.ledger.visited
    world.now += 1.0
    node.member.beat()
    node.collector.cycle()
    made = [call for call in node.medium.calls[calls:] if not call.startswith("replace members")]
    assert made == ["names collector", "tails "]
    assert term.ledger.visited == visited


def test_what_an_extent_with_an_unreadable_part_costs(world: World) -> None:
    """The medium answers an error: the extent is left alone, everything else goes on."""

    class Bad(PosixMedium):
        bad = ""

        def read_extent(self, name: str, offset: int, size: int) -> bytes | None:
            if name == self.bad:
                raise OSError(errno.EIO, "bad sector")
            return super().read_extent(name, offset, size)

    node = world.node(wrap=lambda inner: Bad(inner.root, inner.tag))
    world.run(node)
    world.run(node)
    first = node.save(list(range(BLOCKS)))
    assert first is not None
    node.medium.bad = first.name
    number = 100
    for _ in range(14):
        number = fill(world, node, 8, first=number)
        node.touch([block for block in range(100, number) if (block - 100) % BLOCKS < 3][-90:])
        node.touch([3, 5, 6])
        world.run(node)
    assert node.telemetry.value("shared_rewritten_bytes_total") > 0
    assert any(event.kind == "shared extent unreadable" for event in node.telemetry.events())
    assert not list((world.root / "writing").iterdir())
    node.medium.bad = ""
    assert {3, 5, 6} <= set(node.serve())


# Death at any call


def make_template(root: Path) -> tuple[World, int]:
    """A full folder: the collector is gone on purpose, a member died while it wrote."""
    world = World(root, capacity=2**21, extent=2**15)
    old = world.node()
    number = 0
    for _ in range(60):
        world.run(old)
        while old.save([number, number + 1, number + 2]) is not None:
            number += 3
        old.touch(hot_of(number))
    for _ in range(2):
        world.run(old)
    dead = world.node()
    for _ in range(4):
        world.run(old, dead)
    assert dead.save([900_001, 900_002]) is not None
    part, half = ExtentId(dead.member.id, 70), ExtentId(dead.member.id, 71)
    (world.root / part.part).write_bytes(b"x" * 8_000)
    dead.medium.write_extent(half.name, [pieces(half, [600, 601])[0]])
    for _ in range(3):
        world.run(old, dead)
        while old.save([number, number + 1, number + 2]) is not None:
            number += 3
    old.touch(hot_of(number))
    dead.touch([900_001])
    world.run(old, dead, collect=False)
    old.collector.close()
    old.member.beat(state="closed")
    dead.member.beat(state="closed")
    return world, number


def hot_of(number: int) -> list[int]:
    """A block of each of many extents, and some whole ones."""
    return [*list(range(0, number, 3))[-24:], *range(max(0, number - 12), number)]


def copy_of(template: World, root: Path) -> World:
    shutil.copytree(template.root, root)
    settings = template.settings
    world = World(root, capacity=settings.capacity_bytes, extent=settings.extent_bytes, seed=2)
    world.now = template.now
    return world


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: what is tested does a hundred times what a disk takes long for."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_a_collector_may_die_at_any_call(quick_path: Path) -> None:
    """Whatever it was doing, the next one finishes: nothing that lives is lost, nothing wrong is served."""
    template, number = make_template(quick_path / "template")
    hot = {*hot_of(number), 900_001}
    calls = play(template, quick_path / "whole", number, hot, -1, after=False)
    verbs = {call.partition("/")[0] for call in calls}
    assert {"write_extent extents", "remove extents", "remove_folder members", "replace collector"} <= verbs
    assert len(calls) > 40
    for place in range(len(calls)):
        for after in (False, True):
            play(template, quick_path / f"{place}-{after}", number, hot, place, after=after)


def play(template: World, root: Path, number: int, hot: set[int], place: int, *, after: bool) -> list[str]:
    """The collector dies at that call of its own. Returns the calls that it made."""
    world = copy_of(template, root)
    first, second = world.node(wrap=lambda inner: MortalMedium(inner, world.root)), world.node()
    world.run(first, second, collect=False)
    medium = first.medium
    begun = len(medium.calls)
    medium.dies_at, medium.after = (begun + place if place >= 0 else -1), after
    with contextlib.suppress(Crash):
        for _ in range(4):
            world.now += 0.5
            first.cycle()
            assert world.occupied() <= world.settings.capacity_bytes
    calls = medium.calls[begun:]
    if place < 0:
        assert hot <= set(first.serve())
        return list(calls)
    assert medium.dead
    for _ in range(12):
        world.run(second, seconds=2.0)
        assert world.occupied() <= world.settings.capacity_bytes
    assert second.collector.holder
    assert hot <= set(second.serve()), medium.calls[-1]
    assert not list((root / "writing").iterdir())
    published = {extent.id.word for extent in second.catalog.extents()}
    assert {file.name for file in (root / "extents").iterdir()} == published
    fill_all(world, second, number)
    assert second.telemetry.value("shared_lost_blocks_total") == 0
    shutil.rmtree(root)
    return []


def fill_all(world: World, node: Node, number: int) -> None:
    """It goes on: as much again is saved."""
    for _ in range(8):
        while node.save([number, number + 1, number + 2]) is not None:
            number += 3
        world.run(node)
        assert world.occupied() <= world.settings.capacity_bytes
    assert set(range(number - 30, number)) <= set(node.serve())
