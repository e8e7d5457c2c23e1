"""Threads or io_uring? Ways to read and write blocks with O_DIRECT from Python, in turn on one file.

threads   preadv and pwritev in the threads of `TransferExecutor`, as the nvme tier does
one       preadv and pwritev in one thread
io_uring  one ring of depth 8 through the `liburing` package, if it can be imported
fio       io_uring of depth 8, if fio is installed: what the machine can do without Python

All buffers lie on huge pages. A measurement moves every block of the working file once, in an order that
is random and the same for all. The Python ways are measured twice: in a process that does nothing else, and
beside a thread that runs Python code, as an engine's scheduler does. The file is removed afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from harness import in_turn, machine, pair_ratio, parser, show, spread, write_json
from kvstrata.config import GIB, KIB, MIB
from kvstrata.transfer.buffers import HUGE_PAGE, Arena
from kvstrata.transfer.executor import TransferExecutor
from kvstrata.transfer.file_io import FileIO
from kvstrata.transfer.plan import Direction

try:
    import liburing
except ImportError:
    liburing = None

THREADS = DEPTH = 8
BLOCK_BYTES = (128 * KIB, MIB, 4 * MIB)
SWITCH_SECONDS = 1e-4
BUSY_BLOCKS = 128
"""Beside a busy thread a measurement moves so many blocks at most: each may wait for a turn of 5 ms."""


class Workload:
    """Blocks of a file in a random order, and buffers in an arena for them."""

    def __init__(self, path: Path, blocks: int, block_bytes: int, arena: Arena) -> None:
        self.path = path
        self.block_bytes = block_bytes
        self.file_bytes = blocks * block_bytes
        order = np.random.default_rng(1).permutation(blocks)
        self.offsets: list[int] = (order * block_bytes).tolist()
        slots = arena.size // block_bytes
        self.buffers = [arena.view[n * block_bytes : (n + 1) * block_bytes] for n in range(slots)]


def through_threads(work: Workload, io: FileIO, fd: int, write: bool, executor: TransferExecutor) -> float:
    call = io.write if write else io.read
    left = threading.Semaphore(0)

    def job(number: int, offset: int) -> Callable[[], None]:
        def run() -> None:
            moved = call(fd, [work.buffers[number % len(work.buffers)]], offset)
            assert moved == work.block_bytes
            left.release()

        return run

    started = time.perf_counter()
    executor.submit(Direction.LOAD, [job(n, offset) for n, offset in enumerate(work.offsets)])
    for _ in work.offsets:
        left.acquire()
    return time.perf_counter() - started


def through_one_thread(work: Workload, io: FileIO, fd: int, write: bool) -> float:
    call = io.write if write else io.read
    started = time.perf_counter()
    for number, offset in enumerate(work.offsets):
        assert call(fd, [work.buffers[number % len(work.buffers)]], offset) == work.block_bytes
    return time.perf_counter() - started


def through_ring(work: Workload, fd: int, write: bool) -> float:
    """Up to DEPTH operations in flight, a new one for each that ends."""
    prepare = liburing.io_uring_prep_writev if write else liburing.io_uring_prep_readv
    vectors = [liburing.Iovec([work.buffers[n]]) for n in range(DEPTH)]
    ring, cqe = liburing.Ring(), liburing.Cqe()
    liburing.io_uring_queue_init(DEPTH, ring)
    todo = iter(work.offsets)
    try:
        started = time.perf_counter()

        def push(slot: int) -> bool:
            offset = next(todo, None)
            if offset is None:
                return False
            sqe = liburing.io_uring_get_sqe(ring)
            prepare(sqe, fd, vectors[slot], offset)
            sqe.user_data = slot + 1
            return True

        flying = sum(push(slot) for slot in range(DEPTH))
        liburing.io_uring_submit(ring)
        while flying:
            liburing.io_uring_wait_cqe(ring, cqe)
            entry = cqe[0]
            assert entry.res == work.block_bytes
            slot = entry.user_data - 1
            liburing.io_uring_cqe_seen(ring, entry)
            if push(slot):
                liburing.io_uring_submit(ring)
            else:
                flying -= 1
        return time.perf_counter() - started
    finally:
        liburing.io_uring_queue_exit(ring)


def through_fio(work: Workload, write: bool) -> float:
    command = [
        "fio", "--name=kvstrata", f"--filename={work.path}", f"--size={work.file_bytes}",
        f"--bs={work.block_bytes}", f"--rw={'randwrite' if write else 'randread'}", "--direct=1",
        "--ioengine=io_uring", f"--iodepth={DEPTH}", "--mem_align=2m", "--allow_file_create=0",
        "--thread=0", "--randseed=1", "--output-format=json",
    ]  # fmt: skip
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    job = json.loads(answer.stdout[answer.stdout.index("{") :])["jobs"][0]
    side = job["write" if write else "read"]
    return work.file_bytes / side["bw_bytes"]


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


def switching_faster(side: Callable[[], float]) -> float:
    """The same with a shorter turn at the interpreter."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        return beside_busy(side)
    finally:
        sys.setswitchinterval(before)


def measure(
    folder: Path, file_bytes: int, rounds: int, busy_rounds: int
) -> Iterator[tuple[str, int, str, dict[str, list[float]]]]:
    """(what else runs, block bytes, read or write, seconds per GB of every way)."""
    path = folder / "file_io.bin"
    io = FileIO()
    arena = Arena(max(THREADS * max(BLOCK_BYTES), HUGE_PAGE))
    np.frombuffer(arena.view, dtype=np.uint64)[:] = np.arange(arena.size // 8, dtype=np.uint64)
    fd = io.open(path, create=True, direct=True)
    executor = TransferExecutor(THREADS, THREADS, "file-io")
    try:
        io.allocate(fd, file_bytes)
        for offset in range(0, file_bytes, arena.size):
            # New extents are slower to write than old ones: write each once before timing.
            io.write(fd, [arena.view[: min(arena.size, file_bytes - offset)]], offset)
        io.sync(fd)
        for block_bytes in BLOCK_BYTES:
            blocks = file_bytes // block_bytes
            whole = Workload(path, blocks, block_bytes, arena)
            part = Workload(path, min(blocks, BUSY_BLOCKS), block_bytes, arena)
            for op in ("read", "write"):
                idle = _python_ways(whole, io, fd, op == "write", executor)
                if shutil.which("fio"):
                    idle["fio"] = partial(through_fio, whole, op == "write")
                yield "nothing", block_bytes, op, _per_gb(whole, in_turn(idle, rounds))
                ways = _python_ways(part, io, fd, op == "write", executor)
                busy = {name: partial(beside_busy, side) for name, side in ways.items()}
                busy["threads, 0.1 ms turns"] = partial(switching_faster, ways["threads"])
                yield "a busy thread", block_bytes, op, _per_gb(part, in_turn(busy, busy_rounds))
    finally:
        executor.close(10)
        io.close(fd)
        path.unlink(missing_ok=True)


def _python_ways(
    work: Workload, io: FileIO, fd: int, write: bool, executor: TransferExecutor
) -> dict[str, Callable[[], float]]:
    ways: dict[str, Callable[[], float]] = {
        "threads": partial(through_threads, work, io, fd, write, executor),
        "one": partial(through_one_thread, work, io, fd, write),
    }
    if liburing is not None:
        ways["io_uring"] = partial(through_ring, work, fd, write)
    return ways


def _per_gb(work: Workload, seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [s / work.file_bytes * 1e9 for s in series] for name, series in seconds.items()}


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
        "io_uring": "measured" if liburing else "not installed",
        "fio": "measured" if shutil.which("fio") else "not installed",
        "series": [],
    }
    rows = []
    with tempfile.TemporaryDirectory(prefix="kvstrata-file-io-", dir=options.dir) as folder:
        for beside, block_bytes, op, series in measure(
            Path(folder), file_bytes, options.rounds, options.busy_rounds
        ):
            ratios = {
                f"threads to {name}": pair_ratio(other, series["threads"])
                for name, other in series.items()
                if name != "threads"
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
                ratio = ratios.get(f"threads to {name}")
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
        f"GB/s with O_DIRECT on {options.file_mib} MiB; ratio: speed of threads to this way, same rounds",
        ["beside: way", "blocks", "median", "quarters", "ratio"],
        rows,
    )
    write_json(options.json, result)


if __name__ == "__main__":
    main()
