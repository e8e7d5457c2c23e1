"""Counters, histograms and events of one store. Plain numbers in memory: exporting is another file's work.

Names follow Prometheus: counters end in _total, units last. Every name is in CATALOGUE with its help
text, so that a misspelt counter is an error in the first test that meets it.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

CATALOGUE: dict[str, tuple[tuple[str, ...], str]] = {
    "lookups_total": ((), "Look-ups asked by the engine"),
    "lookup_blocks_total": (("result",), "Blocks looked up, by result"),
    "blocks_total": (("op", "tier", "outcome"), "Blocks of loads, saves and write-backs, by outcome"),
    "misses_total": (("tier", "reason"), "Blocks not served, by reason"),
    "read_bytes_total": (("tier",), "Payload bytes read and verified"),
    "write_bytes_total": (("tier",), "Payload bytes written"),
    "served_bytes_total": (("tier",), "Payload bytes that loads got from the tier"),
    "attach_blocks_total": (("tier", "result"), "Blocks read from below, by what the read cache did"),
    "attach_bytes_total": (("tier", "result"), "The same in payload bytes"),
    "io_errors_total": (("tier", "op", "errno"), "Errors answered by the medium"),
    "touched_bytes_total": (("tier",), "Bytes of memory taken from the system ahead of use"),
    "prepared_segments_total": (("tier",), "Segments made and written through ahead of use"),
    "prepared_bytes_total": (("tier",), "Bytes written to prepare segments"),
    "evictions_total": (("tier",), "Blocks evicted by the policy"),
    "published_extents_total": (("tier",), "Extents that this member has published"),
    "published_bytes_total": (("tier",), "Bytes on the medium of extents that this member has published"),
    "unpublished_blocks_total": (("tier",), "Saved blocks whose extent could not be published"),
    "no_grant_blocks_total": (("tier",), "Blocks not saved for want of room that was granted"),
    "found_blocks_total": (("tier",), "Blocks found in extents of other members"),
    "lost_blocks_total": (("tier",), "Blocks that left with their extent"),
    "duplicate_blocks_total": (("tier",), "Blocks that lie in more than one extent"),
    "damaged_files_total": (("tier", "what"), "Files of a shared folder that could not be read"),
    "rejoins_total": (("tier",), "Times that this process had to join a shared folder anew"),
    "expired_total": (("tier",), "Blocks that reached their TTL"),
    "restored_blocks_total": (("tier",), "Blocks found when the tier opened"),
    "restore_dropped_total": (("tier", "reason"), "Slots or blocks not taken over when the tier opened"),
    "breaker_opened_total": (("tier", "op"), "Times the tier went out of service"),
    "probes_total": (("tier", "op", "result"), "Probes of a tier that was out of service"),
    "shared_takeovers_total": (("tier",), "Times this member became the collector of a shared folder"),
    "shared_fenced_total": (("tier",), "Cycles that stopped: another member may collect now"),
    "shared_collected_extents_total": (("tier",), "Extents removed to make room"),
    "shared_collected_bytes_total": (("tier",), "Bytes of extents removed to make room"),
    "shared_rewritten_bytes_total": (("tier",), "Bytes of extents written to leave dead blocks behind"),
    "shared_lost_blocks_total": (("tier",), "Live blocks that went with their extent"),
    "shared_adopted_extents_total": (("tier",), "Extents taken over from members that are no more"),
    "shared_expired_total": (("tier",), "Blocks of a folder that the collector found past their TTL"),
    "shared_orphans_total": (("tier", "kind"), "Files removed that belonged to nobody"),
    "shared_missing_extents_total": (("tier",), "Published extents whose file was not there"),
    "shared_foreign_files_total": (("tier",), "Files seen that are not kvstrata's, and left alone"),
    "shared_duplicates_total": (("tier",), "Copies of blocks that live in another extent"),
    "shared_damaged_blocks_total": (("tier",), "Blocks found damaged while extents were rewritten"),
    "shared_access_damaged_total": (("tier",), "Access logs of which the rest made no sense"),
    "object_requests_total": (("tier",), "Requests for blocks that an object store has answered"),
    "object_gap_bytes_total": (("tier",), "Bytes fetched that lay between the blocks asked for"),
    "upload_retries_total": (("tier",), "Uploads of extents that were tried again"),
    "throttle_waits_total": ((), "Saves that waited for room in the queue"),
    "huge_page_bytes_total": ((), "Bytes of the engine's host memory turned into huge pages"),
    "quarantined_rows_total": ((), "Engine rows withheld while a late read may still write to them"),
    "capture_requests_total": (("result",), "Requests of the capture, by what became of them"),
    "capture_bytes_total": ((), "Bytes of capture files written"),
    "capture_removed_total": ((), "Old capture files removed to make room for new ones"),
    "capture_errors_total": (("errno",), "Errors that ended the capture"),
    "serve_clients_total": (("end",), "Clients of the server that went, by how"),
    "serve_rejected_total": (("bound",), "Blocks and regions of clients that passed a bound, by bound"),
    "serve_huge_page_bytes_total": ((), "Bytes of clients' memory turned into huge pages"),
    "serve_connects_total": (("result",), "Attempts to reach the server, by result"),
    "serve_lost_total": (("reason",), "Connections to the server that were lost, by reason"),
    "serve_staged_bytes_total": (("op",), "Bytes copied to or from the arena shared with the server"),
    "serve_staging_full_total": (("op",), "Blocks turned away because that arena was full"),
}  # fmt: skip

HISTOGRAMS: dict[str, tuple[tuple[str, ...], str]] = {
    "read_seconds": (("tier",), "Time to read and verify one block"),
    "write_seconds": (("tier",), "Time to checksum and write one block"),
    "load_seconds": ((), "Time from load() to its verdict"),
    "save_seconds": ((), "Time from save() to its verdict"),
}

BUCKETS_SECONDS = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip


@dataclass(slots=True)
class Histogram:
    """Counts per bucket (last one: above all bounds) and the sum of what was observed."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_SECONDS) + 1))
    total_seconds: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS_SECONDS, seconds)] += 1
        self.total_seconds += seconds

    def add(self, counts: Sequence[int], total_seconds: float) -> None:
        for place, count in enumerate(counts):
            self.counts[place] += count
        self.total_seconds += total_seconds


@dataclass(frozen=True, slots=True)
class Event:
    """Something an operator wants to read once: when (Unix seconds), what, and where."""

    unix_seconds: float
    kind: str
    detail: str


class Telemetry:
    """Thread-safe. max_events bounds the remembered events; counters are bounded by their labels."""

    def __init__(self, max_events: int = 1_000) -> None:
        self._lock = threading.Lock()
        self._counters: dict[tuple[str, tuple[str, ...]], int] = {}
        self._histograms: dict[tuple[str, tuple[str, ...]], Histogram] = {}
        self._events: deque[Event] = deque(maxlen=max_events)

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """Add to a counter; labels in the catalogue's order."""
        assert len(labels) == len(CATALOGUE[name][0]), (name, labels)
        if by == 0:
            return
        with self._lock:
            key = (name, labels)
            self._counters[key] = self._counters.get(key, 0) + by

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        assert len(labels) == len(HISTOGRAMS[name][0]), (name, labels)
        with self._lock:
            key = (name, labels)
            histogram = self._histograms.get(key)
            if histogram is None:
                histogram = self._histograms[key] = Histogram()
            histogram.observe(seconds)

    def observe_all(self, name: str, counts: Sequence[int], seconds: float, *labels: str) -> None:
        """`observe` for many: how many fell into each bucket, and the sum of their seconds."""
        assert len(labels) == len(HISTOGRAMS[name][0]), (name, labels)
        with self._lock:
            self._histograms.setdefault((name, labels), Histogram()).add(counts, seconds)

    def event(self, kind: str, detail: str) -> None:
        with self._lock:
            self._events.append(Event(time.time(), kind, detail))

    def value(self, name: str, *labels: str) -> int:
        """One counter; with fewer labels than it has, the sum over the rest."""
        with self._lock:
            return sum(
                value
                for (known, have), value in self._counters.items()
                if known == name and have[: len(labels)] == labels
            )

    def counters(self) -> dict[str, dict[tuple[str, ...], int]]:
        """A copy: name -> labels -> value."""
        copy: dict[str, dict[tuple[str, ...], int]] = {}
        with self._lock:
            for (name, labels), value in self._counters.items():
                copy.setdefault(name, {})[labels] = value
        return copy

    def histograms(self) -> dict[str, dict[tuple[str, ...], Histogram]]:
        """A copy: name -> labels -> histogram."""
        copy: dict[str, dict[tuple[str, ...], Histogram]] = {}
        with self._lock:
            for (name, labels), value in self._histograms.items():
                copy.setdefault(name, {})[labels] = Histogram(list(value.counts), value.total_seconds)
        return copy

    def events(self) -> list[Event]:
        """The remembered events, oldest first."""
        with self._lock:
            return list(self._events)
