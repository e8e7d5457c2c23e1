"""Results of runs as Parquet: one row per run, one file per finished group, never half a file.

A row is a `RunResult` (params as a JSON string) with two columns more: trace_digest, which tells the
content of the trace, and capacity_asked, the capacity as it was written. Together with policy and params
they tell whether a run is there already. Draws no conclusion from the figures.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvstrata.errors import ConfigError
from kvstrata.sim.metrics import RunResult

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX = ".parquet"
ORACLE = "belady"
TEXTS = ("trace", "policy", "params")
COUNTS = (
    "capacity_blocks", "capacity_bytes", "accesses", "requests", "unique_blocks", "admits", "evictions",
    "hit_bytes", "populated_bytes", "recompute_tokens_saved",
)  # fmt: skip
NAMES = tuple(field.name for field in dataclasses.fields(RunResult))


class RunKey(NamedTuple):
    """What one run is the result of. params: JSON, every parameter of the policy."""

    trace: str
    trace_digest: str
    policy: str
    params: str
    capacity_asked: str


class StoredRun(NamedTuple):
    result: RunResult
    trace_digest: str = ""
    capacity_asked: str = ""

    @property
    def key(self) -> RunKey:
        run = self.result
        asked = self.capacity_asked or f"{run.capacity_bytes} at {run.capacity_fraction!r}"
        return RunKey(run.trace, self.trace_digest, run.policy, params_text(run.params), asked)


def params_text(params: dict[str, float]) -> str:
    """JSON with sorted names; whole numbers without a fraction, however they were given."""
    return json.dumps({name: _number(params[name]) for name in sorted(params)})


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def write_results(path: Path | str, results: Iterable[RunResult]) -> None:
    """Write one Parquet file, replacing it whole. Raises OSError, ConfigError for a missing package."""
    write_runs(path, [StoredRun(result) for result in results])


def write_runs(path: Path | str, runs: Sequence[StoredRun]) -> None:
    """As `write_results`, with what is needed to resume."""
    pa, pq = _pyarrow()
    path = Path(path)
    columns: dict[str, list[Any]] = {name: [getattr(run.result, name) for run in runs] for name in NAMES}
    columns["params"] = [params_text(run.result.params) for run in runs]
    columns["trace_digest"] = [run.trace_digest for run in runs]
    columns["capacity_asked"] = [run.capacity_asked for run in runs]
    table = pa.table(columns, schema=_schema(pa))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(unfinished, "wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_results(path: Path | str) -> list[RunResult]:
    """All runs of a file, or of the files in a folder, the later of two that answer the same question.

    gap_to_belady is there wherever the oracle's run is. Raises ConfigError, naming the file, for what is
    not there, holds no runs or cannot be read.
    """
    return with_gaps([run.result for run in read_runs(path)])


def read_runs(path: Path | str) -> list[StoredRun]:
    """As `read_results`, with what is needed to resume and without the gaps."""
    path = Path(path)
    if path.is_dir():
        files = [file for file in path.glob(f"*{SUFFIX}") if not file.name.startswith(".")]
        files.sort(key=lambda file: (file.stat().st_mtime_ns, file.name))
    else:
        files = [path]
    if not files:
        raise ConfigError(f"{path}: no results here (*{SUFFIX}); `kvstrata sim sweep -o {path}` makes some")
    runs: dict[RunKey, StoredRun] = {}
    for file in files:
        for run in _read_file(file):
            runs.pop(run.key, None)
            runs[run.key] = run
    return list(runs.values())


def _read_file(path: Path) -> list[StoredRun]:
    pa, pq = _pyarrow()
    try:
        rows = pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a Parquet file that can be read: {error}") from error
    runs = []
    for row in rows:
        try:
            values = {name: row[name] for name in NAMES}
            values["params"] = {name: float(value) for name, value in json.loads(row["params"]).items()}
            runs.append(StoredRun(RunResult(**values), row["trace_digest"], row["capacity_asked"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{path}: not results of kvstrata sim (no good column {error}); keep other files elsewhere"
            ) from error
    return runs


def with_gaps(results: Iterable[RunResult]) -> list[RunResult]:
    """gap_to_belady filled in: the oracle's block hit ratio at the same trace and capacity minus a run's.

    None where the oracle was not run there.
    """
    results = list(results)
    best: dict[tuple[object, ...], float] = {}
    for run in results:
        if run.policy == ORACLE:
            best[_place(run)] = max(run.block_hit_ratio, best.get(_place(run), 0.0))
    filled = []
    for run in results:
        bound = best.get(_place(run))
        gap = None if bound is None else bound - run.block_hit_ratio
        filled.append(dataclasses.replace(run, gap_to_belady=gap))
    return filled


def _place(run: RunResult) -> tuple[object, ...]:
    return run.trace, run.requests, run.accesses, run.unique_blocks, run.capacity_blocks, run.capacity_bytes


def _schema(pa: Any) -> pa.Schema:
    kinds = {name: pa.string() for name in TEXTS} | {name: pa.int64() for name in COUNTS}
    columns = [(name, kinds.get(name, pa.float64())) for name in NAMES]
    return pa.schema([*columns, ("trace_digest", pa.string()), ("capacity_asked", pa.string())])


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa  # noqa: PLC0415 (an extra)
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        raise ConfigError("results need pyarrow; pip install 'kvstrata[sim]'") from None
    return pa, pq
