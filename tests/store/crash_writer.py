"""The writer that test_crash.py kills. Not a test.

One process that has paid for its imports and kernels forks a child per round. The child opens the store
and saves, loads, evicts, flushes and reopens until it is killed; the forking process kills it after the
time it was told, with SIGKILL, and says so. Reports go to a file that outlives the child, one JSON line
each:

    {"open": [slots]}              the store is open
    {"submit": [chain, length]}    written before the chain's save is called, in the order of the calls
    {"touch": blocks}              so many blocks are about to be saved again
    {"flushed": [chain, ...]}      every block of these chains was SAVED before a flush that returned True
    {"note": text}                 something the parent should see when a check fails
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from kvstrata.store import BlockStore
from kvstrata.types import Outcome
from store_kit import chain, contents, memory_tier, nvme_tier, open_store

MAX_CHAIN = 6
WRITERS = 3


class Writer:
    """The order of reports is the order of the calls, because both happen under one lock."""

    def __init__(self, store: BlockStore, report: int, first: int, rng: random.Random) -> None:
        self._store = store
        self._report = report
        self._rng = rng
        self._lock = threading.Lock()
        self._next = first
        self._recent: list[tuple[int, int]] = []
        self._saved: list[int] = []
        self._stop = False

    def tell(self, **line: object) -> None:
        os.write(self._report, json.dumps(line).encode() + b"\n")

    def save_some(self, rng: random.Random) -> None:
        with self._lock:
            number, length = self._next, rng.randint(1, MAX_CHAIN)
            self._next += 1
            self._recent = [*self._recent[-40:], (number, length)]
            keys = chain(number, length)
            self.tell(submit=[number, length])
            transfer = self._store.save(keys, contents(keys))
        transfer.wait()
        if transfer.outcomes == [Outcome.SAVED] * length:
            with self._lock:
                self._saved.append(number)

    def save_again(self, rng: random.Random) -> None:
        with self._lock:
            if not self._recent:
                return
            number, length = rng.choice(self._recent)
            keys = chain(number, length)
            self.tell(touch=length)
            transfer = self._store.save(keys, contents(keys))
        transfer.wait()

    def load_some(self, rng: random.Random) -> None:
        with self._lock:
            number, length = rng.choice(self._recent or [(0, 1)])
        keys = chain(number, length)
        targets = [bytearray(8192) for _ in keys]
        transfer = self._store.load(self._store.lookup(keys), targets)
        transfer.wait()
        for key, target, outcome in zip(keys, targets, transfer.outcomes, strict=True):
            if outcome is Outcome.LOADED and [bytes(target)] != contents([key]):
                self.tell(note=f"wrong bytes were served to the writer, chain {number}")

    def flush(self) -> None:
        with self._lock:
            saved, self._saved = self._saved, []
        if self._store.flush():
            self.tell(flushed=saved)

    def work(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop:
            kind = rng.random()
            if kind < 0.65:
                self.save_some(rng)
            elif kind < 0.72:
                self.save_again(rng)
            elif kind < 0.82:
                self.load_some(rng)
            else:
                self.flush()

    def run(self, writers: int, seconds: float) -> int:
        """Write for some time; the number of the next chain."""
        threads = [
            threading.Thread(target=self.work, args=(self._rng.random(),), daemon=True)
            for _ in range(writers)
        ]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        self._stop = True
        for thread in threads:
            thread.join()
        return self._next


def write_until_killed(order: dict[str, object], report: int) -> None:
    rng = random.Random(str(order["seed"]))
    nvme = nvme_tier(
        Path(str(order["folder"])), int(str(order["capacity"])), direct_io=bool(order["direct"])
    )
    tiers = [memory_tier(24), nvme] if order["memory"] else [nvme]
    first = int(str(order["first"]))
    while True:
        store = open_store(*tiers, io_threads=4, io_store_threads=3)
        writer = Writer(store, report, first, rng)
        found = store.status()[-1].open_report
        assert found is not None
        writer.tell(open=[found.slots])
        first = writer.run(1 if order["memory"] else WRITERS, rng.choice([0.02, 0.1, 5.0]))
        store.close()


def make_ready() -> None:
    """Compile or load every kernel here: the children are killed before they could."""
    with tempfile.TemporaryDirectory() as folder:
        for direct in (True, False):
            nvme = nvme_tier(Path(folder) / str(direct), direct_io=direct)
            with open_store(memory_tier(24), nvme) as store:
                keys = chain(1, 4)
                store.save(keys, contents(keys)).wait()
                store.load(store.lookup(keys), [bytearray(8192) for _ in keys]).wait()


def main() -> None:
    make_ready()
    for line in sys.stdin:
        order = json.loads(line)
        report = os.open(order["report"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        child = os.fork()
        if child == 0:
            try:
                write_until_killed(order, report)
            except BaseException as error:  # noqa: BLE001 - reported to the parent
                os.write(report, json.dumps({"note": f"the writer failed: {error!r}"}).encode() + b"\n")
            os._exit(1)
        os.close(report)
        time.sleep(order["seconds"])
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"killed": os.WIFSIGNALED(status)}), flush=True)


if __name__ == "__main__":
    main()
