"""Which engine moves the blocks of the nvme tier, and that it is said when it is not what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from contracts.tier import silent
from faulty_io import FaultyIO
from kvstrata.config import IoEngine, NvmeTierConfig, StoreConfig
from kvstrata.tiers import NvmeTier, nvme
from kvstrata.transfer.file_io import FileIO, supports_direct
from kvstrata.transfer.ring import ring_refused
from kvstrata.types import BlockLayout
from store_kit import NAMESPACE, descriptors


def opened(folder: Path, engine: IoEngine, *, direct_io: bool = True, io: FileIO | None = None) -> NvmeTier:
    tier = NvmeTier(
        NvmeTierConfig(path=str(folder), capacity_bytes=4 * 2**20, direct_io=direct_io),
        BlockLayout(8192, 1),
        NAMESPACE,
        StoreConfig(io_engine=engine, io_threads=4, io_store_threads=2, io_depth=6),
        silent(),
        io or FileIO(),
    )
    tier.open()
    return tier


def kind(tier: NvmeTier) -> tuple[str, int, int]:
    """Of its engine, with units in flight and how many of them store."""
    settings = tier._running.settings
    io_threads = [thread for thread in tier._running._threads if thread.is_alive()]
    assert 1 <= len(io_threads) <= settings.workers
    assert settings.kind == "ring" or len(io_threads) == settings.workers
    return settings.kind, settings.workers, settings.store_workers


def said(tier: NvmeTier) -> list[str]:
    return [event.detail for event in tier.telemetry.events() if event.kind == "nvme without io_uring"]


@pytest.mark.parametrize("asked", ["auto", "io_uring"])
def test_a_ring_where_it_can_be_had(asked: IoEngine, tmp_path: Path) -> None:
    if ring_refused() or not supports_direct(FileIO(), tmp_path):
        pytest.skip("no io_uring or no O_DIRECT here")
    tier = opened(tmp_path, asked)
    assert kind(tier) == ("ring", 6, 3) and said(tier) == []
    tier.close(clean=True)


def test_threads_when_they_are_asked_for(tmp_path: Path) -> None:
    tier = opened(tmp_path, "threads")
    assert kind(tier) == ("threads", 4, 2) and said(tier) == []
    tier.close(clean=True)


@pytest.mark.parametrize("asked", ["auto", "io_uring"])
def test_threads_where_the_kernel_refuses(
    asked: IoEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvme, "ring_refused", lambda *depth: "io_uring: Operation not permitted")
    before = descriptors()
    tier = opened(tmp_path, asked)
    assert kind(tier) == ("threads", 4, 2)
    if supports_direct(FileIO(), tmp_path):
        assert said(tier) == [f"{tmp_path}: io_uring: Operation not permitted"]
    tier.close(clean=True)
    assert descriptors() == before


def test_threads_for_buffered_files(tmp_path: Path) -> None:
    tier = opened(tmp_path, "auto", direct_io=False)
    assert kind(tier) == ("threads", 4, 2)
    assert said(tier) == [f"{tmp_path}: no O_DIRECT in this folder"]
    tier.close(clean=True)


def test_threads_for_a_file_layer_of_another_kind(tmp_path: Path) -> None:
    tier = opened(tmp_path, "io_uring", io=FaultyIO())
    assert kind(tier) == ("threads", 4, 2) and said(tier) == []
    tier.close(clean=True)


def test_an_engine_that_cannot_be_made_leaves_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tier is tried again later: it must not stand in its own way."""
    before = descriptors()

    def fail(*args: object, **settings: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(nvme, "Engine", fail)
        with pytest.raises(OSError, match="Too many open files"):
            opened(tmp_path, "auto")
    assert descriptors() == before
    opened(tmp_path, "auto").close(clean=True)
    assert descriptors() == before
