"""Many members of one folder, killed, stopped and restarted at random, and a monitor of that folder.

The monitor looks at the folder where the server keeps it, if there is such a place: it asks none of the
members' mounts, and it sees what really lies on the medium. Nothing here decides what a run must show.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from member_process import (
    NAMESPACE,
    Order,
    blocks_of,
    config_of,
    keys_of,
    order_line,
    report_lines,
)

from kvstrata.store import BlockStore
from kvstrata.tiers.shared.batches import Batch, BatchKind, Tail, decode_batches
from kvstrata.tiers.shared.format import (
    COLLECTOR,
    EXTENTS,
    MEMBERS,
    TEMPORARY,
    WRITING,
    ExtentId,
    parse_member,
    parse_numbered,
)
from kvstrata.tiers.shared.small_files import Beat, Grants
from kvstrata.types import BlockKey, Lookup, Outcome
from store_kit import content

HERE = Path(__file__).parent
NO_SERVER_FILES = ".glusterfs"
WAIT_SECONDS = 120.0
TAIL_BYTES = 32_768
"""Of a report: it is read often while it grows."""
DOWN_AT_ONCE = 3
"""So many members at most are killed or stopped at the same time."""


class Nursery:
    """A process that has paid for imports and kernels, and forks members from then on."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "member_process.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._lock = threading.Lock()
        assert "ready" in self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the nursery of members died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self, order: Order) -> int:
        """Fork a member; its process number."""
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(order_line(order))
            self._process.stdin.flush()
            return int(self._answer()["pid"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    opened = Nursery()
    try:
        yield opened
    finally:
        opened.close()


@dataclass
class Slot:
    """One member of the crowd, through all its lives. reports: one file per life."""

    order: Order
    reports: list[Path] = field(default_factory=list)
    pid: int = 0
    stopped: bool = False
    back_at: float = 0.0
    done: int = 0

    @property
    def running(self) -> bool:
        return bool(self.pid) and Path(f"/proc/{self.pid}").exists()


@dataclass
class Sight:
    """What the monitor saw. orphan_seconds: how long a part file stayed after its process had died, the
    longest; ownerless_seconds: after its member had been declared dead.
    """

    samples: int = 0
    most_bytes: int = 0
    most_files: int = 0
    orphan_seconds: float = 0.0
    ownerless_seconds: float = 0.0
    collectors: dict[int, set[str]] = field(default_factory=dict)
    """Who was seen as the collector of an epoch: by the epoch's file, and by the grants of that epoch."""
    pids: dict[str, int] = field(default_factory=dict)
    """Process of each member id."""


class Monitor:
    """Looks at the folder again and again, on a thread."""

    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        self.sight = Sight()
        self.died_at: dict[int, float] = {}
        self._folder = folder
        self._capacity_bytes = capacity_bytes
        self._alone_since: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.look()

    def look(self) -> None:
        sight = self.sight
        size, files = du(self._folder)
        sight.samples += 1
        sight.most_bytes = max(sight.most_bytes, size)
        sight.most_files = max(sight.most_files, files)
        if sight.samples % 5 == 1:
            self._look_at_members()
            self._look_at_collectors()
            self._look_at_parts()

    def _look_at_members(self) -> None:
        for word in names(self._folder / MEMBERS):
            if word not in self.sight.pids:
                beat = Beat.decode(data_of(self._folder / MEMBERS / word / "beat"))
                if beat is not None:
                    self.sight.pids[word] = beat.pid

    def _look_at_collectors(self) -> None:
        for name in names(self._folder / COLLECTOR):
            epoch, grants = parse_numbered(name, "epoch"), parse_numbered(name, "grants")
            data = data_of(self._folder / COLLECTOR / name)
            if epoch is not None and data:
                self.sight.collectors.setdefault(epoch, set()).add(data.decode())
            elif grants is not None and (found := Grants.decode(data)) is not None:
                self.sight.collectors.setdefault(found.epoch, set()).add(found.collector)

    def _look_at_parts(self) -> None:
        parts = [name for name in names(self._folder / WRITING) if ExtentId.parse(name) is not None]
        members = set(names(self._folder / MEMBERS))
        now = time.monotonic()
        alone = {name for name in parts if name.partition("-")[0] not in members}
        self._alone_since = {name: self._alone_since.get(name, now) for name in alone}
        sight = self.sight
        for since in self._alone_since.values():
            sight.ownerless_seconds = max(sight.ownerless_seconds, now - since)
        for name in parts:
            died = self.died_at.get(sight.pids.get(name.partition("-")[0], 0))
            if died is not None:
                sight.orphan_seconds = max(sight.orphan_seconds, now - died)

    def holder_pid(self) -> int:
        """The process that is the collector, as far as is known; 0 otherwise."""
        collectors = self.sight.collectors
        words = collectors.get(max(collectors, default=0), set())
        return next((self.sight.pids.get(word, 0) for word in words), 0)


def names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def data_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def du(folder: Path) -> tuple[int, int]:
    """Bytes that a folder and everything in it occupy, and how many files there are: `du -s -B1`."""
    total, files, waiting = 0, 0, [str(folder)]
    with contextlib.suppress(OSError):
        total += folder.stat().st_blocks * 512
    while waiting:
        try:
            with os.scandir(waiting.pop()) as found:
                for entry in found:
                    if entry.name == NO_SERVER_FILES:
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
                        else:
                            files += 1
        except FileNotFoundError:
            continue
    return total, files


class Crowd:
    """Members on several mounts of one folder. `run` lets them work, and kills, stops and restarts them."""

    def __init__(self, home: Nursery, orders: Sequence[Order], monitor: Monitor, seed: int) -> None:
        self.slots = [Slot(order) for order in orders]
        self.deeds: Counter[str] = Counter()
        self._home = home
        self._monitor = monitor
        self._rng = random.Random(seed)
        self._lease_seconds = float(orders[0].tier["lease_seconds"])

    def start(self, slot: Slot) -> None:
        life = len(slot.reports)
        path = Path(f"{slot.order.report}.{life}")
        slot.reports.append(path)
        changes = {"report": str(path), "done": slot.done, "seed": slot.order.seed + 1000 * life}
        slot.pid = self._home.start(Order(**{**slot.order.__dict__, **changes}))
        slot.stopped = False
        slot.back_at = 0.0

    def finished(self, slot: Slot) -> bool:
        """Has it done its share of the requests?"""
        own = range(slot.order.first, slot.order.requests, slot.order.step)
        return self._progress(slot) >= len(own)

    def _progress(self, slot: Slot) -> int:
        """How many of its own requests are done, in all its lives."""
        for line in reversed(report_lines(slot.reports[-1], TAIL_BYTES)) if slot.reports else ():
            if "done" in line:
                slot.done = max(slot.done, line["done"])
                break
        return slot.done

    def run(
        self, seconds: float, pause: tuple[float, float], *, chaos: bool = True, least: int = 0
    ) -> bool:
        """Until all have done their share and `least` of them were harmed; False if that takes longer.

        pause: between two deeds, at least and at most, in seconds.
        """
        for slot in self.slots:
            self.start(slot)
        until = time.monotonic() + seconds
        next_deed = time.monotonic() + self._rng.uniform(*pause)
        while self.deeds.total() < least or not all(self.finished(slot) for slot in self.slots):
            if time.monotonic() > until:
                return False
            self._bring_back(time.monotonic())
            if chaos and time.monotonic() >= next_deed:
                self._do_harm()
                next_deed = time.monotonic() + self._rng.uniform(*pause)
            time.sleep(0.05)
        self._bring_back(float("inf"))
        return True

    def _bring_back(self, now: float) -> None:
        for slot in self.slots:
            if not slot.back_at or now < slot.back_at:
                if not slot.running and not slot.back_at:
                    # It ended by itself, which only a close or an error can be.
                    slot.back_at = time.monotonic() + 0.1
                continue
            if slot.stopped:
                os.kill(slot.pid, signal.SIGCONT)
                slot.stopped, slot.back_at = False, 0.0
            elif not slot.running:
                self._progress(slot)
                self.start(slot)

    def _do_harm(self) -> None:
        rng, lease = self._rng, self._lease_seconds
        up = [slot for slot in self.slots if slot.running and not slot.stopped and not slot.back_at]
        if len(self.slots) - len(up) >= min(DOWN_AT_ONCE, len(self.slots) - 1):
            return
        holder = self._monitor.holder_pid()
        slot = next((slot for slot in up if slot.pid == holder and rng.random() < 0.4), rng.choice(up))
        what = "collector " if slot.pid == holder else ""
        kind = rng.random()
        if kind < 0.5:
            os.kill(slot.pid, signal.SIGKILL)
            self._monitor.died_at[slot.pid] = time.monotonic()
            slot.back_at = time.monotonic() + rng.uniform(0.0, 1.5 * lease)
            self.deeds[what + "killed"] += 1
        elif kind < 0.8:
            os.kill(slot.pid, signal.SIGSTOP)
            slot.stopped = True
            slot.back_at = time.monotonic() + rng.uniform(1.2 * lease, 2.2 * lease)
            self.deeds[what + "stopped"] += 1
        else:
            os.kill(slot.pid, signal.SIGTERM)
            self.deeds[what + "closed"] += 1

    def close(self, *, kill: bool = False) -> None:
        """End all members, cleanly unless told otherwise."""
        for slot in self.slots:
            if slot.running:
                os.kill(slot.pid, signal.SIGKILL if kill else signal.SIGTERM)
                os.kill(slot.pid, signal.SIGCONT)
        until = time.monotonic() + WAIT_SECONDS
        while any(slot.running for slot in self.slots):
            assert time.monotonic() < until, "a member does not end"
            time.sleep(0.02)

    def lines(self) -> list[dict[str, Any]]:
        """Everything that was reported, in the order of time."""
        found = [line for slot in self.slots for path in slot.reports for line in report_lines(path)]
        return sorted(found, key=lambda line: float(line["at"]))

    def totals(self) -> Counter[str]:
        """Of all lives of all members, as far as they came to tell."""
        total: Counter[str] = Counter()
        for slot in self.slots:
            for path in slot.reports:
                said = [line["totals"] for line in report_lines(path) if "totals" in line]
                total.update(said[-1] if said else {})
        return total

    def acts(self) -> tuple[dict[int, set[str]], Counter[str]]:
        """Who acted in each epoch by the members' own words, and how much of what was done."""
        by_epoch: dict[int, set[str]] = {}
        done: Counter[str] = Counter()
        for slot in self.slots:
            for path in slot.reports:
                epoch, member = 0, ""
                for line in report_lines(path):
                    if line.get("event") == "shared collector":
                        epoch, member = _epoch_of(line["detail"])
                    elif "act" in line and line["act"] != "shared_takeovers_total":
                        assert epoch, f"{path}: acted as the collector of no epoch: {line}"
                        by_epoch.setdefault(epoch, set()).add(member)
                        done[line["act"]] += line["by"]
        return by_epoch, done


def _epoch_of(detail: str) -> tuple[int, str]:
    """From "tier: epoch N, member"."""
    words = detail.rpartition("epoch ")[2].split(", ")
    return int(words[0]), words[1]


@dataclass
class Remains:
    """What lies in the folder against what the journals say. parts: of anybody. dead: members that closed
    or died and still have a folder."""

    parts: list[str] = field(default_factory=list)
    unreferenced: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    temporary: list[str] = field(default_factory=list)
    members: list[str] = field(default_factory=list)
    extents: int = 0
    damaged: list[str] = field(default_factory=list)


def remains(folder: Path) -> Remains:
    """Read all journals, as a newcomer would, and compare."""
    found = Remains(members=names(folder / MEMBERS))
    live: set[ExtentId] = set()
    gone: set[ExtentId] = set()
    for word in found.members:
        assert parse_member(word) is not None
        said: list[Batch] = []
        for name in sorted(
            names(folder / MEMBERS / word), key=lambda name: parse_numbered(name, "journal") or 0
        ):
            if parse_numbered(name, "journal") is None:
                continue
            batches, _, tail = decode_batches(data_of(folder / MEMBERS / word / name))
            if tail is not Tail.NOTHING:
                found.damaged.append(f"{word}/{name}")
            if batches and batches[0].kind is BatchKind.SNAPSHOT:
                said = []
            said += batches
        for batch in said:
            live |= {added.extent for added in batch.added}
            gone |= set(batch.gone)
    there: set[ExtentId] = set()
    for name in names(folder / EXTENTS):
        extent = ExtentId.parse(name)
        assert extent is not None, name
        there.add(extent)
    found.extents = len(there)
    found.unreferenced = [extent.word for extent in there - (live - gone)]
    found.missing = [extent.word for extent in (live - gone) - there]
    found.parts = names(folder / WRITING)
    found.temporary = [
        name for place in (COLLECTOR, WRITING, EXTENTS) for name in names(folder / place)
        if name.endswith(TEMPORARY)
    ]  # fmt: skip
    return found


def read_everything(order: Order) -> Counter[str]:
    """A newcomer that only reads loads every block that it finds, once, and checks all bytes."""
    order = Order(**{**order.__dict__, "tier": {**order.tier, "collect": False}})
    totals: Counter[str] = Counter()
    seen: set[BlockKey] = set()
    with BlockStore(config_of(order), order.layout, NAMESPACE) as store:
        totals["indexed"] = store.status()[-1].blocks
        for request in range(order.requests):
            keys = [key for key in keys_of(request) if key not in seen]
            seen.update(keys)
            states = store.lookup(keys).states
            present = [key for key, state in zip(keys, states, strict=True) if state is Lookup.HIT]
            targets = [bytearray(order.block_bytes) for _ in present]
            transfer = store.load(store.lookup(present), targets)
            assert transfer.wait_released(WAIT_SECONDS)
            for key, target, outcome in zip(present, targets, transfer.outcomes, strict=True):
                totals[outcome.value] += 1
                if outcome is Outcome.LOADED and bytes(target) != content(key, order.block_bytes):
                    totals["wrong"] += 1
        store.check_integrity()
    return totals


def make_orders(
    folders: Sequence[Path], reports: Path, members: int, blocks: int, seed: int, **fields: Any
) -> list[Order]:
    """Orders for so many members on those mounts in turn, which write about `blocks` different blocks."""
    requests = next(n for n in range(1, blocks) if blocks_of(n) >= blocks)
    return [
        Order(
            str(folders[number % len(folders)]),
            str(reports / f"member-{number}"),
            number,
            members,
            requests,
            seed + number,
            **fields,
        )
        for number in range(members)
    ]
