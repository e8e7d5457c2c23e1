"""Fetches a process's Prometheus page and answers what `kvstrata stats` asks of it. Prints nothing."""

from __future__ import annotations

import http.client
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from prometheus_client.parser import text_string_to_metric_families

from kvstrata.config import MetricsConfig
from kvstrata.errors import ConfigError
from kvstrata.telemetry import CATALOGUE, HISTOGRAMS

PREFIX = "kvstrata_"
TIMEOUT_SECONDS = 5.0
PAGE_BYTES = 16 * 2**20

Labels = dict[str, str]


@dataclass(frozen=True, slots=True)
class Latency:
    """One histogram. Quantiles are None without observations, infinite above the last bucket."""

    name: str
    labels: Labels
    count: int
    mean_seconds: float | None
    p50_seconds: float | None
    p99_seconds: float | None


class Page:
    """The samples of one scrape, by name without the prefix."""

    def __init__(self, text: str) -> None:
        """Raises ValueError for text that is not Prometheus' format, or holds what we never write."""
        self._samples: dict[str, list[tuple[Labels, float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith(PREFIX):
                    name = sample.name.removeprefix(PREFIX)
                    if not math.isfinite(sample.value) or math.isnan(float(sample.labels.get("le", 0))):
                        raise ValueError(f"{sample.name} is not a finite number")
                    self._samples.setdefault(name, []).append((dict(sample.labels), sample.value))

    @property
    def empty(self) -> bool:
        return not self._samples

    def rows(self, name: str) -> list[tuple[Labels, float]]:
        """All samples of one name."""
        return self._samples.get(name, [])

    def value(self, name: str, labels: Labels | None = None) -> float | None:
        """One sample; None if the page does not have it."""
        return next((value for known, value in self.rows(name) if known == (labels or {})), None)

    def counters(self) -> Iterator[tuple[str, Labels, int]]:
        """Every counter above zero."""
        for name in CATALOGUE:
            for labels, value in self.rows(name):
                if value:
                    yield name, labels, int(value)

    def latencies(self) -> Iterator[Latency]:
        """Every histogram of ours that the page has."""
        for name in HISTOGRAMS:
            for labels, count in self.rows(f"{name}_count"):
                buckets = sorted(
                    (float(known["le"]), value)
                    for known, value in self.rows(f"{name}_bucket")
                    if labels.items() <= known.items()
                )
                total = self.value(f"{name}_sum", labels) or 0.0
                yield Latency(
                    name=name.removesuffix("_seconds"),
                    labels=labels,
                    count=int(count),
                    mean_seconds=total / count if count else None,
                    p50_seconds=quantile(buckets, 0.5),
                    p99_seconds=quantile(buckets, 0.99),
                )


def quantile(buckets: list[tuple[float, float]], fraction: float) -> float | None:
    """Of cumulative (upper bound, count) buckets, linear within a bucket as Prometheus' histogram_quantile.

    None without observations; infinite if it lies above the last finite bound.
    """
    if not buckets or not buckets[-1][1]:
        return None
    rank = fraction * buckets[-1][1]
    below_bound, below_count = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            if math.isinf(bound):
                return bound
            return below_bound + (bound - below_bound) * (rank - below_count) / (count - below_count)
        below_bound, below_count = bound, count
    raise AssertionError("unreachable: the last bucket holds every observation")


def endpoint(metrics: MetricsConfig, source: str) -> str:
    """Where a process with this configuration shows its counters. Raises ConfigError if nowhere."""
    if not metrics.port:
        raise ConfigError(
            f"{source}: metrics.port is 0, so the process shows no counters; set a port and restart it, "
            "or give the URL of another process"
        )
    everywhere = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
    host = everywhere.get(metrics.host, metrics.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{metrics.port}"


def fetch(url: str) -> Page:
    """Scrape one process. Raises ConfigError that says what to do."""
    full = _full_url(url)
    # Never through a proxy: the process is on this machine or in its network.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(full, timeout=TIMEOUT_SECONDS) as answer:
            data = answer.read(PAGE_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{full} answers {error.code} {error.reason}; check the URL") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise ConfigError(
            f"no kvstrata process answers at {full}: {reason}; "
            "start it with metrics.port set, or give its URL"
        ) from error
    advice = (
        f"{full} does not show kvstrata's counters; give the host and metrics.port of its configuration"
    )
    if len(data) > PAGE_BYTES:
        raise ConfigError(advice)
    try:
        page = Page(data.decode())
    except (ValueError, KeyError, IndexError) as error:
        raise ConfigError(advice) from error
    if page.empty:
        raise ConfigError(advice)
    return page


def _full_url(url: str) -> str:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"{url!r} is not a URL of a process; write for example http://127.0.0.1:9400")
    path = parts.path if parts.path not in ("", "/") else "/metrics"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
