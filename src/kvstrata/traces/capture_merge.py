"""Makes one trace of capture files: requests of all processes in order of time, blocks numbered from 0.

Files are read one by one in order of their first request, and a request is written as soon as no later file
can hold an earlier one, so that memory holds what overlaps in time, and 28 bytes for each unique block.
Needs pyarrow. How a live store records is another module's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.errors import TraceFormatError
from kvstrata.traces import parquet  # first: it says which package is missing
from kvstrata.traces.capture import FORMAT, capture_files
from kvstrata.traces.fields import count, items, label, parse_json, parse_record
from kvstrata.traces.trace import BATCH_ACCESSES, NONE

# isort: split
import pyarrow as pa
import pyarrow.parquet as pq

MERGED_FORMAT = "merged-capture"
NUMBERS = ("input_tokens", "output_tokens")

PER_REQUEST = ("time_s", "length", "tenant", *NUMBERS)
PER_ACCESS = ("block", "size")

Integers = NDArray[np.int64]
Columns = dict[str, NDArray[Any]]
"""Some requests: PER_REQUEST has an entry for each (length: its accesses), PER_ACCESS one per access."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that is not in the trace, and why."""

    path: Path
    why: str


@dataclass(frozen=True, slots=True)
class Merged:
    """What became of a merge. first_unix_s, last_unix_s: times of the first and last request."""

    files: int
    skipped: list[Skipped]
    tenants: list[str]
    requests: int
    accesses: int
    unique: int
    first_unix_s: float
    last_unix_s: float


@dataclass(frozen=True, slots=True)
class _File:
    """What its footer says. first_s: Unix time of its first request."""

    path: Path
    first_s: float
    accesses: int
    block_tokens: int
    block_bytes: int
    tenants: tuple[str, ...]


def merge_captures(
    paths: Iterable[Path], output: Path, progress: Callable[[int, int], None] | None = None
) -> Merged:
    """Write the requests of capture files as one trace of ours.

    paths: files, or folders whose capture files are all taken; what cannot be read is left out and named in
    the answer. progress: called with (accesses read, accesses). Raises TraceFormatError where nothing can
    be read, OSError for the output and for a path that does not exist.
    """
    skipped: list[Skipped] = []
    files = sorted(_footers(_expanded(paths), skipped), key=lambda file: file.first_s)
    if not files:
        raise TraceFormatError(f"no capture file can be read{_first(skipped)}")
    tenants: dict[str, int] = {}
    blocks = _Blocks()
    read = taken = 0
    first_s = last_s = 0.0
    total = sum(file.accesses for file in files)
    with parquet.ParquetWriter(
        output,
        name="capture",
        source_format=MERGED_FORMAT,
        block_tokens=_common(file.block_tokens for file in files),
        block_bytes=_common(file.block_bytes for file in files),
        dense=True,
    ) as writer:
        pool: list[Columns] = []
        pooled = 0
        for number, file in enumerate(files):
            try:
                pool.append(_load(file, tenants))
                taken += 1
            except (TraceFormatError, OSError) as why:
                skipped.append(Skipped(file.path, _reason(why, file.path)))
            else:
                pooled += len(pool[-1]["block"])
            read += file.accesses
            if progress is not None:
                progress(read, total)
            last = number == len(files) - 1
            if not pool or (pooled < BATCH_ACCESSES and not last):
                continue
            requests = _together(pool)
            until = np.inf if last else files[number + 1].first_s
            requests, rest = _split(requests, int(np.searchsorted(requests["time_s"], until)))
            pool = [rest]
            pooled = len(rest["block"])
            if len(requests["time_s"]):
                first_s = first_s if writer.requests else float(requests["time_s"][0])
                last_s = float(requests["time_s"][-1])
                _append(writer, requests, blocks, tuple(tenants))
        if not writer.requests:
            raise TraceFormatError(f"no capture file can be read{_first(skipped)}")
    return Merged(
        taken, skipped, list(tenants), writer.requests, writer.accesses, blocks.unique, first_s, last_s
    )


def _together(parts: Sequence[Columns]) -> Columns:
    """All of them in order of time, those of one time in the order of the parts."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(joined["time_s"], kind="stable")
    before, after = joined["length"], joined["length"][order]
    moved = (np.cumsum(before) - before)[order] - (np.cumsum(after) - after)
    at = np.arange(len(joined["block"])) + np.repeat(moved, after)
    return {name: column[at if name in PER_ACCESS else order] for name, column in joined.items()}


def _split(columns: Columns, requests: int) -> tuple[Columns, Columns]:
    """The first so many requests, and the rest."""
    accesses = int(columns["length"][:requests].sum())
    cuts = {name: accesses if name in PER_ACCESS else requests for name in columns}
    return (
        {name: column[: cuts[name]] for name, column in columns.items()},
        {name: column[cuts[name] :] for name, column in columns.items()},
    )


def _append(
    writer: parquet.ParquetWriter, requests: Columns, blocks: _Blocks, tenants: tuple[str, ...]
) -> None:
    starts = np.concatenate([[0], np.cumsum(requests["length"])])
    ids, parents, depths, sizes = blocks.number(requests["block"], requests["size"], starts)
    writer.append(
        starts=starts,
        blocks=ids,
        parents=parents,
        depths=depths,
        sizes=sizes,
        time_s=requests["time_s"],
        session=np.full(len(starts) - 1, NONE, np.int32),
        tenant=requests["tenant"],
        features={name: requests[name] for name in NUMBERS},
        labels={"tenant": tenants},
    )


class _Blocks:
    """Numbers of blocks in order of first appearance; parent, depth and size are those of that time."""

    def __init__(self) -> None:
        self._names = np.zeros(0, np.int64)
        self._numbers = np.zeros(0, np.int32)
        self._parents = np.zeros(0, np.int32)
        self._depths = np.zeros(0, np.int32)
        self._sizes = np.zeros(0, np.int64)

    @property
    def unique(self) -> int:
        return len(self._names)

    def number(
        self, blocks: Integers, sizes: Integers, starts: Integers
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], Integers]:
        """Number, parent, depth and size of every access. Raises TraceFormatError for too many blocks."""
        names, first, inverse = np.unique(blocks, return_index=True, return_inverse=True)
        at = np.searchsorted(self._names, names)
        known = np.zeros(len(names), np.bool_)
        inside = at < self.unique
        known[inside] = self._names[at[inside]] == names[inside]
        new = ~known
        if self.unique + int(new.sum()) > 2**31 - 1:
            raise TraceFormatError(f"more than {2**31 - 1} unique blocks; merge fewer files")
        numbers = np.empty(len(names), np.int32)
        numbers[known] = self._numbers[at[known]]
        came = np.argsort(first[new])
        fresh = np.empty(len(came), np.int32)
        fresh[came] = np.arange(self.unique, self.unique + len(came), dtype=np.int32)
        numbers[new] = fresh
        ids = numbers[inverse]
        # Within its request a block that is new stands behind its parent.
        place = first[new]
        depths = place - starts[np.searchsorted(starts, place, side="right") - 1]
        parents = np.where(depths > 0, ids[place - 1], NONE)
        for name, values in (
            ("_numbers", fresh), ("_parents", parents), ("_depths", depths), ("_sizes", sizes[place]),
            ("_names", names[new]),
        ):  # fmt: skip
            column = getattr(self, name)
            setattr(self, name, np.insert(column, at[new], values.astype(column.dtype)))
        row = np.searchsorted(self._names, names)[inverse]
        return ids, self._parents[row], self._depths[row], self._sizes[row]


def _expanded(paths: Iterable[Path]) -> list[Path]:
    """Files, each once; of a folder its capture files, also those that are not complete."""
    found: dict[Path, Path] = {}
    for path in paths:
        path.stat()
        for file in capture_files(path) if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _footers(paths: Sequence[Path], skipped: list[Skipped]) -> list[_File]:
    files = []
    for path in paths:
        try:
            files.append(_footer(path))
        except FileNotFoundError:
            skipped.append(Skipped(path, "its process has removed it meanwhile"))
        except (OSError, ValueError) as why:  # pyarrow's errors are one or the other
            skipped.append(Skipped(path, _reason(why, path)))
    return files


def _footer(path: Path) -> _File:
    """Raises ValueError or OSError for what is no complete capture file."""
    if path.name.endswith(".part"):
        raise ValueError("not complete: its process was killed while it wrote it, or is writing")
    with open(path, "rb") as file:
        metadata = pq.ParquetFile(file).metadata
        text = (metadata.metadata or {}).get(parquet.METADATA_KEY)
        if text is None:
            raise ValueError("a Parquet file, but no trace of ours")
        about = parse_record(parse_json(text))
        if label(about, "source_format") != FORMAT:
            raise ValueError("a trace of ours, but not one that a store captured")
        names = [metadata.schema.column(n).path for n in range(metadata.num_columns)]
        statistics = metadata.row_group(0).column(names.index("time_s")).statistics
        tenants = tuple(str(name) for name in items(parse_record(about.get("labels")), "tenant"))
        if statistics is None or not statistics.has_min_max or not tenants:
            raise ValueError("its footer lacks times or tenants")
        return _File(
            path,
            float(statistics.min),
            count(about, "accesses") or 0,
            count(about, "block_tokens") or 0,
            count(about, "block_bytes") or 0,
            tenants,
        )


def _load(file: _File, tenants: dict[str, int]) -> Columns:
    """All of one file, checked as every trace of ours is. Raises TraceFormatError and OSError."""
    batches = list(parquet.ParquetTrace(file.path).batches())
    try:
        table = pq.read_table(file.path, columns=["time_s", "request", "block"])
    except (pa.ArrowException, OSError) as why:
        raise TraceFormatError(f"{file.path}: {why}") from why
    request = table["request"].to_numpy()
    time_s = table["time_s"].to_numpy()[np.flatnonzero(np.diff(request, prepend=request[0] - 1))]
    block_column = table["block"]
    blocks = block_column.filter(block_column.is_valid()).to_numpy().astype(np.int64)
    codes = np.concatenate([batch.tenant for batch in batches])
    if time_s[0] != file.first_s or codes.min() < 0 or codes.max() >= len(file.tenants):
        raise TraceFormatError(f"{file.path}: its footer and its rows do not agree")
    if not all(set(NUMBERS) <= set(batch.features) for batch in batches):
        raise TraceFormatError(f"{file.path}: it lacks the columns {' and '.join(NUMBERS)}")
    of_trace = np.array([tenants.setdefault(name, len(tenants)) for name in file.tenants], np.int64)
    return {
        "time_s": time_s,
        "length": np.concatenate([np.diff(batch.starts) for batch in batches]),
        "tenant": of_trace[codes],
        **{name: np.concatenate([batch.features[name] for batch in batches]) for name in NUMBERS},
        "block": blocks,
        "size": np.concatenate([batch.sizes for batch in batches]),
    }


def _common(values: Iterable[int]) -> int:
    """The value that all have, 0 if they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else 0


def _reason(why: Exception, path: Path) -> str:
    text = (str(why).splitlines() or [type(why).__name__])[0].rstrip(".")
    return text.removeprefix(f"{path}: ")


def _first(skipped: list[Skipped]) -> str:
    if not skipped:
        return "; a store with `capture` in its configuration writes them"
    more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
    return f": {skipped[0].path}: {skipped[0].why}{more}"
