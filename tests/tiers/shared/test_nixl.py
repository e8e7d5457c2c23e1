"""A shared folder whose blocks NIXL moves, read by the engine and the other way round."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

import pytest

from kvstrata.config import Config, SharedFsTierConfig
from kvstrata.store import BlockStore
from kvstrata.types import BlockKey, BlockLayout, Namespace, Outcome
from store_kit import chain, content, eventually, store_config

SIZE = 65_536
needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl_cu12") is None, reason="nixl-cu12 is not installed"
)


def open_store(folder: Path, mover: Literal["engine", "nixl"]) -> BlockStore:
    tier = SharedFsTierConfig(
        path=str(folder), capacity_bytes=256 << 20, refresh_seconds=0.1, publish_seconds=0.1, mover=mover
    )
    return BlockStore(Config(store_config(), (tier,)), BlockLayout(SIZE, 16), Namespace(b"n" * 32))


def save(store: BlockStore, keys: list[BlockKey]) -> None:
    def saved() -> bool:
        transfer = store.save(keys, [content(key, SIZE) for key in keys])
        assert transfer.wait(10)
        return all(outcome in (Outcome.SAVED, Outcome.PRESENT) for outcome in transfer.outcomes)

    eventually(saved, "there was no room", 20)
    assert store.flush(20)


def check(store: BlockStore, keys: list[BlockKey]) -> None:
    eventually(lambda: store.lookup(keys).blocks == len(keys), "blocks did not show up", 20)
    targets = [bytearray(SIZE) for _ in keys]
    transfer = store.load(store.lookup(keys), targets)
    assert transfer.wait(10) and set(transfer.outcomes) == {Outcome.LOADED}
    assert [bytes(target) for target in targets] == [content(key, SIZE) for key in keys]


@needs_nixl
@pytest.mark.parametrize(("writer", "reader"), [("nixl", "engine"), ("engine", "nixl")])
def test_both_movers_understand_each_other(
    tmp_path: Path, writer: Literal["engine", "nixl"], reader: Literal["engine", "nixl"]
) -> None:
    keys = chain(0, 16)
    with open_store(tmp_path, writer) as store:
        save(store, keys)
        check(store, keys)
    with open_store(tmp_path, reader) as store:
        check(store, keys)
        assert store.tiers[0].counts.loads > 0
