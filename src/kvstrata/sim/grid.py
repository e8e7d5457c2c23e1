"""Many simulations: traces x policies x capacities, in this process or over many.

Begins in this process, and hands what is left to workers (joblib) once it has measured that they would be
done sooner. A trace is read once per worker and only one is kept in memory there. What joblib is told by
`joblib.parallel_config` is respected: backend="dask" or "ray" gives the work to a cluster, whose workers
must see the traces under the same paths. This process alone writes results.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import xxhash

from kvstrata.errors import ConfigError
from kvstrata.policies import POLICIES
from kvstrata.policies.base import check_knobs
from kvstrata.policies.belady import Belady
from kvstrata.sim.capacity import normal, resolve
from kvstrata.sim.metrics import RunResult
from kvstrata.sim.replay import SIMULATED, Workload, simulate
from kvstrata.sim.results import RunKey, StoredRun, params_text, read_runs, with_gaps, write_runs
from kvstrata.sim.specs import TraceSpec, let_go, workload_of
from kvstrata.sim.tables import Study, study_of
from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.open import Progress

LOOK_SECONDS = 0.5
"""How long to work before asking whether workers would be faster."""
START_SECONDS = 3.0
"""What starting workers costs: a Python with Numba each, and its kernels from disk."""
PIECE_SECONDS = 20.0
"""About how much work is given away at once, and so lost when it is interrupted."""
REST_SECONDS = 0.002
"""What a replay costs beside the seconds it reports."""

Params = Mapping[str, float]
Variant = tuple[str, Params]
"""A policy and its parameters that differ from the defaults."""


class Cell(NamedTuple):
    """One simulation. params: pairs that differ from the policy's defaults. capacity: as it is written."""

    trace: TraceSpec
    policy: str
    params: tuple[tuple[str, float], ...]
    capacity: str


@dataclass(frozen=True, slots=True)
class GridRun:
    """results: one per cell, in the order of the cells. ran, reused: cells that were run now, and that were
    in the folder already. skipped: broken records that were passed over, per trace that was read now."""

    cells: tuple[Cell, ...]
    results: tuple[RunResult, ...]
    ran: int
    reused: int
    skipped: Mapping[str, int]

    def of(self, policy: str, params: Params) -> list[tuple[Cell, RunResult]]:
        """The runs of one variant."""
        wanted = policy, tuple(sorted(params.items()))
        pairs = zip(self.cells, self.results, strict=True)
        return [(cell, result) for cell, result in pairs if (cell.policy, cell.params) == wanted]

    def study(self) -> Study:
        """In the order that tables and pictures are made of."""
        return study_in_order(zip(self.cells, self.results, strict=True))


def study_in_order(runs: Iterable[tuple[Cell, RunResult]]) -> Study:
    """`tables.study_of`, told the capacities as they were written."""
    pairs = list(runs)
    defaults = {policy: defaults_of(policy) for policy in SIMULATED}
    return study_of([result for _, result in pairs], [cell.capacity for cell, _ in pairs], defaults)


@dataclass(slots=True)
class _Sink:
    """Where finished cells go. total: cells of the whole grid."""

    out: Path | None
    digests: Mapping[TraceSpec, str]
    progress: Progress | None
    done: dict[Cell, RunResult]
    total: int
    skipped: dict[str, int] = field(default_factory=dict)

    def take(self, finished: Sequence[tuple[Cell, RunResult]], skipped: int) -> None:
        """Store a finished group at once."""
        if not finished:
            return
        self.done.update(finished)
        spec = finished[0][0].trace
        if skipped:
            self.skipped[spec.name] = skipped
        if self.out is not None:
            runs = with_gaps(result for _, result in finished)
            digest = self.digests[spec]
            rows = [
                StoredRun(run, digest, cell.capacity) for run, (cell, _) in zip(runs, finished, strict=True)
            ]
            name = xxhash.xxh3_64_hexdigest(repr([row.key for row in rows]).encode())
            write_runs(self.out / f"runs-{digest[:8]}-{name}.parquet", rows)
        self.tell()

    def tell(self, more: int = 0) -> None:
        if self.progress is not None:
            self.progress(len(self.done) + more, self.total)


def make_cells(
    traces: Iterable[TraceSpec], variants: Iterable[Variant], capacities: Iterable[str]
) -> list[Cell]:
    """All of them with all of them, each cell once, those of one trace together."""
    chosen = [(policy, tuple(sorted(params.items()))) for policy, params in variants]
    words = [normal(capacity) for capacity in capacities]
    return list(
        dict.fromkeys(
            Cell(trace, policy, params, capacity)
            for trace in traces
            for policy, params in chosen
            for capacity in words
        )
    )


def defaults_of(policy: str) -> Params:
    """The parameters of a policy, or of the oracle, with their defaults."""
    return POLICIES[policy].KNOBS if policy in POLICIES else Belady.KNOBS


def all_params(policy: str, params: Iterable[tuple[str, float]]) -> dict[str, float]:
    """With the policy's defaults for what is not given."""
    return {name: float(value) for name, value in {**defaults_of(policy), **dict(params)}.items()}


def run_grid(
    traces: Sequence[TraceSpec],
    variants: Sequence[Variant],
    capacities: Sequence[str],
    *,
    out: Path | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> GridRun:
    """Run every cell that is not in the folder out yet, and store each finished group there.

    jobs: processes; None is one per core, or what `joblib.parallel_config` says; 1 starts none. progress:
    called with (cells done, cells). Raises ConfigError for unknown policies, parameters and capacities
    before anything is run; what a trace that cannot be read raises, when its turn comes. Whatever ends it,
    finished groups are in the folder and the next call goes on from there.
    """
    if jobs is not None and not 1 <= jobs <= 4096:
        raise ConfigError(f"{jobs} jobs; take a number from 1 to 4096")
    cells = make_cells(traces, variants, capacities)
    for variant in dict.fromkeys((cell.policy, cell.params) for cell in cells):
        _check(*variant)
    digests = {spec: spec.digest() for spec in traces} if out is not None else {}
    done = _stored(out, cells, digests) if out is not None else {}
    reused = len(done)
    sink = _Sink(out, digests, progress, done, len(cells))
    sink.tell()
    todo: dict[TraceSpec, list[Cell]] = {}
    for cell in cells:
        if cell not in done:
            todo.setdefault(cell.trace, []).append(cell)
    if todo:
        _run(todo, jobs, sink)
    results = with_gaps(sink.done[cell] for cell in cells)
    return GridRun(tuple(cells), tuple(results), len(cells) - reused, reused, sink.skipped)


def _stored(out: Path, cells: Sequence[Cell], digests: Mapping[TraceSpec, str]) -> dict[Cell, RunResult]:
    """What of the cells is in the folder."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; name a folder for the results")
    if not any(out.glob("*.parquet")):
        return {}
    stored = {run.key: run.result for run in read_runs(out)}
    # Names are for people: the same content under another name need not be run again.
    unnamed = {key._replace(trace=""): result for key, result in stored.items()}
    found = {}
    for cell in cells:
        params = params_text(all_params(cell.policy, cell.params))
        key = RunKey(cell.trace.name, digests[cell.trace], cell.policy, params, cell.capacity)
        result = stored.get(key) or unnamed.get(key._replace(trace=""))
        if result is not None:
            found[cell] = replace(result, trace=cell.trace.name)
    return found


# Running


@dataclass(slots=True)
class _Rates:
    """What was measured in this process. Per byte of a trace's files: seconds to read it, to replay it."""

    file_bytes: Mapping[TraceSpec, int]
    read: float = 0.0
    replay: float = 0.0

    def of(self, work: Mapping[TraceSpec, Sequence[Cell]]) -> tuple[float, float]:
        """Seconds to read what is there to do, and to replay it."""
        sizes = self.file_bytes
        read = sum(sizes[spec] * self.read for spec in work)
        return read, sum(sizes[spec] * self.replay * len(cells) for spec, cells in work.items())


def _run(todo: dict[TraceSpec, list[Cell]], jobs: int | None, sink: _Sink) -> None:
    pool = _pool(jobs)
    rates = _Rates({spec: spec.file_bytes() for spec in todo})
    if pool is None or not pool.chosen:
        todo = _run_here(todo, sink, 1 if pool is None else pool.workers, rates)
    let_go()
    if todo and pool is not None:
        _warm(todo)
        _give_away(todo, pool, rates, sink)


def _run_here(
    todo: dict[TraceSpec, list[Cell]], sink: _Sink, workers: int, rates: _Rates
) -> dict[TraceSpec, list[Cell]]:
    """Work in this process until nothing is left or workers would be faster; returns what is left."""
    left = {spec: list(cells) for spec, cells in todo.items()}
    begun = time.perf_counter()
    read_bytes, replayed_bytes, read_s, replay_s = 0, 0, 0.0, 0.0
    for spec, cells in todo.items():
        finished: list[tuple[Cell, RunResult]] = []
        skipped = 0
        try:
            started = time.perf_counter()
            workload = workload_of(spec, lambda _done, _total: sink.tell())
            skipped = workload.head.skipped
            read_s += time.perf_counter() - started
            size = rates.file_bytes[spec]
            read_bytes += size
            for cell in cells:
                result = _simulate(workload, cell)
                finished.append((cell, result))
                left[spec].remove(cell)
                sink.tell(len(finished))
                replay_s += result.seconds + REST_SECONDS
                replayed_bytes += size
                if workers > 1 and time.perf_counter() - begun > LOOK_SECONDS:
                    rates.read = read_s / max(1, read_bytes)
                    rates.replay = replay_s / max(1, replayed_bytes)
                    if _workers_are_faster(left, spec, workers, rates):
                        return {spec: cells for spec, cells in left.items() if cells}
        finally:
            sink.take(finished, skipped)
        del left[spec]
    return {}


def _workers_are_faster(
    left: Mapping[TraceSpec, Sequence[Cell]], at_hand: TraceSpec, workers: int, rates: _Rates
) -> bool:
    """Would workers, which must read the trace at hand again, be done sooner than this process?"""
    read, replay = rates.of(left)
    read_here = read - rates.of({at_hand: ()})[0]
    # With fewer traces than workers, several workers read the same one.
    read_there = read / min(workers, len(left))
    return START_SECONDS + read_there + replay / workers < read_here + replay


def _simulate(workload: Workload, cell: Cell) -> RunResult:
    return simulate(workload, cell.policy, resolve(cell.capacity, workload.footprint), dict(cell.params))


def _tiny(requests: int = 64) -> Workload:
    """A trace that makes every kernel run."""
    builder = TraceBuilder("tiny", "none", block_tokens=1, block_bytes=1)
    for number in range(requests):
        builder.add(float(number), [number % 7, number % 7 + 100, number + 1000])
    return Workload(builder.build())


def _check(policy: str, params: tuple[tuple[str, float], ...]) -> None:
    """Raises ConfigError for an unknown policy or parameter, and for values that a policy rejects."""
    if policy not in SIMULATED:
        raise ConfigError(f"policy {policy!r} is not known; known: {', '.join(SIMULATED)}")
    check_knobs(policy, defaults_of(policy), dict(params))
    if policy in POLICIES:
        POLICIES[policy](64, 64, **dict(params))


def _warm(todo: Mapping[TraceSpec, Sequence[Cell]]) -> None:
    """Compile each policy once, here, so that no two workers compile the same kernel."""
    tiny = _tiny()
    for policy in dict.fromkeys(cell.policy for cells in todo.values() for cell in cells):
        simulate(tiny, policy, resolve("4b", tiny.footprint))


# Workers


class _Pool(NamedTuple):
    """workers: how many there are. n_jobs: for joblib. chosen: did the caller choose a backend?"""

    workers: int
    n_jobs: int | None
    chosen: bool
    generator: bool


def _pool(jobs: int | None) -> _Pool | None:
    """None: this process alone."""
    if jobs == 1:
        return None
    try:
        import joblib  # noqa: PLC0415 (an extra)
        from joblib.parallel import BACKENDS, DEFAULT_BACKEND, get_active_backend  # noqa: PLC0415
    except ImportError:
        if jobs is None:
            return None
        raise ConfigError("--jobs needs joblib; pip install 'kvstrata[sim]', or take --jobs 1") from None
    backend, configured = get_active_backend()
    chosen = not isinstance(backend, BACKENDS[DEFAULT_BACKEND])
    if jobs is None and not chosen and configured in (None, 1):
        jobs = joblib.cpu_count()
    workers = joblib.effective_n_jobs(jobs)
    if workers == 1 and not chosen:
        return None
    return _Pool(workers, jobs, chosen, bool(backend.supports_return_generator))


def _give_away(todo: Mapping[TraceSpec, Sequence[Cell]], pool: _Pool, rates: _Rates, sink: _Sink) -> None:
    import joblib  # noqa: PLC0415

    parallel = joblib.Parallel(
        n_jobs=pool.n_jobs,
        batch_size=1,
        pre_dispatch="all" if not pool.generator else "2*n_jobs",
        return_as="generator_unordered" if pool.generator else "list",
    )
    here = None if pool.chosen else os.getpid()
    pieces = list(_pieces(todo, pool.workers, rates))
    sink.tell()
    with warnings.catch_warnings():
        # loky replaces workers that have grown; whoever interrupts a sweep knows that the rest is not done.
        warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given")
        warnings.filterwarnings("ignore", message=".*being processed by the workers")
        finished_pieces = parallel(joblib.delayed(_run_piece)(piece, here) for piece in pieces)
        try:
            for finished, skipped in finished_pieces:
                sink.take(finished, skipped)
        finally:
            if pool.generator:
                finished_pieces.close()


def _run_piece(cells: Sequence[Cell], parent: int | None) -> tuple[list[tuple[Cell, RunResult]], int]:
    """In a worker: cells of one trace. parent: the process that a local worker belongs to."""
    if parent not in (None, os.getpid()) and threading.current_thread() is threading.main_thread():
        # Ctrl-C reaches the whole group of processes; the parent ends the workers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    workload = workload_of(cells[0].trace)
    return [(cell, _simulate(workload, cell)) for cell in cells], workload.head.skipped


def _pieces(todo: Mapping[TraceSpec, Sequence[Cell]], workers: int, rates: _Rates) -> Iterable[list[Cell]]:
    """Cells to give away together: of one trace, as many traces as workers at least where cells allow, and
    none much longer than PIECE_SECONDS."""
    for spec, cells in todo.items():
        _, seconds = rates.of({spec: cells})
        parts = max(math.ceil(workers / len(todo)), math.ceil(seconds / PIECE_SECONDS))
        yield from split(cells, parts)


def split(cells: Sequence[Cell], parts: int) -> list[list[Cell]]:
    """At most that many lists of about one length; the oracle's cells, which share its future, in one."""
    oracle = [cell for cell in cells if cell.policy not in POLICIES]
    rest = [cell for cell in cells if cell.policy in POLICIES]
    lists: list[list[Cell]] = [[] for _ in range(max(1, parts))]
    lists[0] += oracle
    for cell in rest:
        min(lists, key=len).append(cell)
    return [part for part in lists if part]
