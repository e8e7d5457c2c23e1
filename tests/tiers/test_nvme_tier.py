"""The nvme tier keeps the contract of a local tier, with and without O_DIRECT, and its bound."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from contracts.tier import TierContract, silent
from kvstrata.config import IoEngine, NvmeTierConfig, StoreConfig
from kvstrata.errors import ConfigError
from kvstrata.table import Placement
from kvstrata.tiers import NvmeTier
from kvstrata.tiers.engine_tier import LocalTier
from kvstrata.tiers.nvme_format import PROBE_FILE
from kvstrata.transfer.buffers import PAGE
from kvstrata.transfer.file_io import FileIO
from kvstrata.types import BlockLayout
from store_kit import (
    NAMESPACE,
    bytes_on_medium,
    chain,
    content,
    descriptors,
    overwrite,
    read_at,
    segments_of,
    slots_of,
)


class NvmeContract(TierContract):
    persistent = True
    direct_io: bool
    engine: IoEngine = "auto"

    def make(
        self,
        folder: Path,
        layout: BlockLayout,
        *,
        capacity_bytes: int = 4 * 2**20,
        ttl_seconds: float = 0.0,
    ) -> NvmeTier:
        config = NvmeTierConfig(
            path=str(folder),
            capacity_bytes=capacity_bytes,
            ttl_seconds=ttl_seconds,
            direct_io=self.direct_io,
        )
        store = StoreConfig(io_engine=self.engine)
        return NvmeTier(config, layout, NAMESPACE, store, silent(), FileIO())

    def damage(self, tier: LocalTier, placement: Placement) -> None:
        assert isinstance(tier, NvmeTier)
        [slot] = [slot for slot in slots_of(tier.folder) if slot.key == placement.key]
        at = slot.offset + PAGE + 1234
        overwrite(slot.path, at, bytes([read_at(slot.path, at, 1)[0] ^ 16]))

    def check_medium(self, tier: LocalTier, capacity_bytes: int = 4 * 2**20) -> None:
        super().check_medium(tier, capacity_bytes)
        assert isinstance(tier, NvmeTier)
        # The tier's own count is what du says: nothing that it writes is left out.
        assert tier.used_bytes_on_medium() == bytes_on_medium(tier.folder)

    def test_segments_are_made_when_needed_and_written_whole(self, tier: LocalTier) -> None:
        assert isinstance(tier, NvmeTier)
        assert segments_of(tier.folder) == []
        self.put(tier, chain(0, 1), 8192)
        [segment] = segments_of(tier.folder)
        stat = segment.stat()
        assert stat.st_blocks * 512 >= stat.st_size, "a segment has holes: the disk may fill up later"
        tier.close(clean=True)

    def test_no_file_is_left_by_probes(self, tier: LocalTier) -> None:
        assert isinstance(tier, NvmeTier)
        for _ in range(3):
            tier.probe_write()
        assert not (tier.folder / PROBE_FILE).exists()
        assert list(tier.folder.glob("*.probe")) == []
        tier.close(clean=True)

    def test_descriptors_come_back(self, tmp_path: Path) -> None:
        before = descriptors()
        for _ in range(5):
            tier = self.make(tmp_path / "tier", BlockLayout(8192, 1))
            tier.open()
            for number in range(100):
                self.put(tier, chain(number, 2), 8192)
            tier.close(clean=True)
        assert descriptors() == before

    def test_leftovers_are_cleared_and_count_until_then(self, tmp_path: Path) -> None:
        folder = tmp_path / "tier"
        folder.mkdir()
        (folder / "index.kv.tmp").write_bytes(bytes(50_000))
        (folder / "direct.probe").write_bytes(bytes(4096))
        tier = self.make(folder, BlockLayout(8192, 1))
        assert tier.used_bytes_on_medium() >= 54_000
        tier.open()
        assert list(folder.glob("*.tmp")) == [] and list(folder.glob("*.probe")) == []
        tier.close(clean=True)

    def test_too_small_for_one_block(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="raise it"):
            self.make(tmp_path, BlockLayout(8192, 1), capacity_bytes=130_000)

    @pytest.mark.parametrize("capacity_bytes", [200_000, 250_000, 300_000, 1_234_567, 3_000_000])
    @pytest.mark.parametrize("block_bytes", [1, 4096, 20_000])
    def test_every_planned_slot_fits(self, capacity_bytes: int, block_bytes: int, tmp_path: Path) -> None:
        tier = self.make(tmp_path / "tier", BlockLayout(block_bytes, 1), capacity_bytes=capacity_bytes)
        slots = tier.open().slots
        for number in range(slots + 3):
            self.put(tier, chain(number, 1), block_bytes)
        assert tier.table.resident_blocks == slots
        self.check_medium(tier, capacity_bytes)
        tier.close(clean=True)
        # The index is there now too, and it was counted.
        assert bytes_on_medium(tmp_path / "tier") <= capacity_bytes
        # All but the reserves and at most one slot's room is used.
        assert slots * (PAGE + -(-block_bytes // PAGE) * PAGE) > 0.4 * (capacity_bytes - 190_000)


class TestDirect(NvmeContract):
    direct_io = True

    def test_the_payload_really_goes_around_the_page_cache(self, tmp_path: Path) -> None:
        tier = self.make(tmp_path / "tier", BlockLayout(8192, 1))
        tier.open()
        self.put(tier, chain(0, 1), 8192)
        [segment] = segments_of(tmp_path / "tier")
        flags = set()
        for link in list(Path("/proc/self/fd").iterdir()):
            if link.is_symlink() and str(link.readlink()) == str(segment):
                text = Path(f"/proc/self/fdinfo/{link.name}").read_text()
                flags.add(int(text.split("flags:")[1].split()[0], 8) & os.O_DIRECT)
        assert flags == {os.O_DIRECT}
        tier.close(clean=True)


class TestDirectInThreads(TestDirect):
    engine = "threads"


class TestBuffered(NvmeContract):
    direct_io = False


class NoDirect(FileIO):
    """A file system without O_DIRECT."""

    def __init__(self, at_write: bool) -> None:
        self._at_write = at_write
        self._direct: set[int] = set()

    def open(self, path: Path, *, create: bool, direct: bool) -> int:
        if direct and not self._at_write:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd = super().open(path, create=create, direct=False)
        if direct:
            self._direct.add(fd)
        return fd

    def write(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        if fd in self._direct:
            self._direct.discard(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().write(fd, views, offset)


@pytest.mark.parametrize("at_write", [False, True])
def test_without_direct_io_it_goes_buffered_and_says_so(at_write: bool, tmp_path: Path) -> None:
    telemetry = silent()
    tier = NvmeTier(
        NvmeTierConfig(path=str(tmp_path)), BlockLayout(8192, 1), NAMESPACE, StoreConfig(), telemetry,
        NoDirect(at_write),
    )  # fmt: skip
    tier.open()
    assert "nvme buffered" in [event.kind for event in telemetry.events()]
    contract = TestBuffered()
    contract.put(tier, chain(0, 2), 8192)
    assert contract.get(tier, chain(0, 1)[0], 8192) == content(chain(0, 1)[0])
    tier.close(clean=True)
