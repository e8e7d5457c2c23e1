"""The tiers against fio, and against what else people use, on one folder in one session.

Every side moves the same bytes: blocks of one size between rows of an arena on huge pages and a folder on
the medium (`--dir`), and once more a folder in RAM, where no device hides what software costs. The sides
run in turn (A B C, A B C, ...), each in a process of its own; a ratio is the median over the rounds.

write      a new chain of blocks, in the chain's order, until it is durable
read       the whole chain, cold: past the page cache, or dropped from it
scattered  a random third of it, no two blocks neighbours
mixed      70 % of the bytes are loaded while 30 % are saved until durable; GB/s of both together
busy       write and read while a Python thread spins in the caller's process
latency    one block at a time, alone and while another thread saves without a pause
metadata   system calls per block, counted by strace
memory     the memory tier against numpy's copy of the same bytes; handing out views
overhead   what a load costs the calling thread in Python, where no device is in the way

Ours keeps its checksums on. fio does io_uring with O_DIRECT at `--depth`; its buffers lie on huge pages
too, or on its own of 4 KiB. `peers/__init__.py` says how the peers are installed; what is missing is left
out with a line. Everything that was written is removed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from rich.console import Console

import tiers_picture
from harness import machine, pair_ratio, parser, show, spread, write_json
from kvstrata.config import KIB, MIB, format_size, parse_size
from kvstrata.transfer.buffers import Arena
from peers import fio as fio_peer
from peers.base import PeerError, Shape
from peers.fio import Fio, Speed
from peers.registry import (
    COPY,
    FIO,
    FIO_BUSY,
    FIO_SMALL,
    MEMORY_VARIANTS,
    NO_PRIORITY,
    OURS,
    UNHURRIED,
    VARIANTS,
    Variant,
)
from peers.worker import Worker
from tiers_claims import claims

SIZES = (128 * KIB, MIB, 4 * MIB, 16 * MIB, 32 * MIB)
SLOW_SIZES = (MIB, 4 * MIB)
RAM_SIZES = (128 * KIB, 4 * MIB)
BUSY_SIZES, BUSY_PEERS_SIZES = (MIB, 4 * MIB, 16 * MIB), (MIB, 4 * MIB)
LATENCY_SIZES = (MIB, 4 * MIB)
MEMORY_SIZES = (128 * KIB, 4 * MIB)
OVERHEAD_BYTES = 128 * KIB
MOST_BLOCKS = 2048
"""Of a run: files of small blocks would take minutes."""
METADATA_BYTES, METADATA_BLOCKS = MIB, 32
MOVES = ("write", "read", "scattered", "mixed")
CELLS = (*MOVES, "busy", "latency", "metadata", "memory", "overhead", "ram")
SPIN = "while True: pass"
METADATA_CALLS = re.compile(
    r"(open|close|creat|rename|unlink|link|mkdir|rmdir|stat|access|truncate|fallocate|chmod|chown|getdents|"
    r"readlink|utime|fsync|fdatasync|sync_file_range|syncfs|flock)"
)
"""System calls that ask the file system for something else than bytes."""

Side = Callable[[int], Speed]
Series = dict[str, list[Speed]]


class Form(NamedTuple):
    """What a peer opens: blocks of one size in one folder."""

    where: Path
    block_bytes: int
    blocks: int


class Session:
    """The processes of the peers, their folders, what was left out and why, and the time that is left."""

    def __init__(self, options: argparse.Namespace, undo: ExitStack) -> None:
        self.options = options
        self.undo = undo
        self.console = Console(stderr=True, highlight=False)
        self.left_out: list[dict[str, str]] = []
        self._folders: dict[str, Path] = {}
        self.started = time.monotonic()
        self.fio = fio_peer.installed()
        if self.fio is None:
            self.leave_out(FIO, "all", "not installed; apt-get install fio")
        self.scratch = Arena(16 * MIB)

    def say(self, text: str) -> None:
        self.console.print(
            f"[{time.monotonic() - self.started:5.0f} s] {text}", markup=False, soft_wrap=True
        )

    def leave_out(self, side: str, cell: str, reason: str) -> None:
        self.left_out.append({"side": side, "cell": cell, "reason": self._no_paths(reason)})
        self.say(f"left out: {side} ({cell}): {reason}")

    def _no_paths(self, text: str) -> str:
        """Results say nothing about the machine's folders."""
        for folder in self._folders.values():
            text = text.replace(str(folder), "DIR")
        return re.sub(r"(?<![\w.])/(?:[\w.@+-]+/)+", "", text)

    def over(self) -> bool:
        return time.monotonic() - self.started > self.options.minutes * 60

    def folder(self, where: Path) -> Path:
        """A folder of this session, removed at its end."""
        name = str(where)
        if name not in self._folders:
            made = tempfile.TemporaryDirectory(
                prefix="kvstrata-tiers-", dir=where, ignore_cleanup_errors=True
            )
            self._folders[name] = Path(self.undo.enter_context(made))
        return self._folders[name]

    def start(
        self, variants: Mapping[str, Variant], shapes: Mapping[str, Form], undo: ExitStack
    ) -> dict[str, Worker]:
        """A process per variant that can be imported, which may open any of the shapes."""
        started: dict[str, Worker] = {}
        for name, variant in variants.items():
            made = {}
            for key, form in shapes.items():
                own = Path(tempfile.mkdtemp(dir=self.folder(form.where)))
                made[key] = Shape(own, form.block_bytes, form.blocks, self.options.depth, variant.options)
            most = max(form.block_bytes * form.blocks for form in shapes.values())
            log = self.folder(self.options.dir) / "log"
            worker = started[name] = Worker(variant, made, most, log)
            undo.callback(worker.stop)
        running = {}
        for name, worker in started.items():
            try:
                worker.ask("ready")
            except PeerError as error:
                self.leave_out(name, "all", str(error))
            else:
                running[name] = worker
        self.say(f"ready: {', '.join(running)}")
        return running

    @contextmanager
    def opened(self, workers: Mapping[str, Worker], shape: str) -> Iterator[dict[str, Worker]]:
        """Those that made their files for a shape; they are closed, and the files removed, at the end."""
        good = {}
        try:
            for name, worker in workers.items():
                try:
                    worker.ask("open", shape=shape)
                except PeerError as error:
                    self.leave_out(name, shape, str(error))
                else:
                    good[name] = worker
            yield good
        finally:
            for worker in workers.values():
                with suppress(PeerError):
                    worker.ask("close")

    def in_turn(self, cell: str, sides: Mapping[str, Side], rounds: int) -> Series:
        """Every side once per round, after one round of warm-up; a side that fails is left out."""
        series: Series = {name: [] for name in sides}
        for number in range(-1, rounds):
            for name, side in sides.items():
                if name not in series:
                    continue
                try:
                    speed = side(number)
                except PeerError as error:
                    self.leave_out(name, cell, str(error))
                    del series[name]
                    continue
                if number >= 0:
                    series[name].append(speed)
        return series


def moving(worker: Worker, operation: str, *, spin: bool = False) -> Side:
    """A side that asks a worker; in the warm-up round every byte is compared."""

    def side(number: int) -> Speed:
        arguments: dict[str, Any] = {"whole": number < 0, "spin": spin}
        if operation == "scattered":
            arguments["seed"] = number + 1
        return Speed(**worker.ask(operation, **arguments))

    return side


def through_fio(fio: Fio, cell: str, seconds: float, *, huge: bool = True) -> Side:
    return lambda number: fio.speed(cell, seconds=seconds, huge=huge)


def beside_spinning(side: Side) -> Side:
    def run(number: int) -> Speed:
        spinner = subprocess.Popen([sys.executable, "-c", SPIN])
        try:
            return side(number)
        finally:
            spinner.kill()
            spinner.wait()

    return run


def figures(where: str, cell: str, beside: str, size: int, series: Series) -> dict[str, Any]:
    """One cell of the results. Ratios are speeds: above 1 is faster than the other."""
    seconds = {name: [speed.seconds_per_gb for speed in runs] for name, runs in series.items() if runs}
    base = seconds.get(FIO)
    ours = seconds.get(OURS)
    return {
        "where": where,
        "cell": cell,
        "beside": beside,
        "block_bytes": size,
        "seconds_per_gb": {name: spread(values) for name, values in seconds.items()},
        "cpu_seconds_per_gb": {
            name: spread([speed.cpu_seconds_per_gb for speed in runs])
            for name, runs in series.items()
            if runs
        },
        "speed_to_fio": {name: pair_ratio(base, values) for name, values in seconds.items()}
        if base
        else {},
        "ours_to": {name: pair_ratio(values, ours) for name, values in seconds.items() if name != OURS}
        if ours
        else {},
        "rounds": {name: [round(value, 5) for value in values] for name, values in seconds.items()},
    }


def line_of(row: Mapping[str, Any]) -> str:
    """A cell for the one who waits."""
    beside = "" if row["beside"] == "nothing" else f" beside {row['beside']}"
    ratios = row["speed_to_fio"] or {name: 1 / s["median"] for name, s in row["seconds_per_gb"].items()}
    unit = "of fio" if row["speed_to_fio"] else "GB/s"
    sides = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if name != FIO)
    return f"{row['where']} {format_size(row['block_bytes'])} {row['cell']}{beside} ({unit}): {sides}"


def forms_of(options: argparse.Namespace) -> dict[str, Form]:
    """Every shape that the cells of the folders need, by the name that `opened` takes."""
    forms: dict[str, Form] = {}

    def add(key: str, where: Path, size: int, total: int, least: int) -> None:
        forms[key] = Form(where, size, max(least, min(total // size, MOST_BLOCKS)))

    total = options.mib * MIB
    for size in options.sizes:
        add(f"disk {format_size(size)}", options.dir, size, total, 8)
    if "ram" in options.cells:
        for size in ram_sizes(options):
            add(f"ram {format_size(size)}", options.ram, size, total // 2, 8)
    if "overhead" in options.cells:
        add("overhead", options.ram, OVERHEAD_BYTES, total // 2, 8)
    if "metadata" in options.cells:
        forms["metadata"] = Form(options.dir, METADATA_BYTES, METADATA_BLOCKS)
    return forms


def ram_sizes(options: argparse.Namespace) -> list[int]:
    return [size for size in options.sizes if size in RAM_SIZES] or options.sizes[:1]


def measure_folder(
    session: Session,
    where: str,
    workers: Mapping[str, Worker],
    forms: Mapping[str, Form],
    sizes: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """The moving cells of one folder: every size, every cell, every peer."""
    options = session.options
    busy = "busy" in options.cells and where == "disk"
    for size in sizes:
        key = f"{where} {format_size(size)}"
        taking_part = {
            name: worker
            for name, worker in workers.items()
            if name in VARIANTS and (not VARIANTS[name].slow or (where == "disk" and size in SLOW_SIZES))
        }
        with (
            session.opened(taking_part, key) as there,
            working_file(session, forms[key]) as fio,
        ):
            for cell in (cell for cell in MOVES if cell in options.cells):
                if session.over():
                    session.leave_out("all", f"{key} {cell}", "time is over")
                    continue
                sides: dict[str, Side] = {name: moving(worker, cell) for name, worker in there.items()}
                if fio is not None:
                    sides[FIO] = through_fio(fio, cell, options.fio_seconds)
                    if cell in ("write", "read") and where == "disk":
                        sides[FIO_SMALL] = through_fio(fio, cell, options.fio_seconds, huge=False)
                series = session.in_turn(f"{key} {cell}", sides, options.rounds)
                yield figures(where, cell, "nothing", size, series)
            for cell in ("write", "read") if busy and size in BUSY_SIZES else ():
                if session.over():
                    session.leave_out("all", f"{key} {cell} beside a spinning thread", "time is over")
                    continue
                sides = {
                    name: moving(worker, cell, spin=True)
                    for name, worker in there.items()
                    if name == OURS or (size in BUSY_PEERS_SIZES and not VARIANTS[name].slow)
                }
                if fio is not None:
                    sides[FIO] = through_fio(fio, cell, options.fio_seconds)
                    sides[FIO_BUSY] = beside_spinning(sides[FIO])
                label = f"{key} {cell} beside a spinning thread"
                series = session.in_turn(label, sides, options.busy_rounds)
                yield figures(where, cell, "a spinning thread", size, series)


@contextmanager
def working_file(session: Session, form: Form) -> Iterator[Fio | None]:
    if session.fio is None:
        yield None
        return
    folder = session.folder(form.where)
    fio = Fio(folder, form.block_bytes, form.blocks, session.options.depth, session.scratch)
    try:
        yield fio
    finally:
        fio.close()


def quantiles(series: Sequence[float]) -> dict[str, float]:
    ordered = sorted(series)
    return {
        "p50": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "loads": len(ordered),
    }


def measure_latency(
    session: Session, workers: Mapping[str, Worker], forms: Mapping[str, Form]
) -> Iterator[dict[str, Any]]:
    """p50 and p99 of a single load, alone and beside stores, in turn; loads of all rounds together."""
    options = session.options
    quick = {name: each for name, each in workers.items() if name == NO_PRIORITY or not VARIANTS[name].slow}
    for size in [size for size in options.sizes if size in LATENCY_SIZES] or options.sizes[:1]:
        label = f"{format_size(size)} latency"
        if session.over():
            session.leave_out("all", label, "time is over")
            continue
        key = f"disk {format_size(size)}"
        with session.opened(quick, key) as there, working_file(session, forms[key]) as fio:
            found = latencies(session, label, there, fio)
        if found:
            yield {"block_bytes": size, "seconds": found}


def latencies(
    session: Session, label: str, there: dict[str, Worker], fio: Fio | None
) -> dict[str, dict[str, Any]]:
    """Of every side at one block size."""
    options = session.options
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in there}
    native: list[dict[str, Any]] = []
    for _ in range(options.latency_rounds):
        for name, worker in there.items():
            if name not in runs:
                continue
            asked = {"count": options.loads, "seconds": options.latency_seconds}
            try:
                alone = worker.ask("latency", stores=False, **asked)
                beside = worker.ask("latency", stores=True, **asked)
            except PeerError as error:
                session.leave_out(name, label, str(error))
                del runs[name]
                continue
            rate = beside["stores_gb_per_second"]
            runs[name].append({"alone": alone["seconds"], "beside": beside["seconds"], "rate": rate})
        if fio is not None:
            single, _ = fio.latency(seconds=options.fio_seconds, stores=False)
            both, rate = fio.latency(seconds=options.fio_seconds, stores=True)
            native.append({"alone": single, "beside stores": both, "stores_gb_per_second": rate})
    found = {
        name: {
            "alone": quantiles([second for run in each for second in run["alone"]]),
            "beside stores": quantiles([second for run in each for second in run["beside"]]),
            "stores_gb_per_second": statistics.median(run["rate"] for run in each),
        }
        for name, each in runs.items()
    }
    if native:
        found[FIO] = _medians(native)
    for figure in found.values():
        figure["p99_ratio"] = figure["beside stores"]["p99"] / figure["alone"]["p99"]
    return found


def _medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """fio counts its percentiles itself: the median over its runs."""
    return {
        key: statistics.median(run[key] for run in runs)
        if not isinstance(runs[0][key], dict)
        else {name: statistics.median(run[key][name] for run in runs) for name in runs[0][key]}
        for key in runs[0]
    }


def measure_metadata(session: Session, workers: Mapping[str, Worker]) -> list[dict[str, Any]]:
    """System calls per block, of a write and of a read, counted while strace is attached."""
    if not shutil.which("strace"):
        session.leave_out("all", "metadata", "strace is not installed; apt-get install strace")
        return []
    rows = []
    taking_part = {name: worker for name, worker in workers.items() if name in VARIANTS}
    with session.opened(taking_part, "metadata") as there:
        for name, worker in there.items():
            for operation in ("write", "read"):
                try:
                    calls = counted(worker, operation, session.folder(session.options.dir) / "strace")
                except (PeerError, OSError, subprocess.SubprocessError) as error:
                    session.leave_out(name, f"metadata {operation}", str(error))
                    continue
                metadata = sum(count for call, count in calls.items() if METADATA_CALLS.search(call))
                rows.append(
                    {
                        "side": name,
                        "cell": operation,
                        "blocks": METADATA_BLOCKS,
                        "metadata_calls_per_block": metadata / METADATA_BLOCKS,
                        "calls_per_block": sum(calls.values()) / METADATA_BLOCKS,
                        "calls": dict(sorted(calls.items(), key=lambda item: -item[1])),
                    }
                )
    session.say(f"metadata: {len(rows)} counts")
    return rows


def counted(worker: Worker, operation: str, out: Path) -> dict[str, int]:
    """System calls that a worker and its processes make in one operation."""
    pids = [part for pid in worker.ask("pids") for part in ("-p", str(pid))]
    tracer = subprocess.Popen(
        ["strace", "-f", "-c", "-U", "name,calls", "-o", str(out), *pids],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert tracer.stderr is not None
        attached = tracer.stderr.readline()
        if "attached" not in attached:
            raise PeerError(f"strace says: {attached.strip() or 'nothing'}")
        time.sleep(0.3)  # for the rest of the threads
        worker.ask(operation, bare=True)
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=30)
    calls: dict[str, int] = collections.Counter()
    for line in out.read_text().splitlines():
        words = line.split()
        if len(words) == 2 and words[1].isdigit() and words[0] != "total":
            calls[words[0]] += int(words[1])
    out.unlink()
    return calls


def memory_forms(options: argparse.Namespace) -> dict[str, Form]:
    sizes = [size for size in MEMORY_SIZES if size in options.sizes] or [4 * MIB]
    total = options.mib * MIB // 2
    return {
        f"memory {format_size(size)}": Form(options.ram, size, min(total // size, MOST_BLOCKS))
        for size in sizes
    } | {"overhead": Form(options.ram, OVERHEAD_BYTES, min(total // OVERHEAD_BYTES, MOST_BLOCKS))}


def measure_memory(
    session: Session, workers: Mapping[str, Worker], forms: Mapping[str, Form]
) -> Iterator[dict[str, Any]]:
    """The memory tier, numpy's copy and Mooncake."""
    options = session.options
    for key, form in forms.items():
        if not key.startswith("memory"):
            continue
        size = form.block_bytes
        with session.opened(workers, key) as there:
            for cell in ("write", "read"):
                sides: dict[str, Side] = {name: moving(worker, cell) for name, worker in there.items()}
                row = figures("memory", cell, "nothing", size, session.in_turn(key, sides, options.rounds))
                copy = row["rounds"].get(COPY)
                if copy:
                    row["speed_to_copy"] = {
                        name: pair_ratio(copy, values) for name, values in row["rounds"].items()
                    }
                yield row
            if OURS in there:
                views = [there[OURS].ask("views")["seconds"] for _ in range(options.rounds + 1)][1:]
                yield {"where": "memory", "cell": "views", "block_bytes": size, "seconds": spread(views)}


def measure_overhead(session: Session, tier: str, workers: Mapping[str, Worker]) -> list[dict[str, Any]]:
    """CPU per block of a load at 128 KiB, and the bytes that Python allocates for it."""
    with session.opened({OURS: workers[OURS]} if OURS in workers else {}, "overhead") as there:
        for worker in there.values():
            try:
                runs = [worker.ask("overhead") for _ in range(session.options.rounds + 1)][1:]
                allocated = worker.ask("allocated")
            except PeerError as error:
                session.leave_out(OURS, f"overhead of the {tier} tier", str(error))
                continue
            seconds = {name: spread([run[name] for run in runs]) for name in runs[0]}
            return [
                {
                    "tier": tier,
                    "block_bytes": OVERHEAD_BYTES,
                    "seconds_per_block": seconds,
                    "allocated_bytes_per_block": allocated,
                }
            ]
    return []


def tables(result: Mapping[str, Any]) -> None:
    """What people read first: ratios to fio, then CPU, latencies, calls, claims."""
    for where in ("disk", "ram"):
        for cell, beside in [(cell, "nothing") for cell in MOVES] + [
            ("write", "a spinning thread"),
            ("read", "a spinning thread"),
        ]:
            rows = [
                row
                for row in result["series"]
                if (row["where"], row["cell"], row.get("beside")) == (where, cell, beside)
            ]
            if not rows:
                continue
            title = f"{cell} in the {where} folder, beside {beside}: GB/s, and the ratio to fio"
            names = list(dict.fromkeys(name for row in rows for name in row["seconds_per_gb"]))
            show(
                title,
                ["side", *(format_size(row["block_bytes"]) for row in rows), "CPU s/GB"],
                [[name, *(_speed(row, name) for row in rows), _cpu(rows, name)] for name in names],
            )
    memory = [row for row in result["series"] if row["where"] == "memory" and row["cell"] != "views"]
    if memory:
        show(
            "memory: GB/s, and the ratio to numpy's copy",
            ["side", *(f"{format_size(row['block_bytes'])} {row['cell']}" for row in memory)],
            [
                [name, *(_speed(row, name, "speed_to_copy") for row in memory)]
                for name in dict.fromkeys(name for row in memory for name in row["seconds_per_gb"])
            ],
        )
    for row in result["latency"]:
        show(
            f"one load of {format_size(row['block_bytes'])}, ms",
            [
                "side",
                "p50 alone",
                "p99 alone",
                "p50 beside stores",
                "p99 beside stores",
                "p99 ratio",
                "GB/s",
            ],
            [
                [
                    name,
                    *(
                        f"{1e3 * each[how][q]:.2f}"
                        for how in ("alone", "beside stores")
                        for q in ("p50", "p99")
                    ),
                    f"{each['p99_ratio']:.2f}",
                    f"{each['stores_gb_per_second']:.2f}",
                ]
                for name, each in row["seconds"].items()
            ],
        )
    if result["metadata"]:
        show(
            f"system calls per block of {format_size(METADATA_BYTES)}",
            ["side", "cell", "metadata", "all"],
            [
                [
                    row["side"],
                    row["cell"],
                    f"{row['metadata_calls_per_block']:.2f}",
                    f"{row['calls_per_block']:.1f}",
                ]
                for row in result["metadata"]
            ],
        )
    if result["overhead"]:
        show(
            f"a load of blocks of {format_size(OVERHEAD_BYTES)}, us and Python's bytes per block",
            ["tier", "calling thread", "process, user", "process, system", "at the peak", "kept"],
            [
                [
                    row["tier"],
                    *(
                        f"{1e6 * row['seconds_per_block'][part]['median']:.1f}"
                        for part in ("thread", "user", "system")
                    ),
                    *(f"{row['allocated_bytes_per_block'][part]:.0f}" for part in ("peak", "kept")),
                ]
                for row in result["overhead"]
            ],
        )
    show(
        "claims",
        ["#", "what", "asked", "measured", "holds"],
        [
            [row["claim"], row["what"], row["asked"], row["measured"], "yes" if row["holds"] else "no"]
            for row in result["claims"]
        ],
    )


def _speed(row: Mapping[str, Any], name: str, ratios: str = "speed_to_fio") -> str:
    if name not in row["seconds_per_gb"]:
        return ""
    speed = f"{1 / row['seconds_per_gb'][name]['median']:.2f}"
    ratio = row.get(ratios, {}).get(name)
    return f"{speed} ({ratio:.2f})" if ratio else speed


def _cpu(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """At 4 MiB, or at the size nearest to it."""
    with_it = [row for row in rows if name in row["cpu_seconds_per_gb"]]
    row = min(with_it, key=lambda row: abs(row["block_bytes"] - 4 * MIB))
    return f"{row['cpu_seconds_per_gb'][name]['median']:.4f}"


def arguments() -> argparse.Namespace:
    found = parser(__doc__.splitlines()[0], "tiers")
    found.add_argument("--dir", type=Path, required=True, help="a folder on the disk to measure")
    found.add_argument("--ram", type=Path, default=Path("/dev/shm"), help="a folder in RAM")
    found.add_argument("--quick", action="store_true", help="about a minute: fewer sizes, cells and rounds")
    found.add_argument("--cells", default="", help=f"of {', '.join(CELLS)}; default: all")
    found.add_argument(
        "--peers", default="", help="parts of names, as in 'nixl,raw_block', or none; default: all"
    )
    found.add_argument("--sizes", default="", help="block sizes, as in '128KiB,4MiB'")
    found.add_argument("--rounds", type=int, default=0, help="timed rounds of a cell")
    found.add_argument("--mib", type=int, default=0, help="bytes of one run, in MiB")
    found.add_argument("--depth", type=int, default=8, help="operations in flight, for fio and for peers")
    found.add_argument(
        "--io-engine", default="auto", choices=("auto", "io_uring", "threads"), help="of ours"
    )
    found.add_argument("--minutes", type=float, default=25.0, help="start no cell after that long")
    found.add_argument("--picture", type=Path, help="write pictures too: NAME.svg or .png, and NAME-ram")
    options = found.parse_args()
    quick = options.quick
    words = [word.strip().lower() for word in options.peers.split(",") if word.strip()]
    options.peer_words = words
    options.peers = [
        name
        for name, variant in VARIANTS.items()
        if name == OURS
        or any(word in name.lower() for word in words)
        or not (words or (quick and variant.slow))
    ]
    if words and len(options.peers) == 1 and not {OURS, "none"} & set(words):
        found.error(f"--peers: no name holds {', '.join(words)}; known: {', '.join(VARIANTS)}")
    quick_cells = ("write", "read", "mixed", "metadata", "memory", "overhead")
    cells = [cell.strip() for cell in options.cells.split(",") if cell.strip()]
    if unknown := set(cells) - set(CELLS):
        found.error(f"--cells: {', '.join(sorted(unknown))} is not one of {', '.join(CELLS)}")
    options.cells = cells or list(quick_cells if quick else CELLS)
    try:
        asked = [parse_size(size) for size in options.sizes.split(",") if size.strip()]
    except ValueError as error:
        found.error(f"--sizes: {error}")
    options.sizes = asked or list((128 * KIB, 4 * MIB) if quick else SIZES)
    if any(size % 4096 or not 4096 <= size <= 64 * MIB for size in options.sizes):
        found.error("--sizes: multiples of 4 KiB, at most 64 MiB")
    options.mib = options.mib or (128 if quick else 512)
    if not 64 <= options.mib <= 4096:
        found.error("--mib must be from 64 to 4096")
    options.rounds = options.rounds or (2 if quick else 5)
    options.busy_rounds = min(options.rounds, 3)
    options.latency_rounds = 1 if quick else 3
    options.loads = 60 if quick else 200
    options.latency_seconds = 1.0 if quick else 1.5
    options.fio_seconds = 0.25 if quick else 0.5
    return options


def interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def measure(session: Session, result: dict[str, Any]) -> None:
    """Every cell that was asked for, the folders first."""
    options = session.options
    forms = forms_of(options)
    variants = {name: VARIANTS[name] for name in options.peers}
    if "latency" in options.cells:
        variants[NO_PRIORITY] = UNHURRIED
    for name in {OURS, NO_PRIORITY} & variants.keys():
        chosen = variants[name].options | {"io_engine": options.io_engine}
        variants[name] = dataclasses.replace(variants[name], options=chosen)
    with ExitStack() as undo:
        workers = session.start(variants, forms, undo)
        if set(options.cells) & {*MOVES, "busy"}:
            for row in measure_folder(session, "disk", workers, forms, options.sizes):
                session.say(line_of(row))
                result["series"].append(row)
        if "metadata" in options.cells:
            result["metadata"] = measure_metadata(session, workers)
        if "latency" in options.cells:
            for row in measure_latency(session, workers, forms):
                session.say(f"disk {format_size(row['block_bytes'])} latency: {len(row['seconds'])} sides")
                result["latency"].append(row)
        if "ram" in options.cells:
            for row in measure_folder(session, "ram", workers, forms, ram_sizes(options)):
                session.say(line_of(row))
                result["series"].append(row)
        if "overhead" in options.cells:
            result["overhead"] += measure_overhead(session, "nvme", workers)
    if not set(options.cells) & {"memory", "overhead"}:
        return
    forms = memory_forms(options)
    words = options.peer_words
    variants = {
        name: variant
        for name, variant in MEMORY_VARIANTS.items()
        if name in (OURS, COPY) or not words or any(word in name.lower() for word in words)
    }
    with ExitStack() as undo:
        workers = session.start(variants, forms, undo)
        if "memory" in options.cells:
            for row in measure_memory(session, workers, forms):
                session.say(f"memory {format_size(row['block_bytes'])} {row['cell']}")
                result["series"].append(row)
        if "overhead" in options.cells:
            result["overhead"] += measure_overhead(session, "memory", workers)


def main() -> None:
    options = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    options.dir.mkdir(parents=True, exist_ok=True)
    variants = [*(VARIANTS[name] for name in options.peers), *MEMORY_VARIANTS.values()]
    packages = {package for variant in variants for package in variant.packages()}
    result: dict[str, Any] = {
        "benchmark": "tiers",
        "machine": machine(sorted(packages)),
        "run_bytes": options.mib * MIB,
        "depth": options.depth,
        "io_engine": options.io_engine,
        "rounds": options.rounds,
        "series": [],
        "latency": [],
        "metadata": [],
        "overhead": [],
    }
    with ExitStack() as undo:
        session = Session(options, undo)
        result["machine"]["packages"]["fio"] = session.fio
        needs_ram = set(options.cells) & {"ram", "memory", "overhead"}
        if needs_ram and not options.ram.is_dir():
            session.leave_out("all", ", ".join(sorted(needs_ram)), "no such folder; use --ram")
            options.cells = [cell for cell in options.cells if cell not in needs_ram]
        measure(session, result)
        result["left_out"] = session.left_out
        result["seconds"] = round(time.monotonic() - session.started)
    result["claims"] = claims(result)
    tables(result)
    write_json(options.json, result)
    if options.picture:
        tiers_picture.draw(result, options.picture)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; what was written is removed")
