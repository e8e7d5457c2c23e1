"""Real mounts that fail under shared_fs, alone and below an nvme tier: counted, survived, explained.

A healthy member works on the folder itself, the others see it through a mount that breaks. What can be
served is served, with the right bytes; the rest is a miss in time; nobody else notices; afterwards all is
as before. `test_shared_faults.py` has the faults that need no mount.
"""

from __future__ import annotations

import contextlib
import errno
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_kit import DEADLINE_SECONDS, OWN, THEIRS, await_found, open_member, published, shared, told
from fs_kit import events

from backends.faultfs import OPERATIONS, FaultFs
from backends.gluster import GlusterMount, GlusterVolume
from backends.loopfs import LoopFs
from kvstrata.config import KIB, MIB
from kvstrata.store import BlockStore
from kvstrata.types import BlockKey, Lookup, Outcome
from store_kit import (
    LAYOUT,
    WAIT_SECONDS,
    chain,
    check_bytes,
    check_quiet,
    eventually,
    load,
    save,
)


@dataclass
class Scene:
    """healthy: on the folder itself, where THEIRS was written. alone, cached: through the mount, the second
    with an nvme tier before it; each wrote OWN blocks of its own."""

    healthy: BlockStore
    alone: BlockStore
    cached: BlockStore

    @property
    def victims(self) -> tuple[BlockStore, BlockStore]:
        return self.alone, self.cached

    @staticmethod
    def own(victim: int) -> list[BlockKey]:
        return chain(10 + victim, 8)

    def check_healthy(self, number: int) -> None:
        """Whoever is not behind the fault writes and reads as ever."""
        keys = chain(100 + number, 4)
        published(self.healthy, keys)
        assert load(self.healthy, keys) == [Outcome.LOADED] * 4

    def check_cache(self) -> None:
        """What lies on the local disk is served whatever the shared storage does."""
        assert load(self.cached, self.own(1)) == [Outcome.LOADED] * 8
        keys = chain(50, 4)
        assert save(self.cached, keys) == [Outcome.SAVED] * 4
        assert load(self.cached, keys) == [Outcome.LOADED] * 4

    def check_back(self, wake: bool = True) -> None:
        """Everything goes on by itself, once somebody asks for something."""
        for number, store in enumerate(self.victims):

            def in_service(store: BlockStore = store) -> bool:
                save(store, chain(200 + int(time.monotonic() * 1000) % 10**6, 1))
                store.lookup(THEIRS)
                return shared(store).readable and shared(store).writable

            told(store, in_service, "the tier does not come back")
            await_found(store, THEIRS)
            assert load(store, THEIRS) == [Outcome.LOADED] * 8
            if number == 0:
                keys = chain(60, 4)
                published(store, keys)
                await_found(self.healthy, keys)
                assert load(self.healthy, keys) == [Outcome.LOADED] * 4
        for store in (self.healthy, *self.victims):
            check_quiet(store)

    def counted(self, name: str, *labels: str) -> None:
        for store in self.victims:
            assert store.telemetry.value(name, "shared_fs", *labels) > 0, (name, labels, events(store))

    def explained(self, *words: str) -> None:
        """In the events, for whoever reads them later, or in the status now."""
        for store in self.victims:
            text = events(store) + store.status()[-1].reason
            assert all(word in text for word in words), (words, text)


@contextmanager
def make_scene(faults: FaultFs, tmp_path: Path, **fields: object) -> Iterator[Scene]:
    folder = faults.below / "shared"
    with ExitStack() as stack:
        healthy = stack.enter_context(open_member(folder, **fields))
        published(healthy, THEIRS)
        mounted = faults.path / "shared"
        alone = stack.enter_context(open_member(mounted, **fields))
        cached = stack.enter_context(open_member(mounted, tmp_path / "nvme", **fields))
        made = Scene(healthy, alone, cached)
        for number, store in enumerate(made.victims):
            await_found(store, THEIRS)
            # One extent is open when the fault comes, and it was read.
            assert load(store, THEIRS[:4]) == [Outcome.LOADED] * 4
            published(store, made.own(number))
        yield made
        faults.mount()


@pytest.fixture
def scene(faults: FaultFs, tmp_path: Path) -> Iterator[Scene]:
    with make_scene(faults, tmp_path) as made:
        yield made


def out_of_service(scene: Scene) -> None:
    """The tier of each victim is noticed to be gone; nothing hangs, and loads are misses."""
    for store in scene.victims:
        targets = [bytearray(LAYOUT.block_bytes) for _ in THEIRS]
        transfer = store.load(store.lookup(THEIRS), targets)
        # Settled by the deadline, while the fault lasts.
        assert transfer.wait(WAIT_SECONDS)
        check_bytes(THEIRS, targets, transfer.outcomes)
        told(store, lambda store=store: not shared(store).readable, "the fault is not noticed")
        assert store.lookup(THEIRS).blocks == 0
        assert set(load(store, THEIRS)) <= {Outcome.UNAVAILABLE, Outcome.ABSENT}
    refused = {Outcome.UNAVAILABLE, Outcome.REJECTED, Outcome.IO_ERROR, Outcome.LATE}
    assert set(save(scene.alone, chain(70, 4))) <= refused


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENODEV])
def test_every_call_answers_an_error(faults: FaultFs, scene: Scene, code: int) -> None:
    faults.fail(OPERATIONS, code)
    out_of_service(scene)
    scene.check_cache()
    scene.check_healthy(1)
    scene.counted("breaker_opened_total")
    scene.explained("read unavailable")
    faults.heal()
    scene.check_back()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_only_blocks_cannot_be_read(faults: FaultFs, scene: Scene, code: int) -> None:
    """Those of one extent."""
    [name] = [
        extent.id.name for extent in shared(scene.healthy).catalog.extents() if len(extent.entries) == 8
        and extent.id.member == shared(scene.healthy).session.member.id  # type: ignore[union-attr]
    ]  # fmt: skip
    faults.fail(("open", "read"), code, path=f"*{name}")
    for number, store in enumerate(scene.victims):
        assert set(load(store, THEIRS)) <= {Outcome.IO_ERROR, Outcome.ABSENT, Outcome.UNAVAILABLE}
        assert store.telemetry.value("misses_total", "shared_fs") > 0
        if shared(store).readable:
            assert load(store, scene.own(number)) == [Outcome.LOADED] * 8
    scene.check_healthy(1)
    scene.check_cache()
    scene.counted("io_errors_total", "read", errno.errorcode[code])
    faults.heal()
    scene.check_back()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_nothing_can_be_changed(faults: FaultFs, scene: Scene, code: int) -> None:
    faults.refuse_changes(code)
    for number, store in enumerate(scene.victims):
        eventually(
            lambda store=store: save(store, chain(80, 4)) is not None and not shared(store).writable,
            "it is not noticed that nothing can be written",
        )
        assert shared(store).readable
        assert load(store, THEIRS) == [Outcome.LOADED] * 8
        assert load(store, scene.own(number)) == [Outcome.LOADED] * 8
    assert set(save(scene.alone, chain(81, 4))) <= {Outcome.UNAVAILABLE, Outcome.REJECTED}
    # What others publish is found all the same.
    new = chain(82, 4)
    published(scene.healthy, new)
    for store in scene.victims:
        await_found(store, new)
        assert load(store, new) == [Outcome.LOADED] * 4
    scene.check_cache()
    scene.counted("breaker_opened_total", "write")
    name = errno.errorcode[code]
    for store in scene.victims:
        assert sum(
            value
            for labels, value in store.telemetry.counters()["io_errors_total"].items()
            if labels[0] == "shared_fs" and labels[2] == name
        )
    scene.explained("write unavailable")
    faults.heal()
    scene.check_back()


def test_every_call_takes_50_ms(faults: FaultFs, tmp_path: Path) -> None:
    """With the times that a configuration has by default, but for how often it is looked."""
    with make_scene(faults, tmp_path, deadline_seconds=5.0, lease_seconds=10.0) as scene:
        faults.delay(OPERATIONS, 0.05)
        for number, store in enumerate(scene.victims):
            assert load(store, THEIRS) == [Outcome.LOADED] * 8
            assert load(store, scene.own(number)) == [Outcome.LOADED] * 8
        keys = chain(83, 4)
        published(scene.alone, keys)
        await_found(scene.healthy, keys)
        scene.check_cache()
        scene.check_healthy(1)
        for store in scene.victims:
            assert store.telemetry.value("breaker_opened_total") == 0, events(store)
            assert store.telemetry.value("rejoins_total") == 0, events(store)
        faults.heal()
        scene.check_back()


def test_every_call_hangs_and_goes_on(faults: FaultFs, scene: Scene) -> None:
    faults.hang(OPERATIONS)
    out_of_service(scene)
    scene.check_cache()
    scene.check_healthy(1)
    scene.counted("breaker_opened_total", "read")
    scene.explained(f"no answer for {DEADLINE_SECONDS:g} s")
    faults.heal()
    scene.check_back()


@pytest.mark.parametrize("end", [FaultFs.unmount, FaultFs.kill], ids=["unmounted", "client killed"])
def test_the_mount_goes_and_comes_back(
    faults: FaultFs, scene: Scene, end: Callable[[FaultFs], None]
) -> None:
    end(faults)
    out_of_service(scene)
    scene.check_cache()
    scene.check_healthy(1)
    scene.counted("breaker_opened_total", "read")
    if end is FaultFs.unmount:

        def said() -> bool:
            for store in scene.victims:
                store.lookup(THEIRS)  # somebody has to ask, so that it is looked again
            folder = faults.path / "shared"
            return all(
                f"{folder} is not there" in events(store) + store.status()[-1].reason
                for store in scene.victims
            )

        eventually(said, "nobody says that the folder is not mounted")
        assert list(faults.path.iterdir()) == [], "something was written below the mount point"
    faults.mount()
    scene.check_back()


# Real file systems that are full, read-only or without a server


def test_a_full_file_system(small_fs: LoopFs, tmp_path: Path) -> None:
    """Somebody else takes the room that the capacity promises."""
    with open_member(small_fs.path / "shared", capacity_bytes=8 * MIB) as store:
        published(store, THEIRS)
        ballast = small_fs.path / "ballast"
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(64 * KIB))
                file.flush()

        def full() -> bool:
            save(store, chain(int(time.monotonic() * 1000) % 10**6, 8))
            store.flush(WAIT_SECONDS)
            return store.telemetry.value("io_errors_total", "shared_fs") > 0

        told(store, full, "it is not noticed that nothing can be written")
        assert any(labels[2] == "ENOSPC" for labels in store.telemetry.counters()["io_errors_total"]), (
            store.telemetry.counters()["io_errors_total"]
        )
        assert load(store, THEIRS) == [Outcome.LOADED] * 8
        with open_member(small_fs.path / "shared", capacity_bytes=8 * MIB) as late:
            await_found(late, THEIRS)
            assert load(late, THEIRS) == [Outcome.LOADED] * 8
        ballast.unlink()

        def back() -> bool:
            save(store, OWN)
            store.flush(WAIT_SECONDS)
            return shared(store).writable and shared(store).table.lookup(OWN) == [Lookup.HIT] * 8

        told(store, back, "writes do not come back")
        assert load(store, OWN) == [Outcome.LOADED] * 8
        check_quiet(store)


def test_a_file_system_that_becomes_read_only(small_fs: LoopFs) -> None:
    """As the kernel makes it after an error of the disk, whatever is open."""
    with open_member(small_fs.path / "shared", capacity_bytes=8 * MIB) as store:
        published(store, THEIRS)
        subprocess.run(["mount", "-o", "remount,abort", str(small_fs.path)], check=True)
        told(store, lambda: not shared(store).writable, "it is not noticed")
        assert load(store, THEIRS) == [Outcome.LOADED] * 8
        assert set(save(store, OWN)) <= {Outcome.UNAVAILABLE, Outcome.REJECTED}
        assert store.telemetry.value("breaker_opened_total", "shared_fs", "write") > 0
        assert "Read-only file system" in events(store) + store.status()[0].reason
        with open_member(small_fs.path / "shared", capacity_bytes=8 * MIB) as late:
            await_found(late, THEIRS)
            assert load(late, THEIRS) == [Outcome.LOADED] * 8
            assert "so it is only read" in late.status()[0].reason
    small_fs.mount()  # after a repair
    with open_member(small_fs.path / "shared", capacity_bytes=8 * MIB) as store:
        await_found(store, THEIRS)
        published(store, OWN)
        assert load(store, [*THEIRS, *OWN]) == [Outcome.LOADED] * 16


def test_the_server_is_killed_and_started_again(
    gluster: tuple[GlusterVolume, list[GlusterMount]], shared_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    volume, (first, second) = gluster[0], shared_folders
    with open_member(first) as one, open_member(second, tmp_path / "nvme") as two:
        published(one, THEIRS)
        await_found(two, THEIRS)
        assert load(two, THEIRS[:4]) == [Outcome.LOADED] * 4
        assert save(two, OWN) == [Outcome.SAVED] * 8
        volume.kill_server()
        for store in (one, two):

            def noticed(store: BlockStore = store) -> bool:
                load(store, THEIRS)
                return not shared(store).readable

            told(store, noticed, "a dead server is not noticed")
            assert store.telemetry.value("breaker_opened_total", "shared_fs", "read") > 0
        assert load(two, OWN) == [Outcome.LOADED] * 8, "the local disk serves"
        volume.start_server()
        for store in (one, two):

            def back(store: BlockStore = store) -> bool:
                save(store, chain(300 + int(time.monotonic() * 1000) % 10**6, 1))
                return load(store, THEIRS) == [Outcome.LOADED] * 8 and shared(store).writable

            told(store, back, "the tier does not come back")
        published(one, chain(5, 4))
        await_found(two, chain(5, 4))
        assert load(two, chain(5, 4)) == [Outcome.LOADED] * 4


def test_the_server_is_frozen_and_thawed(
    gluster: tuple[GlusterVolume, list[GlusterMount]], shared_folders: tuple[Path, Path]
) -> None:
    volume, (first, second) = gluster[0], shared_folders
    with open_member(first) as one, open_member(second) as two:
        published(one, THEIRS)
        await_found(two, THEIRS)
        volume.freeze_server()
        try:
            targets = [bytearray(LAYOUT.block_bytes) for _ in THEIRS]
            transfer = two.load(two.lookup(THEIRS), targets)
            assert transfer.wait(WAIT_SECONDS), "a load hangs"
            check_bytes(THEIRS, targets, transfer.outcomes)
            for store in (one, two):
                told(store, lambda store=store: not shared(store).readable, "a hang is not noticed")
                assert "no answer for" in events(store)
                assert store.lookup(THEIRS).blocks == 0
        finally:
            volume.thaw_server()
        for store in (one, two):

            def back(store: BlockStore = store) -> bool:
                save(store, chain(400 + int(time.monotonic() * 1000) % 10**6, 1))
                return load(store, THEIRS) == [Outcome.LOADED] * 8 and shared(store).writable

            told(store, back, "the tier does not come back")
