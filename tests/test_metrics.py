"""A real scrape of a real store."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvstrata.config import Config, MemoryTierConfig, MetricsConfig
from kvstrata.errors import ConfigError
from kvstrata.metrics import PREFIX, MetricsServer
from kvstrata.store import BlockStore
from kvstrata.telemetry import CATALOGUE, HISTOGRAMS
from kvstrata.types import BlockLayout, Namespace, Outcome

Samples = dict[tuple[str, tuple[str, ...]], float]


@pytest.fixture
def store() -> Iterator[BlockStore]:
    config = Config(tiers=(MemoryTierConfig(capacity_bytes=16 * 4096),))
    with BlockStore(config, BlockLayout(100, 16), Namespace(bytes(32))) as opened:
        yield opened


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> Samples:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(value for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_shows_what_the_store_did(store: BlockStore) -> None:
    server = MetricsServer(store, MetricsConfig(port=free_port()))
    try:
        keys = [bytes([n]) * 32 for n in range(4)]
        saved = store.save(keys[:3], [bytes(100)] * 3)  # type: ignore[arg-type]
        assert saved.wait(30)
        match = store.lookup(keys)  # type: ignore[arg-type]
        loaded = store.load(match, [bytearray(100) for _ in range(3)])
        assert loaded.wait(30) and loaded.wait_released(30)
        assert loaded.outcomes == [Outcome.LOADED] * 3
        assert store.flush(30)
        samples = scrape(server.port)
    finally:
        server.close()
    assert samples["kvstrata_lookups_total", ()] == 1
    assert samples["kvstrata_lookup_blocks_total", ("hit",)] == 3
    assert samples["kvstrata_lookup_blocks_total", ("miss",)] == 1
    # Labels sorted by name: op, outcome, tier.
    assert samples["kvstrata_blocks_total", ("save", "saved", "memory")] == 3
    assert samples["kvstrata_blocks_total", ("load", "loaded", "memory")] == 3
    assert samples["kvstrata_load_seconds_count", ()] == 1
    assert samples["kvstrata_load_seconds_bucket", ("+Inf",)] == 1
    assert samples["kvstrata_tier_blocks", ("memory",)] == 3
    assert samples["kvstrata_tier_used_bytes", ("memory",)] == 3 * 4096
    assert samples["kvstrata_tier_capacity_bytes", ("memory",)] == 16 * 4096
    assert samples["kvstrata_tier_readable", ("memory",)] == 1
    assert samples["kvstrata_tier_pinned_blocks", ("memory",)] == 0
    assert samples["kvstrata_held_blocks", ()] == 0
    assert samples["kvstrata_bound", ("queue_blocks",)] == store.config.store.queue_blocks


def test_every_name_of_the_catalogue_can_be_scraped(store: BlockStore) -> None:
    for name, (labels, _) in CATALOGUE.items():
        store.telemetry.count(name, *(f"a {label}" for label in labels), by=7)
    for name, (labels, _) in HISTOGRAMS.items():
        store.telemetry.observe(name, 0.003, *(f"a {label}" for label in labels))
    server = MetricsServer(store, MetricsConfig(port=free_port()))
    try:
        samples = scrape(server.port)
    finally:
        server.close()
    for name, (labels, _) in CATALOGUE.items():
        assert samples[PREFIX + name, tuple(f"a {label}" for label in sorted(labels))] == 7
    for name, (labels, _) in HISTOGRAMS.items():
        assert samples[f"{PREFIX}{name}_sum", tuple(f"a {label}" for label in labels)] == 0.003


def test_a_taken_port_says_so(store: BlockStore) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"metrics\.port: cannot listen on"):
            MetricsServer(store, MetricsConfig(port=taken.getsockname()[1]))


def test_a_closed_server_gives_its_port_back(store: BlockStore) -> None:
    port = free_port()
    for _ in range(2):
        server = MetricsServer(store, MetricsConfig(port=port))
        assert scrape(server.port)
        server.close()
