"""The object_store tier: in a local folder, and on a real S3 server that dies and hangs."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.radosgw import RadosGateway, S3Account
from contracts.shared_tier import LAYOUT as CONTRACT_LAYOUT
from contracts.shared_tier import SharedTierContract
from kvstrata.config import Config, ObjectStoreTierConfig, StoreConfig, parse_config
from kvstrata.errors import ConfigError
from kvstrata.store import BlockStore
from kvstrata.table import Placement
from kvstrata.telemetry import Telemetry
from kvstrata.tiers.engine_tier import LocalTier
from kvstrata.tiers.shared.tier import SharedTier
from kvstrata.types import BlockLayout, Outcome
from object_kit import LAYOUT, MIB, all_loaded, local_config, publish, s3_config, save_all, tier_of
from store_kit import NAMESPACE, WAIT_SECONDS, chain, content, eventually, finished, load, save

pytest.importorskip("obstore", reason="obstore is not installed; run: pip install 'kvstrata[object-store]'")

from kvstrata.tiers.object_store import ObjectStoreTier
from kvstrata.tiers.shared.extent_file import slot_stride
from kvstrata.tiers.shared.object_client import open_client
from kvstrata.transfer.buffers import PAGE


@pytest.fixture(params=["local", "s3"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStoreTierConfig:
    if request.param == "local":
        return local_config(tmp_path / "bucket")
    return s3_config(request.getfixturevalue("s3_account"))


@pytest.fixture
def members() -> Iterator[Callable[..., BlockStore]]:
    """Opens stores, each a member of what its configuration names."""
    opened: list[BlockStore] = []

    def member(config: ObjectStoreTierConfig, **store: Any) -> BlockStore:
        settings = StoreConfig(**({"breaker_retry_seconds": 0.2} | store))
        opened.append(BlockStore(Config(store=settings, tiers=(config,)), LAYOUT, NAMESPACE))
        return opened[-1]

    yield member
    for store in opened:
        store.close()


Members = Callable[..., BlockStore]


class ObjectsContract(SharedTierContract):
    """On any store of which `client` knows how to ask."""

    @abstractmethod
    def config(self, folder: Path, **fields: Any) -> ObjectStoreTierConfig:
        """A store for this folder."""

    def member(
        self,
        folder: Path,
        layout: BlockLayout = CONTRACT_LAYOUT,
        *,
        capacity_bytes: int,
        ttl_seconds: float = 0.0,
    ) -> ObjectStoreTier:
        config = self.config(folder, capacity_bytes=capacity_bytes, ttl_seconds=ttl_seconds)
        settings = StoreConfig(breaker_retry_seconds=0.2)
        return ObjectStoreTier(config, layout, NAMESPACE, settings, Telemetry(1000))

    def damage(self, tier: LocalTier, placement: Placement) -> None:
        assert isinstance(tier, ObjectStoreTier)
        tier.flush()
        name, offset = self.slot_of(tier, placement)
        self.flip(tier, name, offset + PAGE + placement.length // 2)

    def spoil(self, tier: SharedTier, name: str) -> None:
        assert isinstance(tier, ObjectStoreTier)
        piece = f"{name}.{0:016x}"
        self.flip(tier, piece, (tier._client.size(piece) or 0) // 2)

    def flip(self, tier: ObjectStoreTier, name: str, at: int) -> None:
        whole = bytearray(tier._client.get(name) or b"")
        whole[at] ^= 1
        tier._client.put(name, bytes(whole))


class TestLocalFolder(ObjectsContract):
    def config(self, folder: Path, **fields: Any) -> ObjectStoreTierConfig:
        return local_config(folder, **fields)


class TestS3(ObjectsContract):
    @pytest.fixture(autouse=True)
    def take_bucket(self, s3_account: S3Account) -> None:
        self.account = s3_account

    def config(self, folder: Path, **fields: Any) -> ObjectStoreTierConfig:
        return s3_config(self.account, url=f"s3://{self.account.bucket}/{folder.name}", **fields)


def test_one_member_serves_what_another_saved(config: ObjectStoreTierConfig, members: Members) -> None:
    first, second = members(config), members(config)
    for number in range(4):
        publish(first, chain(number, 40), second)
        assert all_loaded(second, chain(number, 40))
        assert all_loaded(first, chain(number, 40))
    publish(second, chain(9, 3), first)
    assert all_loaded(first, chain(9, 3))
    for store in (first, second):
        assert store.telemetry.value("misses_total") == 0
        assert tier_of(store).used_bytes_on_medium() <= config.capacity_bytes
        store.check_integrity()


def test_what_was_published_is_there_after_a_restart(
    config: ObjectStoreTierConfig, members: Members
) -> None:
    first = members(config)
    save_all(first, chain(1, 70))
    first.close()  # publishes what is packed
    again = members(config)
    assert again.lookup(chain(1, 70)).blocks == 70
    assert all_loaded(again, chain(1, 70))


def test_blocks_are_served_from_memory_until_they_are_published(tmp_path: Path, members: Members) -> None:
    store = members(local_config(tmp_path, publish_seconds=600.0))
    save_all(store, chain(1, 20))
    requests = store.telemetry.value("object_requests_total")
    assert all_loaded(store, chain(1, 20))
    assert store.telemetry.value("object_requests_total") == requests == 0
    assert not tier_of(store)._medium.names("extents")
    assert store.flush(WAIT_SECONDS)
    assert len(tier_of(store)._medium.names("extents")) == 1
    assert all_loaded(store, chain(1, 20))
    assert store.telemetry.value("object_requests_total") > 0


def test_neighbours_are_fetched_together(tmp_path: Path, members: Members) -> None:
    config = local_config(tmp_path, io_threads=4, merge_gap_bytes=64 * 1024)
    store = members(config)
    stride = slot_stride(LAYOUT.block_bytes)
    keys = chain(1, 40)  # 800 KiB: less than a request is long at least
    publish(store, keys)
    assert len(tier_of(store)._medium.names("extents")) == 1
    telemetry = store.telemetry
    assert all_loaded(store, keys)
    assert telemetry.value("object_requests_total") == 1
    assert telemetry.value("object_gap_bytes_total") == 0
    assert all_loaded(store, keys[::2])
    assert telemetry.value("object_requests_total") == 2
    assert telemetry.value("object_gap_bytes_total") == 19 * stride
    assert all_loaded(store, [keys[0], keys[20]])  # too far apart
    assert telemetry.value("object_requests_total") == 4
    assert telemetry.value("object_gap_bytes_total") == 19 * stride


def test_an_extent_that_was_collected_is_a_miss(config: ObjectStoreTierConfig, members: Members) -> None:
    store = members(config)
    publish(store, chain(1, 30))
    publish(store, chain(2, 5))
    medium = tier_of(store)._medium
    first, second = sorted(medium.names("extents"))
    medium.remove(first)
    outcomes = load(store, chain(1, 30))
    assert set(outcomes) == {Outcome.ABSENT}
    assert store.telemetry.value("misses_total", "object_store", "collected") == 30
    assert store.lookup(chain(1, 30)).blocks == 0
    assert all_loaded(store, chain(2, 5))
    assert tier_of(store).readable and tier_of(store).writable
    assert second in medium.names("extents")
    publish(store, chain(1, 30))
    assert all_loaded(store, chain(1, 30))


def test_damage_is_a_miss(config: ObjectStoreTierConfig, members: Members) -> None:
    store = members(config)
    keys = chain(1, 12)
    publish(store, keys)
    [name] = tier_of(store)._medium.names("extents")
    client = open_client(config)
    whole = bytearray(client.get(name) or b"")
    stride = slot_stride(LAYOUT.block_bytes)
    whole[2 * stride + PAGE + 100] ^= 1  # payload
    whole[5 * stride + 20] ^= 1  # header
    whole[7 * stride + 200 :: stride][:0] = b""
    client.upload(name, bytes(whole))
    outcomes = load(store, keys)
    assert [n for n, outcome in enumerate(outcomes) if outcome is Outcome.CORRUPT] == [2, 5]
    assert outcomes.count(Outcome.LOADED) == 10
    assert store.telemetry.value("misses_total", "object_store", "corrupt_checksum") == 1
    assert store.telemetry.value("misses_total", "object_store", "corrupt_header") == 1
    client.upload(name, bytes(whole[: 9 * stride + PAGE + 1]))  # cut off in the tenth block
    left = [key for n, key in enumerate(keys) if n not in (2, 5)]
    assert load(store, left) == [Outcome.LOADED] * 7 + [Outcome.CORRUPT] * 3


def test_blocks_of_other_lengths(tmp_path: Path, members: Members) -> None:
    store = members(local_config(tmp_path))
    sizes = [1, 100, 4096, 4097, 16_383, 16_384]
    save_all(store, chain(0, 1))
    keys = chain(1, len(sizes))
    blocks = [content(key, size) for key, size in zip(keys, sizes, strict=True)]
    assert set(finished(store.save(keys, blocks))) == {Outcome.SAVED}
    for published in (False, True):
        if published:
            assert store.flush(WAIT_SECONDS)
        for key, size in zip(keys, sizes, strict=True):
            wrong = bytearray(size + 1 if size < 16_384 else 5)
            assert load(store, [key], size) == [Outcome.LOADED]
            if published:
                match = store.lookup([key])
                assert finished(store.load(match, [wrong])) == [Outcome.CORRUPT]
                assert not any(wrong)


def test_the_bound_holds_while_extents_come_and_go(tmp_path: Path, members: Members) -> None:
    config = local_config(tmp_path, capacity_bytes=12 * MIB, extent_bytes=MIB)
    first, second = members(config), members(config)
    largest = 0
    for number in range(40):
        store = (first, second)[number % 2]
        save_all(store, chain(number, 30))
        assert store.flush(WAIT_SECONDS)
        largest = max(largest, tier_of(first).used_bytes_on_medium())
    assert largest <= config.capacity_bytes
    total = first.telemetry.value("published_bytes_total") + second.telemetry.value("published_bytes_total")
    assert total > config.capacity_bytes, "nothing had to leave"
    for number in range(40):
        assert set(load(second, chain(number, 30))) <= {Outcome.LOADED, Outcome.ABSENT}


# A real server


def test_a_server_that_hangs_costs_the_deadline_once(
    s3_server: RadosGateway, s3_account: S3Account, members: Members
) -> None:
    config = s3_config(s3_account, request_seconds=3.0, retries=0, lease_seconds=60.0)
    store = members(config, io_deadline_seconds=0.4)
    publish(store, chain(1, 30))
    s3_server.freeze()
    try:
        targets = [bytearray(b"\xa5" * LAYOUT.block_bytes) for _ in range(30)]
        transfer = store.load(store.lookup(chain(1, 30)), targets)
        transfer.wait()
        assert set(transfer.outcomes) == {Outcome.LATE}
        assert transfer.released, "buffers are held by a request that hangs"
        assert all(target == b"\xa5" * LAYOUT.block_bytes for target in targets)
        eventually(lambda: not tier_of(store).readable, "a server that hangs stays in service")
    finally:
        s3_server.thaw()

    def back() -> bool:
        store.lookup(chain(1, 1))
        return tier_of(store).readable

    eventually(back, "the tier does not come back")
    assert all_loaded(store, chain(1, 30))


WRITER = """
    import sys
    import time
    from kvstrata.config import Config, StoreConfig, ObjectStoreTierConfig
    from kvstrata.store import BlockStore
    from kvstrata.types import BlockLayout, Outcome
    from store_kit import NAMESPACE, chain, save

    config = eval(sys.argv[1])
    store = BlockStore(Config(store=StoreConfig(), tiers=(config,)), BlockLayout(16_384, 1), NAMESPACE)
    print("open", flush=True)
    number = int(sys.argv[2])
    while True:
        number += Outcome.SAVED in save(store, chain(number, 40))
        time.sleep(0.02)
"""


def test_members_that_are_killed_while_they_write(s3_account: S3Account, members: Members) -> None:
    config = s3_config(s3_account, capacity_bytes=24 * MIB)
    store = members(config)
    save_all(store, chain(0, 1))
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    arguments = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}

    def publishes(first: int) -> bool:
        return any(store.lookup(chain(number, 1)).blocks for number in range(first + 3, first + 200))

    for round_ in range(2):
        first = 1000 * (1 + round_)
        command = [sys.executable, "-c", textwrap.dedent(WRITER)]
        command += [f"ObjectStoreTierConfig({arguments})", str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
            try:
                assert writer.stdout is not None
                assert writer.stdout.readline() == "open\n"
                eventually(lambda first=first: publishes(first), "a writer publishes nothing")
            finally:
                writer.send_signal(signal.SIGKILL)
    size = len(tier_of(store)._medium.folders("members"))

    def alone() -> bool:
        return len(tier_of(store)._medium.folders("members")) == 1

    eventually(alone, f"{size} members were killed and stay")
    served = 0
    for first in (1000, 2000):
        for number in range(first, first + 200):
            outcomes = load(store, chain(number, 40))
            assert set(outcomes) <= {Outcome.LOADED, Outcome.ABSENT}
            served += outcomes.count(Outcome.LOADED)
    assert served > 0, "what was published went with its writer"
    save_all(store, chain(5, 40))
    assert tier_of(store).used_bytes_on_medium() <= config.capacity_bytes


def test_a_server_that_is_killed_and_started_again(
    s3_server: RadosGateway, s3_account: S3Account, members: Members
) -> None:
    config = s3_config(s3_account, request_seconds=1.0, retries=1, lease_seconds=20.0)
    store = members(config)
    publish(store, chain(1, 30))
    s3_server.kill()
    try:
        eventually(lambda: set(load(store, chain(1, 30))) != {Outcome.LOADED}, "nothing was killed")
        eventually(lambda: not tier_of(store).readable, "a dead server stays in service")
        outcomes = load(store, chain(1, 30))
        assert Outcome.LOADED not in outcomes
    finally:
        s3_server.start()

    def back() -> bool:
        store.lookup(chain(1, 1))
        return tier_of(store).readable and tier_of(store).writable

    eventually(back, "the tier does not come back")
    eventually(
        lambda: {Outcome.SAVED, Outcome.PRESENT} >= set(save(store, chain(1, 30))), "nothing is saved"
    )
    assert store.flush(WAIT_SECONDS)
    assert all_loaded(store, chain(1, 30))


# Configuration


def test_the_configuration_is_checked(tmp_path: Path) -> None:
    good = {"type": "object_store", "url": "s3://bucket/p"}
    [config] = parse_config({"tier": [good | {"options": {"region": "x", "allow_http": True}}]}).tiers
    assert isinstance(config, ObjectStoreTierConfig)
    assert config.options == {"region": "x", "allow_http": "true"}
    for key, value in {
        "url": "bucket",
        "part_bytes": "1MiB",
        "staging_bytes": "32MiB",
        "io_threads": 0,
        "parts_in_flight": 0,
        "request_seconds": 0.0,
        "retries": -1,
        "extent_bytes": 4096,
        "live_share": 0.0,
        "options": "region",
    }.items():
        with pytest.raises(ConfigError, match=key):
            parse_config({"tier": [good | {key: value}]})
    with pytest.raises(ConfigError, match=r"options\.region"):
        parse_config({"tier": [good | {"options": {"region": ["x"]}}]})
    with pytest.raises(ConfigError, match="already used"):
        parse_config({"tier": [good, good | {"url": "s3://bucket/p/"}]})


def test_secrets_are_not_shown() -> None:
    config = ObjectStoreTierConfig(url="s3://bucket/p", options={"secret_access_key": "hush"})
    assert "hush" not in repr(config) and "hush" not in repr(Config(tiers=(config,)))


def test_a_capacity_that_is_too_small(tmp_path: Path) -> None:
    config = local_config(tmp_path, capacity_bytes=MIB)
    with pytest.raises(ConfigError, match="too small"):
        ObjectStoreTier(config, LAYOUT, NAMESPACE, StoreConfig(), Telemetry(10))


def test_the_store_without_the_package() -> None:
    code = """
        import sys
        sys.modules["obstore"] = None
        from kvstrata import BlockLayout, BlockStore, ConfigError
        from kvstrata.config import parse_config
        from store_kit import NAMESPACE
        try:
            config = parse_config({"tier": [{"type": "object_store", "url": "s3://bucket/p"}]})
            BlockStore(config, BlockLayout(4096, 1), NAMESPACE)
        except ConfigError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert "pip install 'kvstrata[object-store]'" in run.stdout
