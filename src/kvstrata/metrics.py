"""Shows a store's telemetry to Prometheus, and to `kvstrata stats`, over HTTP. Decides nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import start_http_server
from prometheus_client.registry import Collector, CollectorRegistry

from kvstrata.config import Config, MetricsConfig, attach_staging_bytes
from kvstrata.errors import ConfigError
from kvstrata.store import TierStatus
from kvstrata.telemetry import BUCKETS_SECONDS, CATALOGUE, HISTOGRAMS, Histogram, Telemetry
from kvstrata.tiers import Tier

PREFIX = "kvstrata_"


class Watched(Protocol):
    """What a store shows: one of this process, or the client's end of one that is served."""

    config: Config
    telemetry: Telemetry

    @property
    def queued(self) -> dict[str, int]: ...

    @property
    def capture_held_bytes(self) -> int: ...

    @property
    def tiers(self) -> Sequence[Tier]: ...

    def status(self) -> list[TierStatus]: ...


class StoreCollector(Collector):
    """Reads the store when it is asked; keeps no numbers of its own.

    more: further metrics, of who owns the store.
    """

    def __init__(self, store: Watched, more: Callable[[], Iterator[Metric]] = lambda: iter(())) -> None:
        self._store = store
        self._more = more

    def collect(self) -> Iterator[Metric]:
        telemetry = self._store.telemetry
        counters = telemetry.counters()
        for name, (labels, text) in CATALOGUE.items():
            family = CounterMetricFamily(PREFIX + name, text, labels=labels)
            values = counters.get(name, {} if labels else {(): 0})
            for label_values, value in values.items():
                family.add_metric(label_values, value)
            yield family
        histograms = telemetry.histograms()
        for name, (labels, text) in HISTOGRAMS.items():
            spread = HistogramMetricFamily(PREFIX + name, text, labels=labels)
            for label_values, histogram in histograms.get(name, {}).items():
                spread.add_metric(label_values, _buckets(histogram), histogram.total_seconds)
            yield spread
        yield from self._gauges()
        yield from self._more()

    def _gauges(self) -> Iterator[Metric]:
        for name, value in self._store.queued.items():
            yield GaugeMetricFamily(PREFIX + name, f"{name.replace('_', ' ')} now", value=value)
        yield GaugeMetricFamily(
            PREFIX + "capture_held_bytes",
            "Memory of captured requests that are not written yet",
            value=self._store.capture_held_bytes,
        )
        settings = self._store.config.store
        bounds: dict[str, float] = {
            "queue_bytes": settings.queue_bytes,
            "queue_blocks": settings.queue_blocks,
            "load_queue_blocks": settings.load_queue_blocks,
            "batch_blocks": settings.batch_blocks,
            "io_depth": settings.io_depth,
            "io_threads": settings.io_threads,
            "io_store_threads": settings.io_store_threads,
            "io_deadline_seconds": settings.io_deadline_seconds,
            "throttle_seconds": settings.throttle_seconds,
            "breaker_failures": settings.breaker_failures,
            "breaker_retry_seconds": settings.breaker_retry_seconds,
            "staging_bytes": 2 * settings.staging_bytes,
            "attach_staging_bytes": attach_staging_bytes(self._store.config.tiers),
            "close_seconds": settings.close_seconds,
            "events": settings.events,
            "capture_bytes": settings.capture_bytes,
            "capture_queue_bytes": settings.capture_queue_bytes,
            "capture_seconds": settings.capture_seconds,
        }
        family = GaugeMetricFamily(PREFIX + "bound", "Configured bounds", labels=["name"])
        for name, bound in bounds.items():
            family.add_metric([name], bound)
        yield family
        yield self._tier_bounds()
        tiers = self._store.status()
        for name, text in (
            ("shared", "1 for a tier that other processes write to"),
            ("readable", "1 while the tier serves loads"),
            ("writable", "1 while the tier takes saves"),
            ("blocks", "Loadable blocks"),
            ("used_bytes", "Bytes of occupied slots"),
            ("capacity_bytes", "Bytes of all usable slots"),
            ("pinned_blocks", "Blocks pinned by running transfers"),
        ):
            family = GaugeMetricFamily(f"{PREFIX}tier_{name}", text, labels=["tier"])
            for tier in tiers:
                family.add_metric([tier.name], float(getattr(tier, name)))
            yield family
        yield from self._engines()

    def _tier_bounds(self) -> Metric:
        family = GaugeMetricFamily(
            PREFIX + "tier_bound", "Numbers of each tier's configuration", labels=["tier", "name"]
        )
        config = self._store.config
        for tier, section in zip(self._store.status(), config.tiers, strict=True):
            for name, value in dataclasses.asdict(section).items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    family.add_metric([tier.name, name], float(value))
        return family

    def _engines(self) -> Iterator[Metric]:
        units = CounterMetricFamily(
            PREFIX + "io_units_total",
            "Reads and writes, each of one block or of neighbours",
            labels=["tier", "op"],
        )
        merged = CounterMetricFamily(
            PREFIX + "io_merged_blocks_total", "Blocks moved together with their neighbour", labels=["tier"]
        )
        depth = GaugeMetricFamily(
            PREFIX + "io_depth", "Units that may be in flight, as measured best", labels=["tier", "op"]
        )
        for tier in self._store.tiers:
            counts = tier.counts
            units.add_metric([tier.name, "read"], counts.loads)
            units.add_metric([tier.name, "write"], counts.stores)
            merged.add_metric([tier.name], counts.merged)
            depth.add_metric([tier.name, "read"], counts.load_depth)
            depth.add_metric([tier.name, "write"], counts.store_depth)
        yield from (units, merged, depth)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    rows: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip([*map(str, BUCKETS_SECONDS), "+Inf"], histogram.counts, strict=True):
        total += count
        rows.append((bound, total))
    return rows


class MetricsServer:
    """Serves one store's metrics until closed."""

    def __init__(
        self,
        store: Watched,
        config: MetricsConfig,
        more: Callable[[], Iterator[Metric]] = lambda: iter(()),
    ) -> None:
        """Raises ConfigError if the port cannot be had. more: see StoreCollector."""
        registry = CollectorRegistry()
        registry.register(StoreCollector(store, more))
        self._server: Any
        try:
            self._server, self._thread = start_http_server(config.port, config.host, registry=registry)
        except OSError as error:
            raise ConfigError(
                f"metrics.port: cannot listen on {config.host}:{config.port}: {error}; "
                "choose another port, or 0 for none"
            ) from error
        self.port: int = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
