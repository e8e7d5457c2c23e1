"""Reads the KV I/O log that MLPerf Storage's kv_cache_benchmark writes with `--io-trace-log`.

The format, from kv_cache/tracer.py and docs/io_trace_log_usage.md of github.com/mlcommons/storage (folder
kv_cache_benchmark): CSV, often packed with zstd, one row per operation, under the header

    Timestamp,Operation,Object_Size_Bytes,Tier,Key,Phase

Timestamp is Unix time in seconds, taken before the writer's lock, so rows are not quite in order. Operation
is Read or Write. Key names one cache entry as a whole (all layers, one rank's shard): a turn of a
conversation (`<conversation>_turn_<n>`), a request, a system prompt, a chunk of a document. Phase is
Prefill, Decode, Both, or Evict.

The block id is the whole Key, whatever it is made of: a conversation's name may hold the wall time at which
it began, and then that time is part of the name and not a time of this trace. Each row is one request of
one block. Entries are no chains: a turn's entry has no parent here, the conversation becomes the session.

Rows of the phase Evict are the moves of the benchmark's own three tiers, the log of one cache and not of
the requests to it; they are left out unless asked for.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

from kvstrata.errors import TraceFormatError
from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.text import BadRecords, lines
from kvstrata.traces.trace import Trace

FORMAT = "mlperf"

_NEEDED = ("timestamp", "operation", "object_size_bytes", "key")
_OPERATIONS = {"read": "read", "write": "write"}
_TURN = "_turn_"


def recognise(path: Path, first: bytes) -> bool:
    """Whether the file starts with the log's header. first: up to 64 KiB of its (unpacked) content."""
    return _columns(first.split(b"\n", 1)[0]) is not None


def read(path: Path | str, *, skip_bad: bool = False, demotions: bool = False) -> Trace:
    """The log as a trace of one-block requests with operation "read" or "write" and sizes from the rows.

    demotions: take the rows of the phase Evict too. Columns are found by name, so older logs (no Phase)
    and longer ones are read; logs that were put after one another may repeat the header. Raises
    TraceFormatError naming file and line for a file without the header and, unless skip_bad, for a row
    that is no record.
    """
    path = Path(path)
    bad = BadRecords(skip_bad)
    builder = TraceBuilder(path.name, FORMAT)
    header = b""
    columns: dict[str, int] = {}
    width = time_at = operation_at = size_at = key_at = 0
    phase_at: int | None = None
    for number, line in lines(path):
        if not header:
            found = _columns(line)
            if found is None:
                raise TraceFormatError(f"{path}, line {number}: no MLPerf KV I/O header, {line[:80]!r}")
            header, columns = line, found
            width = len(columns)
            time_at, operation_at, size_at, key_at = (columns[name] for name in _NEEDED)
            phase_at = columns.get("phase")
            continue
        if not line or line == header:
            continue
        try:
            text = line.decode()
            row = next(csv.reader([text])) if '"' in text else text.split(",")
            if len(row) != width:
                raise ValueError(f"{len(row)} columns of {width}")
            time_s, size, key = float(row[time_at]), int(row[size_at]), row[key_at]
            operation = _OPERATIONS.get(row[operation_at].lower())
            if operation is None:
                raise ValueError(f"operation {row[operation_at]!r} is neither Read nor Write")
            if not math.isfinite(time_s) or not 0 < size < 1 << 63 or not key:
                raise ValueError("needs a finite time, a size above 0 and a key")
        except (ValueError, csv.Error) as why:
            bad.bad(path, number, str(why))
            continue
        if phase_at is not None and not demotions and row[phase_at].lower() == "evict":
            continue
        conversation, turn, count = key.rpartition(_TURN)
        session = conversation if turn and count.isdecimal() else None
        builder.add(time_s, (key,), sizes=(size,), session=session, chain=False, operation=operation)
    return builder.build(skipped=bad.count)


def _columns(line: bytes) -> dict[str, int] | None:
    """Place of each column by lower-case name; None when this is no header of the log."""
    names = line.removeprefix(b"\xef\xbb\xbf").strip(b"\r\n").decode("ascii", "replace").lower().split(",")
    places = {name.strip(): place for place, name in enumerate(names)}
    if len(places) == len(names) and all(name in places for name in _NEEDED):
        return places
    return None
