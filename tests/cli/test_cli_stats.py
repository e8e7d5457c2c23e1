"""`kvstrata stats`: against the real endpoint of a real store, and against what is not one."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cli_kit import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    MIB,
    TINY,
    assert_one_error,
    assert_program_error,
    open_store,
    run_program,
    save_blocks,
)
from typer.testing import Result

from kvstrata.cli.scrape import Page, endpoint, quantile
from kvstrata.config import Config, MetricsConfig, NvmeTierConfig, StoreConfig, TierConfig
from kvstrata.metrics import MetricsServer
from kvstrata.store import BlockStore
from kvstrata.telemetry import BUCKETS_SECONDS
from kvstrata.types import BlockLayout

Run = Callable[..., Result]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port


@contextmanager
def serving(store: BlockStore) -> Iterator[int]:
    server = MetricsServer(store, MetricsConfig(port=free_port()))
    try:
        yield server.port
    finally:
        server.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    """Twenty blocks saved, looked up with four unknown ones, and loaded."""
    with open_store(tmp_path / "kv", memory=True) as store:
        keys, blocks = save_blocks(store, 20)
        match = store.lookup([*keys, *(type(keys[0])(bytes([n]) * 32) for n in range(4))])
        targets = [bytearray(BLOCK_BYTES) for _ in keys]
        assert store.load(match, targets).wait(20)
        assert [bytes(target) for target in targets] == blocks
        yield store


def look(run: Run, *arguments: object) -> dict[str, Any]:
    result = run("stats", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_figures_are_those_of_the_store(run: Run, store: BlockStore) -> None:
    with serving(store) as port:
        found = look(run, f"http://127.0.0.1:{port}")
    assert found["lookups"] == {
        "requests": 1, "hit_blocks": 20, "missed_blocks": 4, "block_hit_ratio": 20 / 24,
    }  # fmt: skip
    counters = store.telemetry.counters()
    for name, rows in (("blocks_total", found["blocks"]), ("misses_total", found["misses"])):
        shown = {tuple(v for k, v in row.items() if k != "count"): row["count"] for row in rows}
        assert shown == counters.get(name, {})
    status = {tier.name: tier for tier in store.status()}
    assert [tier["tier"] for tier in found["tiers"]] == ["memory", "nvme"]
    for tier in found["tiers"]:
        real = status[tier["tier"]]
        assert tier["blocks"] == real.blocks == 20
        assert (tier["readable"], tier["writable"]) == (1, 1)
        assert (tier["used_bytes"], tier["capacity_bytes"]) == (real.used_bytes, real.capacity_bytes)
    bounds = {row["name"]: row["bound"] for row in found["queues"]}
    settings = store.config.store
    assert bounds == {
        "queued_loads": settings.load_queue_blocks,
        "queued_stores": None,
        "held_blocks": settings.queue_blocks,
        "held_bytes": settings.queue_bytes,
        "moving_blocks": None,
        "staged_bytes": 2 * settings.staging_bytes,
        "attach_staged_bytes": 0,
    }
    assert {row["name"] for row in found["queues"]} == set(store.queued)
    latencies = {(row["op"], row["tier"]): row for row in found["latencies"]}
    histograms = store.telemetry.histograms()
    for op, tier in (("write", "nvme"), ("load", None), ("save", None)):
        row = latencies[op, tier]
        real = histograms[f"{op}_seconds"][(tier,) if tier else ()]
        assert row["count"] == sum(real.counts)
        assert row["mean_seconds"] == pytest.approx(real.total_seconds / sum(real.counts))
        assert 0 < row["p50_seconds"] <= row["p99_seconds"] <= BUCKETS_SECONDS[-1]
    written = [row for row in found["counters"] if row["name"] == "write_bytes_total"]
    assert written == [
        {"name": "write_bytes_total", "labels": {"tier": tier}, "count": 20 * BLOCK_BYTES}
        for tier in ("memory", "nvme")
    ]


def open_tiers(*tiers: TierConfig) -> BlockStore:
    store = StoreConfig(io_threads=2, io_store_threads=1)
    return BlockStore(Config(store, tiers), BlockLayout(BLOCK_BYTES, BLOCK_TOKENS), TINY)


def nvme(path: Path, **fields: Any) -> NvmeTierConfig:
    return NvmeTierConfig(str(path), capacity_bytes=4 * MIB, **fields)


def test_traffic_and_the_read_cache(run: Run, tmp_path: Path) -> None:
    """Two rounds over blocks of a lower tier: what the cache kept, and what it kept off the tier below."""
    with open_tiers(nvme(tmp_path / "below")) as below:
        keys, _ = save_blocks(below, 20)
    cache = nvme(tmp_path / "cache", attach="second", write_mode="none")
    with open_tiers(cache, nvme(tmp_path / "below")) as store:
        for part in (keys[:12], keys, keys):
            targets = [bytearray(BLOCK_BYTES) for _ in part]
            assert store.load(store.lookup(part), targets).wait(20)
            assert store.flush()
        with serving(store) as port:
            found = look(run, f"http://127.0.0.1:{port}")
            text = run("stats", f"http://127.0.0.1:{port}").stdout
    # 12 + 20 + 8 come from below; 12 of the last round are local.
    asked = 12 + 20 + 20
    assert found["traffic"] == [
        {"tier": "nvme", "served_blocks": 12, "served_bytes": 12 * BLOCK_BYTES,
         "hit_ratio": 12 / asked, "kept_off_bytes": 0},
        {"tier": "nvme2", "served_blocks": 40, "served_bytes": 40 * BLOCK_BYTES,
         "hit_ratio": 40 / asked, "kept_off_bytes": 12 * BLOCK_BYTES},
    ]  # fmt: skip
    assert found["attach"] == [
        {"tier": "nvme", "offered_blocks": 40, "attached_blocks": 20, "attached_bytes": 20 * BLOCK_BYTES,
         "attach_ratio": 0.5, "refused_blocks": {"first_read": 20}},
    ]  # fmt: skip
    assert [tier["shared"] for tier in found["tiers"]] == [0, 0]
    for words in ("read cache", "first_read 20", "0.500", "kept off it"):
        assert words in text


def test_a_store_without_a_read_cache_shows_none(run: Run, store: BlockStore) -> None:
    with serving(store) as port:
        assert look(run, f"http://127.0.0.1:{port}")["attach"] == []
        assert "read cache" not in run("stats", f"http://127.0.0.1:{port}").stdout


def test_table_shows_the_same(store: BlockStore) -> None:
    with serving(store) as port:
        result = run_program("stats", f"127.0.0.1:{port}")
    assert (result.returncode, result.stderr) == (0, "")
    for words in ("20 blocks hit", "4 missed", "block hit ratio 0.833", "write_back", "held_bytes", "p99"):
        assert words in result.stdout


def test_a_store_that_did_nothing(run: Run, tmp_path: Path) -> None:
    with open_store(tmp_path / "kv") as store, serving(store) as port:
        found = look(run, f"127.0.0.1:{port}")
        assert found["lookups"]["block_hit_ratio"] is None
        assert "block hit ratio -" in run("stats", f"127.0.0.1:{port}/metrics").stdout


def test_address_from_the_configuration(run: Run, store: BlockStore, tmp_path: Path) -> None:
    path = tmp_path / "kvstrata.toml"
    with serving(store) as port:
        path.write_text(f'[metrics]\nhost = "0.0.0.0"\nport = {port}\n')
        found = look(run, "--config", path)
        assert found["url"] == f"http://127.0.0.1:{port}"
        default = run_program("stats", "--json", cwd=tmp_path)
        assert json.loads(default.stdout)["lookups"] == found["lookups"]


def test_proxies_are_not_asked(run: Run, store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "")
    with serving(store) as port:
        assert look(run, f"127.0.0.1:{port}")["tiers"]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:9400"),
        ("", "http://127.0.0.1:9400"),
        ("::", "http://[::1]:9400"),
        ("node7", "http://node7:9400"),
    ],
)
def test_endpoint(host: str, url: str) -> None:
    assert endpoint(MetricsConfig(host, 9400), "x") == url


def test_nobody_listens(run: Run, tmp_path: Path) -> None:
    port = free_port()
    assert_one_error(run("stats", f"http://127.0.0.1:{port}"), f":{port}", "metrics.port")
    config = tmp_path / "x.toml"
    config.write_text(f"[metrics]\nport = {port}\n")
    assert_program_error(
        run_program("stats", "--config", config), f":{port}", "no kvstrata process answers"
    )


def test_port_zero_and_bad_configurations(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text("[metrics]\nport = 0\n")
    assert_one_error(run("stats", "--config", config), "metrics.port is 0", "set a port")
    config.write_text("[metrics]\nprot = 1\n")
    assert_one_error(run("stats", "--config", config), "'port'")
    assert_one_error(run("stats", "--config", tmp_path / "no.toml"), "no.toml", "kvstrata init")
    assert_one_error(run("stats", "http://x", "--config", config), "not both")
    assert_program_error(run_program("stats", cwd=tmp_path), "kvstrata.toml", "kvstrata init")


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/hosts",
        "ftp://127.0.0.1",
        "http://",
        "http://[::1",
        "http://a:99999",
        "a b:1",
        "a\n:1",
        ":0",
    ],
)
def test_bad_urls(run: Run, url: str) -> None:
    assert_one_error(run("stats", url), "not a URL", "http://127.0.0.1:9400")


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, b"", ["404"]),
        (500, b"", ["500"]),
        (200, b"<html>hello</html>", ["does not show kvstrata's counters"]),
        (200, b"", ["does not show"]),
        (200, b"\xff\xfe", ["does not show"]),
        (200, b"up 1\n", ["does not show"]),
        (200, b"kvstrata_lookups_total NaN\n", ["does not show"]),
        (200, b'kvstrata_x{a="', ["does not show"]),
        (200, b"kvstrata_x 1\n" * (16 * MIB // 13 + 2), ["does not show"]),
    ],
    ids=["404", "500", "html", "empty", "binary", "other", "nan", "torn", "endless"],
)
def test_other_servers(run: Run, status: int, body: bytes, words: list[str]) -> None:
    with answering(status, body) as port:
        assert_one_error(run("stats", f"127.0.0.1:{port}"), *words)


def test_a_server_that_talks_no_http(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(100)
                connection.sendall(b"hello\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert_one_error(run("stats", f"127.0.0.1:{server.getsockname()[1]}"), "no kvstrata process")
        thread.join()


@contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            with_body = self.path == "/metrics"
            with contextlib.suppress(ConnectionError):  # the client may have read enough
                self.wfile.write(body if with_body else b"wrong path")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_quantiles_by_hand() -> None:
    inf = float("inf")
    assert quantile([], 0.5) is None
    assert quantile([(1.0, 0), (inf, 0)], 0.5) is None
    buckets = [(1.0, 10.0), (2.0, 30.0), (inf, 40.0)]
    assert quantile(buckets, 0.5) == 1.5  # rank 20 of 40: half way through the 20 in (1, 2]
    assert quantile(buckets, 0.125) == 0.5
    assert quantile(buckets, 0.75) == 2.0
    assert quantile(buckets, 0.99) == inf


def test_quantile_above_the_last_bucket(run: Run, store: BlockStore) -> None:
    store.telemetry.observe("load_seconds", 60.0)
    with serving(store) as port:
        (row,) = [row for row in look(run, f"127.0.0.1:{port}")["latencies"] if row["op"] == "load"]
        assert row["p99_seconds"] == "above_last_bucket"
        assert "> 10 s" in run("stats", f"127.0.0.1:{port}").stdout


def test_page_ignores_what_is_not_ours() -> None:
    page = Page("up 1\nkvstrata_lookups_total 3\n")
    assert page.value("lookups_total") == 3
    assert page.value("up") is None
    assert [(name, count) for name, _, count in page.counters()] == [("lookups_total", 3)]
