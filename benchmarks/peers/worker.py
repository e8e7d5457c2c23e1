"""A peer in a process of its own: the process's side, and the benchmark's handle of it.

CPU seconds are those of the process and of everything that it started, read from their CPU clocks, so that
threads that have ended count too. What the kernel does in threads of its own for all (writing back dirty
pages, interrupts) is nobody's.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from kvstrata.transfer.buffers import Arena
from peers.base import Peer, PeerError, Shape, sync_folder
from peers.registry import Variant

PR_SET_PDEATHSIG = 1
ANSWER_SECONDS = 300.0
STOP_SECONDS = 10.0
MIX = 0.7
"""Share of the bytes of a mix that are loaded."""


class Bench:
    """What is measured, in terms of a peer: runs of `blocks` blocks, each with numbers of its own."""

    def __init__(self, variant: Variant, shape: Shape, arena: Arena) -> None:
        self.shape = shape
        self.words = np.frombuffer(arena.view, dtype=np.uint64)[: shape.blocks * shape.block_bytes // 8]
        self.words = self.words.reshape(shape.blocks, -1)
        self._fill(range(shape.blocks))
        self.peer: Peer = variant.load()(shape, arena)
        self.run = self.last = -1
        for _ in range(self.peer.FILLS):
            self._save_new()

    def _fill(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.words[row] = self._pattern(row)

    def _pattern(self, row: int) -> Any:
        return np.arange(self.words.shape[1], dtype=np.uint64) + np.uint64(row << 32)

    def _stamp(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.words[block % self.shape.blocks, [0, -1]] = block

    def _blocks(self, run: int) -> list[int]:
        return list(range(run * self.shape.blocks, (run + 1) * self.shape.blocks))

    def _next_run(self) -> int:
        """A number never used. Peers of fixed slots keep even and odd runs apart, so never that of now."""
        self.last += 2 if (self.last - self.run) % 2 else 1
        return self.last

    def _save_new(self) -> dict[str, float]:
        """A new run in place of the last one."""
        run = self._next_run()
        new = self._blocks(run)
        self._stamp(new)
        plan = self.peer.plan(new)
        with self._measured(len(new)) as result:
            self.peer.wait([self.peer.start_save(plan)])
            self.peer.sync()
        if self.run >= 0:
            self.peer.forget(self.peer.plan(self._blocks(self.run)))
        self.run = run
        return result

    def _loaded(self, blocks: list[int], call: Callable[[Any], None], whole: bool) -> None:
        """Call with a plan, and check that the bytes are there afterwards."""
        rows = [block % self.shape.blocks for block in blocks]
        plan = self.peer.plan(blocks)
        self.peer.drop_cache(plan)
        for row in rows:
            self.words[row, slice(None) if whole else [0, -1]] = 0
        call(plan)
        for block, row in zip(blocks, rows, strict=True):
            ends = self.words[row, 0], self.words[row, -1]
            same = not whole or np.array_equal(self.words[row, 1:-1], self._pattern(row)[1:-1])
            if ends != (block, block) or not same:
                raise PeerError(f"block {block} came back with other bytes")

    def write(self, *, bare: bool = False, **_: Any) -> dict[str, float]:
        """Save a whole new chain until it is durable. bare: and nothing else, under a count of calls."""
        if not bare:
            return self._save_new()
        self.peer.wait([self.peer.start_save(self.peer.plan(self._blocks(self._next_run())))])
        self.peer.sync()
        return {}

    def read(self, *, whole: bool = False, bare: bool = False) -> dict[str, float]:
        """Load the whole chain."""
        if not bare:
            return self._read(self._blocks(self.run), whole)
        self.peer.wait([self.peer.start_load(self.peer.plan(self._blocks(self.run)))])
        return {}

    def scattered(self, *, whole: bool = False, seed: int = 0) -> dict[str, float]:
        """Load a random third of the blocks, no two of which are neighbours, in random order."""
        taken: set[int] = set()
        for row in np.random.default_rng(seed).permutation(self.shape.blocks).tolist():
            if len(taken) < max(1, self.shape.blocks // 3) and not taken & {row - 1, row + 1}:
                taken.add(row)
        order = np.random.default_rng(seed + 1).permutation(sorted(taken)).tolist()
        return self._read([self.run * self.shape.blocks + row for row in order], whole)

    def _read(self, blocks: list[int], whole: bool) -> dict[str, float]:
        result: dict[str, float] = {}

        def call(plan: Any) -> None:
            with self._measured(len(blocks)) as measured:
                self.peer.wait([self.peer.start_load(plan)])
            result.update(measured)

        self._loaded(blocks, call, whole)
        return result

    def mixed(self, *, whole: bool = False) -> dict[str, float]:
        """Load the first part of the chain while the rest of a new one is saved, until durable."""
        edge = min(self.shape.blocks - 1, max(1, round(MIX * self.shape.blocks)))
        old, new = self._blocks(self.run)[:edge], self._blocks(self._next_run())[edge:]
        saves = self.peer.plan(new)
        result: dict[str, float] = {}

        def call(loads: Any) -> None:
            with self._measured(self.shape.blocks) as measured:
                tickets = [self.peer.start_save(saves), self.peer.start_load(loads)]
                self.peer.wait(tickets)
                self.peer.sync()
            result.update(measured)

        self._loaded(old, call, whole)
        self.peer.forget(saves)
        self.peer.keep(self.peer.plan(self._blocks(self.run)))
        return result

    def latency(self, *, count: int, stores: bool, seconds: float, **_: Any) -> dict[str, Any]:
        """Seconds of single loads, alone or while a second thread saves without a pause."""
        rows = self.shape.blocks
        wanted = self._blocks(self.run)[: max(1, rows // 2)]
        kept = self.peer.plan(self._blocks(self.run))
        stop = threading.Event()
        saved = [0.0, 0.0]
        failed: list[BaseException] = []

        def pump() -> None:
            quarter = max(1, rows // 4)
            flying: list[tuple[Any, Any]] = []
            half = 0
            started = time.perf_counter()
            try:
                while not stop.is_set():
                    first = self._next_run() * rows + rows - quarter * (1 + half)
                    plan = self.peer.plan(range(first, first + quarter))
                    flying.append((plan, self.peer.start_save(plan)))
                    half = 1 - half
                    if len(flying) == 2:
                        self._end_pumped(flying.pop(0))
                        saved[0] += quarter
                        self.peer.keep(kept)
                saved[1] = time.perf_counter() - started
                for entry in flying:
                    self._end_pumped(entry)
            except BaseException as error:  # noqa: BLE001 (raised again by the thread that waits)
                failed.append(error)

        thread = threading.Thread(target=pump)
        series: list[float] = []
        rng = np.random.default_rng(1)
        order = [[wanted[n]] for n in rng.integers(0, len(wanted), count)]
        plans = [self.peer.plan(blocks) for blocks in order]
        if stores:
            thread.start()
            time.sleep(0.2)
        try:
            until = time.perf_counter() + seconds
            for plan in plans:
                self.peer.drop_cache(plan)
                began = time.perf_counter()
                self.peer.wait([self.peer.start_load(plan)])
                series.append(time.perf_counter() - began)
                if time.perf_counter() > until:
                    break
        finally:
            stop.set()
            if stores:
                thread.join()
        if failed:
            raise failed[0]
        self.peer.keep(self.peer.plan(self._blocks(self.run)))
        rate = saved[0] * self.shape.block_bytes / saved[1] / 1e9 if saved[1] else 0.0
        return {"seconds": series, "stores_gb_per_second": rate}

    def _end_pumped(self, entry: tuple[Any, Any]) -> None:
        plan, ticket = entry
        self.peer.wait([ticket])
        self.peer.forget(plan)

    def views(self, **_: Any) -> dict[str, float]:
        """Seconds per block of handing out views. Ours only."""
        blocks = self._blocks(self.run)
        return {"seconds": self.peer.views_seconds(self.peer.plan(blocks)) / len(blocks)}  # type: ignore[attr-defined]

    def overhead(self, **_: Any) -> dict[str, float]:
        """CPU seconds per block of one load of the chain. Ours only."""
        plan = self.peer.plan(self._blocks(self.run))
        figures = self.peer.overhead(plan)  # type: ignore[attr-defined]
        return {name: value / self.shape.blocks for name, value in figures.items()}

    def allocated(self, **_: Any) -> dict[str, float]:
        """Bytes of Python objects per block of a load. Ours only."""
        plan = self.peer.plan(self._blocks(self.run))
        figures = self.peer.allocated(plan)  # type: ignore[attr-defined]
        return {name: value / self.shape.blocks for name, value in figures.items()}

    @contextmanager
    def _measured(self, blocks: int) -> Iterator[dict[str, float]]:
        result: dict[str, float] = {}
        sync_folder(self.shape.folder)
        cpu, started = cpu_seconds(), time.perf_counter()
        yield result
        moved = blocks * self.shape.block_bytes / 1e9
        result["seconds_per_gb"] = (time.perf_counter() - started) / moved
        result["cpu_seconds_per_gb"] = (cpu_seconds() - cpu) / moved


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and theirs."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            for child in children.read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def cpu_seconds() -> float:
    """Of this process and what it started. A child's clock is the id that clock_getcpuclockid(3) makes."""
    total = time.process_time() - sum(time.clock_gettime(clock) for clock in _spinner)
    for pid in descendants(os.getpid()):
        with suppress(OSError):
            total += time.clock_gettime((~pid << 3) | 2)
    return total


_spinner: list[int] = []
"""CPU clock of the thread that spins, if one does: its time is not the peer's."""


@contextmanager
def spinning(wanted: bool) -> Iterator[None]:
    """A thread of this process that runs Python code and never waits."""
    if not wanted:
        yield
        return
    stop = threading.Event()

    def spin() -> None:
        number = 0
        while not stop.is_set():
            number += 1

    thread = threading.Thread(target=spin)
    thread.start()
    assert thread.ident is not None
    _spinner.append(time.pthread_getcpuclockid(thread.ident))
    try:
        yield
    finally:
        _spinner.clear()
        stop.set()
        thread.join()


def serve(
    pipe: Connection, variant: Variant, shapes: Mapping[str, Shape], arena_bytes: int, log: Path
) -> None:
    """The process: answers (operation, arguments) until the pipe closes."""
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):  # peers print what they like
        os.dup2(written, stream)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    arena = Arena(arena_bytes)
    np.frombuffer(arena.view, dtype=np.uint8)[:: 1 << 12] = 1
    bench: Bench | None = None
    while True:
        try:
            operation, arguments = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            if operation in ("open", "close"):
                if bench is not None:
                    bench, old = None, bench
                    old.peer.close()
                    _empty(old.shape.folder)
                if operation == "open":
                    bench = Bench(variant, shapes[arguments["shape"]], arena)
                answer: Any = None
            elif operation == "ready":
                answer = variant.load().__name__
            elif operation == "pids":
                answer = [os.getpid(), *descendants(os.getpid())]
            else:
                assert bench is not None
                with spinning(arguments.pop("spin", False)):
                    answer = getattr(bench, operation)(**arguments)
        except Exception as error:  # noqa: BLE001 (a peer may raise anything; the benchmark shows it)
            pipe.send(("failed", f"{type(error).__name__}: {error}"))
        else:
            pipe.send(("done", answer))


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


class Worker:
    """The benchmark's handle. Raises PeerError for whatever goes wrong on the other side."""

    def __init__(self, variant: Variant, shapes: Mapping[str, Shape], arena_bytes: int, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, variant, shapes, arena_bytes, log))
        self._process.start()
        other.close()

    def ask(self, operation: str, **arguments: Any) -> Any:
        try:
            self._pipe.send((operation, arguments))
            if not self._pipe.poll(ANSWER_SECONDS):
                raise PeerError(f"no answer for {ANSWER_SECONDS:.0f} s")
            state, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(STOP_SECONDS)
            raise PeerError(f"its process ended with {self._process.exitcode}") from error
        if state == "failed":
            raise PeerError(answer)
        return answer

    def stop(self) -> None:
        """Let it end by itself, then make it."""
        with suppress(PeerError, OSError):
            self.ask("close")
        self._pipe.close()
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            for pid in descendants(self._process.pid or 0):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
