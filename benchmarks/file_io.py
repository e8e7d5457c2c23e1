"""What moves blocks: the I/O engine's two ways, and others, in turn on files of one folder.

engine, threads   the compiled engine with threads that wait in preadv and pwritev
engine, io_uring  the compiled engine on io_uring, where it can be had
python threads    preadv and pwritev of blocks in a pool of Python threads
one thread        the same in one Python thread
liburing          one ring of depth 8 through the `liburing` package, if it can be imported
fio               io_uring of depth 8, if fio is installed: what the machine can do without Python

With O_DIRECT and buffers on huge pages. A measurement moves every block of a working file once, in an order
that is random and the same for all; no two blocks share a buffer. The engine moves a page of header beside
each block, and makes or verifies header and checksum; the others move bytes. Everything but fio is measured
twice: in a process that does nothing else, and beside a thread that runs Python code, as an engine's
scheduler does. The files are removed afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from harness import in_turn, machine, pair_ratio, parser, show, spread, write_json
from kvstrata.config import GIB, KIB, MIB
from kvstrata.tiers.nvme_format import segment_size, slot_offset, slot_stride
from kvstrata.transfer import engine_kernels as k
from kvstrata.transfer.buffers import Arena, Region
from kvstrata.transfer.engine import Engine, EngineSettings, Kind, Rows
from kvstrata.transfer.file_io import FileIO
from kvstrata.transfer.ring import ring_refused

try:
    import liburing
except ImportError:
    liburing = None

DEPTH = 8
BLOCK_BYTES = (128 * KIB, MIB, 4 * MIB)
BUSY_BLOCKS = 128
"""Beside a busy thread a measurement moves so many blocks at most: each may wait for a turn of 5 ms."""
WAIT_SECONDS = 600.0


class Workload:
    """The first blocks of a random order: offsets in a plain file, and a buffer of its own each."""

    def __init__(self, path: Path, blocks: int, of: int, block_bytes: int, arena: Arena) -> None:
        self.path = path
        self.block_bytes = block_bytes
        self.blocks = blocks
        self.order = np.random.default_rng(1).permutation(of)[:blocks]
        self.offsets: list[int] = (self.order * block_bytes).tolist()
        self.buffers = [arena.view[n * block_bytes : (n + 1) * block_bytes] for n in range(blocks)]


class Slots:
    """A file of slots for every block, written once, and an engine of each kind for it."""

    def __init__(self, path: Path, blocks: int, block_bytes: int, arena: Arena) -> None:
        self._io, self._path = FileIO(), path
        self._stride = slot_stride(block_bytes)
        self._region = Region(arena.view, block_bytes)
        self._fd = self._io.open(path, create=True, direct=True)
        self._io.allocate(self._fd, segment_size(blocks, self._stride))
        self._checksums = np.zeros(blocks, dtype=np.int64)
        kinds: list[Kind] = ["threads"] if ring_refused() else ["threads", "ring"]
        self.engines = {kind: self._engine(kind, blocks, block_bytes) for kind in kinds}
        self.move(self.engines["threads"], np.arange(blocks), write=True)

    def _engine(self, kind: Kind, blocks: int, block_bytes: int) -> Engine:
        settings = EngineSettings(
            kind, workers=DEPTH, store_workers=DEPTH, capacity=blocks, merge_bytes=0, priority=False
        )
        return Engine("file-io", settings, stride=self._stride, payload_bytes=block_bytes)

    def rows(self, order: Any, write: bool) -> Rows:
        rows = np.zeros((len(order), k.COLUMNS), dtype=np.int64)
        buffers = self._region.rows(np.arange(len(order)))
        rows[:, k.KIND] = k.WRITE if write else k.READ
        rows[:, k.FD] = self._fd
        rows[:, k.OFFSET] = slot_offset(0, self._stride) + order * self._stride
        rows[:, k.ADDRESS], rows[:, k.LENGTH] = buffers.addresses, buffers.lengths
        rows[:, k.NUMBER] = rows[:, k.KEY] = order
        rows[:, k.CHECKSUM] = self._checksums[order]
        rows[:, k.FLAGS] = k.DIRECT
        rows[:, k.DEADLINE_NS] = 1 << 62
        rows[:, k.POSITION] = np.arange(len(order))
        return rows

    def move(self, engine: Engine, order: Any, *, write: bool) -> float:
        """Seconds from handing the blocks over to hearing of the last one."""
        done, left = threading.Event(), len(order)

        def on_done(rows: Rows) -> None:
            nonlocal left
            assert not rows[:, k.RESULT].any(), "a block was not moved, or not what was written"
            if write:
                self._checksums[order[rows[:, k.POSITION]]] = rows[:, k.CHECKSUM]
            left -= len(rows)
            if not left:
                done.set()

        started = time.perf_counter()
        engine.submit(self.rows(order, write), loads=not write, on_done=on_done)
        assert done.wait(WAIT_SECONDS), "the engine does not answer"
        return time.perf_counter() - started

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close(10)
        self._io.close(self._fd)
        self._path.unlink()


def through_pool(work: Workload, io: FileIO, fd: int, write: bool, pool: ThreadPoolExecutor) -> float:
    call = io.write if write else io.read

    def move(buffer: memoryview, offset: int) -> int:
        return call(fd, [buffer], offset)

    started = time.perf_counter()
    moved = sum(pool.map(move, work.buffers, work.offsets))
    assert moved == work.blocks * work.block_bytes
    return time.perf_counter() - started


def through_one_thread(work: Workload, io: FileIO, fd: int, write: bool) -> float:
    call = io.write if write else io.read
    started = time.perf_counter()
    for buffer, offset in zip(work.buffers, work.offsets, strict=True):
        assert call(fd, [buffer], offset) == work.block_bytes
    return time.perf_counter() - started


def through_liburing(work: Workload, fd: int, write: bool) -> float:
    """Up to DEPTH operations in flight, a new one for each that ends."""
    prepare = liburing.io_uring_prep_writev if write else liburing.io_uring_prep_readv
    vectors = [liburing.Iovec([buffer]) for buffer in work.buffers]
    ring, cqe = liburing.Ring(), liburing.Cqe()
    liburing.io_uring_queue_init(DEPTH, ring)
    todo = iter(enumerate(work.offsets))
    try:
        started = time.perf_counter()

        def push() -> bool:
            number, offset = next(todo, (-1, 0))
            if number < 0:
                return False
            sqe = liburing.io_uring_get_sqe(ring)
            prepare(sqe, fd, vectors[number], offset)
            return True

        flying = sum(push() for _ in range(DEPTH))
        liburing.io_uring_submit(ring)
        while flying:
            liburing.io_uring_wait_cqe(ring, cqe)
            entry = cqe[0]
            assert entry.res == work.block_bytes
            liburing.io_uring_cqe_seen(ring, entry)
            if push():
                liburing.io_uring_submit(ring)
            else:
                flying -= 1
        return time.perf_counter() - started
    finally:
        liburing.io_uring_queue_exit(ring)


def through_fio(work: Workload, write: bool) -> float:
    command = [
        "fio", "--name=kvstrata", f"--filename={work.path}", f"--size={work.blocks * work.block_bytes}",
        f"--bs={work.block_bytes}", f"--rw={'randwrite' if write else 'randread'}", "--direct=1",
        "--ioengine=io_uring", f"--iodepth={DEPTH}", "--mem_align=2m", "--allow_file_create=0",
        "--thread=0", "--randseed=1", "--output-format=json",
    ]  # fmt: skip
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    job = json.loads(answer.stdout[answer.stdout.index("{") :])["jobs"][0]
    side = job["write" if write else "read"]
    return work.blocks * work.block_bytes / side["bw_bytes"]


@contextmanager
def busy_thread() -> Iterator[None]:
    """A thread that runs Python code and never waits."""
    stop = threading.Event()

    def spin() -> None:
        number = 0
        while not stop.is_set():
            number += 1

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def beside_busy(side: Callable[[], float]) -> float:
    with busy_thread():
        return side()


def measure(
    folder: Path, file_bytes: int, rounds: int, busy_rounds: int
) -> Iterator[tuple[str, int, str, dict[str, list[float]]]]:
    """(what else runs, block bytes, read or write, seconds per GB of every way)."""
    path = folder / "file_io.bin"
    io = FileIO()
    arena = Arena(file_bytes)
    np.frombuffer(arena.view, dtype=np.uint64)[:] = np.arange(arena.size // 8, dtype=np.uint64)
    fd = io.open(path, create=True, direct=True)
    try:
        io.allocate(fd, file_bytes)
        for offset in range(0, file_bytes, 16 * MIB):
            # New extents are slower to write than old ones: write each once before timing.
            io.write(fd, [arena.view[offset : offset + 16 * MIB]], offset)
        io.sync(fd)
        for block_bytes in BLOCK_BYTES:
            blocks = file_bytes // block_bytes
            slots = Slots(folder / "slots.bin", blocks, block_bytes, arena)
            with ThreadPoolExecutor(DEPTH) as pool:
                whole = Workload(path, blocks, blocks, block_bytes, arena)
                part = Workload(path, min(blocks, BUSY_BLOCKS), blocks, block_bytes, arena)
                for op in ("write", "read"):
                    write = op == "write"
                    idle = _ways(whole, slots, io, fd, write, pool)
                    if shutil.which("fio"):
                        idle["fio"] = partial(through_fio, whole, write)
                    yield "nothing", block_bytes, op, _per_gb(whole, in_turn(idle, rounds))
                    ways = _ways(part, slots, io, fd, write, pool)
                    busy = {name: partial(beside_busy, side) for name, side in ways.items()}
                    yield "a busy thread", block_bytes, op, _per_gb(part, in_turn(busy, busy_rounds))
            slots.close()
    finally:
        io.close(fd)
        path.unlink(missing_ok=True)


def _ways(
    work: Workload, slots: Slots, io: FileIO, fd: int, write: bool, pool: ThreadPoolExecutor
) -> dict[str, Callable[[], float]]:
    names = {"threads": "engine, threads", "ring": "engine, io_uring"}
    ways: dict[str, Callable[[], float]] = {
        names[kind]: partial(slots.move, engine, work.order, write=write)
        for kind, engine in slots.engines.items()
    }
    ways["python threads"] = partial(through_pool, work, io, fd, write, pool)
    ways["one thread"] = partial(through_one_thread, work, io, fd, write)
    if liburing is not None:
        ways["liburing"] = partial(through_liburing, work, fd, write)
    return ways


def _per_gb(work: Workload, seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    moved = work.blocks * work.block_bytes
    return {name: [s / moved * 1e9 for s in series] for name, series in seconds.items()}


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "file_io")
    arguments.add_argument("--dir", type=Path, required=True, help="a folder on the disk to measure")
    arguments.add_argument(
        "--file-mib", type=int, default=512, help="size of the working file, at most 1024"
    )
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--busy-rounds", type=int, default=3)
    options = arguments.parse_args()
    file_bytes = options.file_mib * MIB
    if not 64 * MIB <= file_bytes <= GIB:
        arguments.error("--file-mib must be from 64 to 1024")
    options.dir.mkdir(parents=True, exist_ok=True)

    result: dict[str, Any] = {
        "benchmark": "file_io",
        "machine": machine(["kvstrata", "numpy", "liburing"]),
        "file_bytes": file_bytes,
        "rounds": options.rounds,
        "busy_rounds": options.busy_rounds,
        "io_uring": ring_refused() or "measured",
        "liburing": "measured" if liburing else "not installed",
        "fio": "measured" if shutil.which("fio") else "not installed",
        "series": [],
    }
    rows = []
    with tempfile.TemporaryDirectory(prefix="kvstrata-file-io-", dir=options.dir) as folder:
        for beside, block_bytes, op, series in measure(
            Path(folder), file_bytes, options.rounds, options.busy_rounds
        ):
            best = "engine, io_uring" if "engine, io_uring" in series else "engine, threads"
            ratios = {
                f"{best} to {name}": pair_ratio(other, series[best])
                for name, other in series.items()
                if name != best
            }
            result["series"].append(
                {
                    "beside": beside,
                    "block_bytes": block_bytes,
                    "op": op,
                    "seconds_per_gb": {name: spread(values) for name, values in series.items()},
                    "speed_ratio": ratios,
                }
            )
            for name, values in series.items():
                figures = spread(values)
                ratio = ratios.get(f"{best} to {name}")
                rows.append(
                    [
                        f"{beside}: {name}",
                        f"{block_bytes // KIB} KiB {op}",
                        f"{1 / figures['median']:.2f}",
                        f"{1 / figures['high_quarter']:.2f} .. {1 / figures['low_quarter']:.2f}",
                        f"{ratio:.2f}" if ratio else "",
                    ]
                )
    show(
        f"GB/s with O_DIRECT on {options.file_mib} MiB; ratio: the engine to this way, same rounds",
        ["beside: way", "blocks", "median", "quarters", "ratio"],
        rows,
    )
    write_json(options.json, result)


if __name__ == "__main__":
    main()
