"""One member of a shared folder, for tests and benchmarks to kill, stop and restart. Not a test.

Run as a program it is a nursery: it pays once for imports and kernels and forks a member per line of its
input, a JSON `Order`. A member works through its share of all requests: it loads what is there of a request
and checks every byte, saves what is not, and now and then does what other members do. It ends cleanly on
SIGTERM. What it reports goes to a file that outlives it, one JSON line each, with the time of the monotonic
clock, which all processes of a machine share:

    {"start": pid, "member": word}   the store is open; again after each rejoin
    {"event": kind, "detail": text}  as soon as it happens
    {"act": counter, "by": n}        something was done as the collector, as soon as it happens
    {"done": n}                      its n-th own request is done
    {"totals": {...}}                blocks by outcome so far, of this process
    {"wrong": key}                   bytes that are not the key's
    {"finished": true}               its share is done; it stays a member and reads now and then
    {"end": text}                    it ended by itself; empty after a clean end
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kvstrata.config import Config, SharedFsTierConfig, StoreConfig
from kvstrata.hashing import chain_keys, namespace_digest
from kvstrata.store import BlockStore
from kvstrata.telemetry import Telemetry
from kvstrata.types import BlockKey, BlockLayout, Lookup, Namespace, Outcome
from store_kit import content

NAMESPACE = Namespace(namespace_digest({"model": "members"}))
SHARED_BLOCKS, GROUP_BLOCKS, OWN_BLOCKS = 4, 4, 8
"""A request: blocks that it has in common with very many others, with some others, and with none."""
FAMILIES, GROUPS = 8, 64
RECENT_REQUESTS = 400
TOTALS_SECONDS = 0.25
RETRY_SECONDS = 0.03
PATIENCE_SECONDS = 60.0
"""A block that finds no room for so long is given up, and counted."""
ACTS = (
    "shared_takeovers_total",
    "shared_collected_extents_total",
    "shared_orphans_total",
    "shared_adopted_extents_total",
    "shared_rewritten_bytes_total",
)


@dataclass(frozen=True)
class Order:
    """What one member is to do. first, step: its own requests are first, first + step, ... below requests.

    tier, store: fields of their configurations beside the path.
    """

    folder: str
    report: str
    first: int
    step: int
    requests: int
    seed: int
    block_bytes: int = 4096
    done: int = 0
    tier: dict[str, Any] = field(default_factory=dict)
    store: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout(self.block_bytes, 1)


def blocks_of(requests: int) -> int:
    """How many different blocks the first requests have."""
    return (
        min(requests, FAMILIES) * SHARED_BLOCKS
        + min(requests, GROUPS) * GROUP_BLOCKS
        + requests * OWN_BLOCKS
    )


@cache
def _prefix(group: int) -> list[int]:
    return [2**31 + group % FAMILIES] * SHARED_BLOCKS + [2**30 + group] * GROUP_BLOCKS


def keys_of(request: int) -> list[BlockKey]:
    """Root first; the beginning is that of many others."""
    tokens = [*_prefix(request % GROUPS), *[request] * OWN_BLOCKS]
    return chain_keys(NAMESPACE.digest, tokens, 1)


def config_of(order: Order) -> Config:
    tier = SharedFsTierConfig(path=order.folder, **order.tier)
    return Config(store=StoreConfig(**order.store), tiers=(tier,))


class Report:
    """Lines that are in the file when the call returns."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def tell(self, **line: Any) -> None:
        line["at"] = round(time.monotonic(), 4)
        os.write(self._fd, json.dumps(line).encode() + b"\n")


class ReportingTelemetry(Telemetry):
    """Events, and what a collector does, are reported at once."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        super().count(name, *labels, by=by)
        if name in ACTS and by:
            self._report.tell(act=name, by=by)

    def event(self, kind: str, detail: str) -> None:
        super().event(kind, detail)
        self._report.tell(event=kind, detail=detail)


class Ended(Exception):  # noqa: N818 - nothing went wrong
    """SIGTERM came."""


class Worker:
    """One process's work."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._rng = random.Random(order.seed)
        self._report = Report(order.report)
        self._totals: Counter[str] = Counter()
        self._told_at = 0.0
        self._member = 0
        self._ended = False
        self._store: BlockStore | None = None

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self._end)
        order = self._order
        telemetry = ReportingTelemetry(self._report)
        store = BlockStore(config_of(order), order.layout, NAMESPACE, telemetry=telemetry)
        self._store = store
        with store:
            with contextlib.suppress(Ended):
                self._work(store)
            self._tell(always=True)
        self._tell(always=True)
        self._report.tell(end="")

    def _end(self, *_: object) -> None:
        self._ended = True

    def _work(self, store: BlockStore) -> None:
        order, rng = self._order, self._rng
        own = range(order.first, order.requests, order.step)
        for number in range(order.done, len(own)):
            self._serve(store, own[number])
            self._report.tell(done=number + 1)
            if rng.random() < 0.5:
                self._read(store, max(0, own[number] - rng.randrange(RECENT_REQUESTS)))
            if rng.random() < 0.1:
                # What another member does just now: both may write it.
                self._serve(store, min(order.requests - 1, own[number] + rng.randrange(order.step)))
        self._report.tell(finished=True)
        while True:
            self._read(store, rng.randrange(order.requests))
            self._pause(0.05)

    def _serve(self, store: BlockStore, request: int) -> None:
        """What an engine does with a request."""
        keys = keys_of(request)
        loaded = self._read(store, request)
        rest = keys[loaded:]
        number = store.new_request()
        self._save(store, rest, number)

    def _read(self, store: BlockStore, request: int) -> int:
        """Load the prefix that is there; returns how many leading blocks came."""
        keys = keys_of(request)
        match = store.lookup(keys)
        self._totals["looked_up"] += len(keys)
        self._totals["hit"] += match.blocks
        self._totals["found_behind_a_gap"] += match.states.count(Lookup.HIT) - match.blocks
        if not match.blocks:
            self._tell()
            return 0
        size = self._order.block_bytes
        targets = [bytearray(size) for _ in range(match.blocks)]
        transfer = store.load(match, targets)
        self._wait(transfer)
        self._check(keys, targets, transfer.outcomes)
        good = [outcome is Outcome.LOADED for outcome in transfer.outcomes]
        store.touch(keys[: len(good)])
        self._tell()
        return good.index(False) if False in good else len(good)

    def _check(
        self, keys: Sequence[BlockKey], targets: Sequence[bytearray], outcomes: Sequence[Outcome]
    ) -> None:
        size = self._order.block_bytes
        for key, target, outcome in zip(keys, targets, outcomes, strict=False):
            self._totals[f"load_{outcome.value}"] += 1
            if outcome is Outcome.LOADED and bytes(target) != content(key, size):
                self._totals["wrong"] += 1
                self._report.tell(wrong=key.hex())

    def _save(self, store: BlockStore, keys: list[BlockKey], request: int) -> None:
        """Until all are there, however long it takes to get room."""
        size = self._order.block_bytes
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while keys:
            transfer = store.save(keys, [content(key, size) for key in keys], request=request)
            self._wait(transfer)
            left: list[BlockKey] = []
            for key, outcome in zip(keys, transfer.outcomes, strict=True):
                self._totals[f"save_{outcome.value}"] += 1
                if outcome not in (Outcome.SAVED, Outcome.PRESENT):
                    left.append(key)
            keys = left
            self._tell()
            if keys:
                if time.monotonic() > give_up_at:
                    self._totals["given_up"] += len(keys)
                    return
                self._pause(RETRY_SECONDS)

    def _wait(self, transfer: Any) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not transfer.wait_released(1.0):
            if time.monotonic() > until:
                raise AssertionError("a transfer hangs")

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)
        self._tell()

    def _tell(self, *, always: bool = False) -> None:
        """Totals, now and then; and whether this process has another id by now."""
        store = self._store
        assert store is not None
        session = getattr(store.tiers[-1], "session", None)
        if session is not None and session.member.id != self._member:
            self._member = session.member.id
            self._report.tell(start=os.getpid(), member=session.member.word)
        if always or time.monotonic() - self._told_at > TOTALS_SECONDS:
            self._told_at = time.monotonic()
            self._report.tell(totals=dict(self._totals))
        if self._ended and not always:
            raise Ended


def work(order: Order) -> None:
    """The life of a forked process."""
    try:
        Worker(order).run()
    except BaseException as error:  # noqa: BLE001 - reported to whoever started this
        Report(order.report).tell(end=f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def make_ready(engine: str = "auto") -> None:
    """Compile or load every kernel here: a forked member should not have to."""
    with tempfile.TemporaryDirectory() as folder:
        order = Order(
            f"{folder}/shared",
            f"{folder}/report",
            0,
            1,
            2,
            0,
            tier={"capacity_bytes": 2**24, "extent_bytes": 2**20, "refresh_seconds": 0.05},
            store={"io_engine": engine, "io_threads": 2, "io_store_threads": 1},
        )
        with BlockStore(config_of(order), order.layout, NAMESPACE) as store:
            until = time.monotonic() + 5.0
            while time.monotonic() < until:
                keys = keys_of(0)
                transfer = store.save(keys, [content(key, order.block_bytes) for key in keys])
                transfer.wait_released(5.0)
                if transfer.outcomes[0] is not Outcome.REJECTED:
                    break
                time.sleep(0.05)
            store.load(store.lookup(keys), [bytearray(order.block_bytes) for _ in keys]).wait_released(5.0)
            store.flush(5.0)


def main() -> None:
    make_ready()
    # Children are not waited for: what became of them is in their reports.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = Order(**json.loads(line))
        child = os.fork()
        if child == 0:
            # The nursery's pipes are not the member's.
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(null, 1)
            work(order)
        print(json.dumps({"pid": child}), flush=True)


def order_line(order: Order) -> str:
    return json.dumps(asdict(order)) + "\n"


def report_lines(path: Path, last_bytes: int = 0) -> list[dict[str, Any]]:
    """All whole lines so far, or those of the last bytes."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        skip = max(0, path.stat().st_size - last_bytes) if last_bytes else 0
        file.seek(skip)
        lines = file.read().splitlines(keepends=True)[bool(skip) :]
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


if __name__ == "__main__":
    main()
