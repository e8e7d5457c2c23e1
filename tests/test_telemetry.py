"""Telemetry: names, labels, bounds, and nothing lost between threads."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.telemetry import BUCKETS_SECONDS, CATALOGUE, HISTOGRAMS, Histogram, Telemetry


def test_names_follow_the_convention() -> None:
    assert all(name.endswith("_total") and text for name, (_, text) in CATALOGUE.items())
    assert all(name.endswith("_seconds") and text for name, (_, text) in HISTOGRAMS.items())
    assert list(BUCKETS_SECONDS) == sorted(set(BUCKETS_SECONDS))


def test_counters_add_up_by_label() -> None:
    telemetry = Telemetry()
    telemetry.count("blocks_total", "load", "nvme", "loaded", by=3)
    telemetry.count("blocks_total", "load", "nvme", "corrupt")
    telemetry.count("blocks_total", "save", "nvme", "saved", by=5)
    assert telemetry.value("blocks_total") == 9
    assert telemetry.value("blocks_total", "load") == 4
    assert telemetry.value("blocks_total", "load", "nvme", "loaded") == 3
    assert telemetry.value("blocks_total", "load", "memory") == 0
    assert telemetry.counters() == {
        "blocks_total": {
            ("load", "nvme", "loaded"): 3,
            ("load", "nvme", "corrupt"): 1,
            ("save", "nvme", "saved"): 5,
        }
    }


def test_counting_nothing_leaves_nothing() -> None:
    telemetry = Telemetry()
    telemetry.count("lookups_total", by=0)
    assert telemetry.counters() == {}


def test_a_misspelt_name_or_label_count_is_an_error() -> None:
    telemetry = Telemetry()
    with pytest.raises(KeyError):
        telemetry.count("lookup_total")
    with pytest.raises(KeyError):
        telemetry.observe("read_second", 1.0, "nvme")
    with pytest.raises(AssertionError):
        telemetry.count("lookups_total", "nvme")
    with pytest.raises(AssertionError):
        telemetry.count("evictions_total", by=0)
    with pytest.raises(AssertionError):
        telemetry.observe("read_seconds", 1.0)


@given(seconds=st.lists(st.floats(0, 100), max_size=50))
def test_a_histogram_puts_each_value_under_its_bound(seconds: list[float]) -> None:
    histogram = Histogram()
    for value in seconds:
        histogram.observe(value)
    assert histogram.total_seconds == pytest.approx(sum(seconds))
    for rank, bound in enumerate(BUCKETS_SECONDS):
        # As Prometheus counts: less than or equal to the bound.
        assert sum(histogram.counts[: rank + 1]) == sum(value <= bound for value in seconds)
    assert sum(histogram.counts) == len(seconds)


def test_what_was_read_is_a_copy() -> None:
    telemetry = Telemetry()
    telemetry.count("lookups_total")
    telemetry.observe("load_seconds", 0.5)
    telemetry.event("kind", "detail")
    counters, histograms, events = telemetry.counters(), telemetry.histograms(), telemetry.events()
    counters["lookups_total"][()] = 99
    histograms["load_seconds"][()].observe(1.0)
    events.clear()
    assert telemetry.value("lookups_total") == 1
    assert sum(telemetry.histograms()["load_seconds"][()].counts) == 1
    assert len(telemetry.events()) == 1


def test_events_are_bounded_and_in_order() -> None:
    telemetry = Telemetry(max_events=3)
    before = time.time()
    for number in range(5):
        telemetry.event("kind", str(number))
    events = telemetry.events()
    assert [event.detail for event in events] == ["2", "3", "4"]
    assert all(before <= event.unix_seconds <= time.time() for event in events)


def test_threads_lose_no_count() -> None:
    telemetry = Telemetry()

    def work() -> None:
        for _ in range(2_000):
            telemetry.count("lookup_blocks_total", "hit", by=2)
            telemetry.observe("save_seconds", 0.25)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert telemetry.value("lookup_blocks_total", "hit") == 24_000
    assert telemetry.histograms()["save_seconds"][()].total_seconds == 3_000.0
