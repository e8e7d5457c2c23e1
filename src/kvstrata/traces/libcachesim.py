"""Reads and writes libCacheSim's oracleGeneral records, and reads its CSV traces; no other of its formats.

oracleGeneral (traceReader/customizedReader/oracle/oracleGeneralBin.h of github.com/1a1a11a/libCacheSim): 24
bytes per access, little-endian, no header:

    u32 time (seconds)   u64 object   u32 size (bytes)   i64 next_access_vtime

next_access_vtime is the number, counted from 1, of the object's next access in the file (traceConv:
"reference count starts with 1"), -1 when there is none; 2^63 - 1 means none as well.

CSV: one access per row, columns chosen as with libCacheSim's trace parameters, for instance
"time-col=1,obj-id-col=2,obj-size-col=3,delimiter=,". Columns count from 1.

Every record becomes one request of one block, without chains. Accesses of size 0 are left out, as
libCacheSim's own tools do.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.text import FIRST_BYTES, BadRecords, lines, open_bytes
from kvstrata.traces.trace import Trace, TraceSource

ORACLE_GENERAL = "oracleGeneral"
CSV = "libcachesim-csv"

RECORD = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])
"""One access of oracleGeneral, 24 bytes, packed."""

NEVER = -1

_CHUNK_BYTES = RECORD.itemsize << 18
_PROBE_RECORDS = 1000
_MOST_ACCESSES = 1 << 48  # a larger "next access" is text or another format
_ROWS = 1 << 16
_DELIMITERS = "\t,|;"
_LAST_DELIMITERS = ": "  # where none of the others is
_TIMES = ("time", "timestamp", "ts", "clock_time", "real_time")
_OBJECTS = ("obj_id", "object_id", "object", "obj", "id", "key", "block", "block_id", "lbn")
_SIZES = ("size", "obj_size", "object_size", "bytes", "length", "block_size")


def recognise(path: Path, first: bytes) -> bool:
    """Whether one of the two formats is likely. first: up to 64 KiB of the (unpacked) content."""
    return recognise_oracle_general(path, first) or recognise_csv(path, first)


def read(path: Path | str, *, skip_bad: bool = False, csv_columns: str | None = None) -> Trace:
    """`read_oracle_general` for such content unless csv_columns are given, else `read_csv`."""
    path = Path(path)
    if csv_columns is None:
        with open_bytes(path) as file:
            first = file.read(FIRST_BYTES)
        if recognise_oracle_general(path, first):
            return read_oracle_general(path, skip_bad=skip_bad)
    return read_csv(path, skip_bad=skip_bad, csv_columns=csv_columns)


def recognise_oracle_general(path: Path, first: bytes) -> bool:
    """Whether the name says so, or the first records have plausible next accesses and ascending times.

    A name is believed for binary content only: libCacheSim calls its text form the same.
    """
    if "oraclegeneral" in path.name.lower() and b"\0" in first:
        return True
    count = min(len(first) // RECORD.itemsize, _PROBE_RECORDS)
    if not count:
        return False
    records = np.frombuffer(first, RECORD, count)
    after, time = records["next"], records["time"]
    later = (after > np.arange(count)) & (after < _MOST_ACCESSES)
    none = (after == NEVER) | (after == np.iinfo(np.int64).max)
    return bool((later | none).all() and (time[1:] >= time[:-1]).all())


def read_oracle_general(path: Path | str, *, skip_bad: bool = False) -> Trace:
    """The accesses of an oracleGeneral file (plain, gzip or zstd) in order of time; "next" is not used.

    Raises TraceFormatError naming file and record when the last record is cut off, unless skip_bad.
    """
    path = Path(path)
    bad = BadRecords(skip_bad)
    builder = TraceBuilder(path.name, ORACLE_GENERAL)
    done = 0
    with open_bytes(path) as file:
        while data := file.read(_CHUNK_BYTES):
            count, rest = divmod(len(data), RECORD.itemsize)
            if rest:  # only a file's end can be short
                bad.bad(path, done + count + 1, f"{rest} bytes of {RECORD.itemsize}", unit="record")
            records = np.frombuffer(data, RECORD, count)
            done += count
            records = records[records["size"] > 0]
            builder.add_single_blocks(
                records["time"].astype(np.float64), records["object"], records["size"].astype(np.int64)
            )
    return builder.build(skipped=bad.count)


def write_oracle_general(source: TraceSource, path: Path | str) -> None:
    """Writes every access of the source as one record: dense ids as objects, the request's time in seconds.

    Chains, sessions and features are lost. The file is plain (pack it with zstd if libCacheSim is to read
    it packed) and appears under its name only when it is whole. Memory: 8 bytes per unique block and one
    batch. Raises TraceFormatError when a size or a time does not fit 32 bits.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        _write_records(source, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_records(source: TraceSource, part: Path) -> None:
    accesses = source.head.accesses
    if not accesses:
        part.write_bytes(b"")
        return
    records = np.memmap(part, RECORD, "w+", shape=(accesses,))
    last = np.full(source.head.unique, NEVER, np.int64)
    begin = 0
    for batch in source.batches():
        count = len(batch.ids)
        if not count:
            continue
        times = np.floor(np.repeat(batch.time_s, np.diff(batch.starts)))
        if times.max() > np.iinfo(np.uint32).max or batch.sizes.max() > np.iinfo(np.uint32).max:
            raise TraceFormatError(
                f"{source.head.name}: a time or block size does not fit oracleGeneral's 32 bits"
            )
        window = records[begin : begin + count]
        window["time"], window["object"], window["size"] = times, batch.ids, batch.sizes
        order = np.argsort(batch.ids, kind="stable")
        ids = batch.ids[order]
        same = ids[1:] == ids[:-1]
        following = np.full(count, NEVER, np.int64)
        following[order[:-1][same]] = begin + order[1:][same] + 1
        window["next"] = following
        opens, closes = order[np.append(True, ~same)], order[np.append(~same, True)]
        seen = last[batch.ids[opens]]
        known = seen != NEVER
        records["next"][seen[known]] = begin + opens[known] + 1
        last[batch.ids[closes]] = begin + closes
        begin += count
    records.flush()


@dataclass(frozen=True, slots=True)
class CsvColumns:
    """Which columns (from 1, 0 for none) of a CSV trace hold what.

    header and delimiter None: found out from the first line. Without a time column the row number stands
    for seconds, without a size column every block has 1 byte, as in libCacheSim.
    """

    time: int = 0
    object: int = 0
    size: int = 0
    delimiter: str | None = None
    header: bool | None = None

    @classmethod
    def parse(cls, text: str) -> CsvColumns:
        """From libCacheSim's form, "time-col=1,obj-id-col=2,obj-size-col=3,delimiter=,,has-header=true".

        Underscores do for hyphens, a backslash and t for a tab; obj-id-is-num makes no difference. Raises
        ConfigError naming the parameter for anything else.
        """
        fields: dict[str, int] = {}
        delimiter: str | None = None
        header: bool | None = None
        rest = text.strip()
        while rest:
            key, equals, rest = rest.partition("=")
            key = key.strip().lower().replace("_", "-")
            if not equals:
                raise ConfigError(f"CSV columns: {key!r} has no value in {text!r}")
            if key == "delimiter":
                value = "\\t" if rest.startswith("\\t") else rest[:1] or ","
                rest = rest[len(value) :].lstrip(", ")
                delimiter = "\t" if value == "\\t" else value
                continue
            value, _, rest = rest.partition(",")
            value, rest = value.strip(), rest.lstrip(", ")
            name = {
                "time-col": "time",
                "obj-id-col": "object",
                "obj-size-col": "size",
                "size-col": "size",
            }.get(key)
            if name is not None:
                if not value.isdecimal() or int(value) < 1:
                    raise ConfigError(
                        f"CSV columns: {key}={value!r} is no column number; columns count from 1"
                    )
                fields[name] = int(value)
            elif key in ("header", "has-header"):
                header = value.lower() in ("true", "1", "yes", "y")
            elif key != "obj-id-is-num":
                raise ConfigError(
                    f"CSV columns: {key!r} is none of time-col, obj-id-col, obj-size-col, delimiter, "
                    "has-header"
                )
        if "object" not in fields:
            raise ConfigError(f"CSV columns: {text!r} names no obj-id-col")
        return cls(delimiter=delimiter, header=header, **fields)

    @classmethod
    def from_first_line(cls, line: str) -> CsvColumns | None:
        """By the names in a header, else the first three columns; None if neither fits."""
        delimiter = _delimiter(line)
        cells = [
            cell.strip().strip('"').lower().replace("-", "_").replace(" ", "_")
            for cell in line.split(delimiter)
        ]

        def place(names: tuple[str, ...]) -> int:
            return next((cells.index(name) + 1 for name in names if name in cells), 0)

        if place(_OBJECTS):
            return cls(place(_TIMES), place(_OBJECTS), place(_SIZES), delimiter, header=True)
        if len(cells) >= 3 and _is_number(cells[0]) and cells[1] and cells[2].isdecimal():
            return cls(1, 2, 3, delimiter, header=False)
        return None


def recognise_csv(path: Path, first: bytes) -> bool:
    """Whether the first line is a header naming all three columns, or starts with time, object, size."""
    line, newline, _ = first.partition(b"\n")
    if (not newline and len(first) >= FIRST_BYTES) or b"\0" in line or line[:1] in (b"{", b"["):
        return False
    columns = CsvColumns.from_first_line(_text(line))
    return columns is not None and (columns.header is False or (columns.time > 0 and columns.size > 0))


def read_csv(path: Path | str, *, skip_bad: bool = False, csv_columns: str | None = None) -> Trace:
    """The accesses of a CSV trace (plain, gzip or zstd) in order of time.

    csv_columns: see `CsvColumns.parse`; without it the first line decides. Times are seconds, object ids
    any text (compared as text), sizes bytes. Raises TraceFormatError naming file and line for a row that is
    no record, unless skip_bad, and ConfigError for columns that cannot be.
    """
    path = Path(path)
    bad = BadRecords(skip_bad)
    builder = TraceBuilder(path.name, CSV)
    columns = CsvColumns.parse(csv_columns) if csv_columns is not None else None
    split: Callable[[str], list[str]] | None = None
    times: list[float] = []
    objects: list[Hashable] = []
    sizes: list[int] = []
    row = 0
    for number, line in lines(path):
        if not line.strip():
            continue
        text = _text(line)
        if split is None:
            columns = columns or CsvColumns.from_first_line(text)
            if columns is None:
                raise TraceFormatError(
                    f"{path}, line {number}: no columns for time, object and size in {text[:80]!r}; "
                    "name them like time-col=1,obj-id-col=2,obj-size-col=3"
                )
            split = _splitter(columns.delimiter or _delimiter(text))
            if columns.header or (columns.header is None and _is_header(columns, split(text))):
                continue
        assert columns is not None
        try:
            cells = split(text)
            time_s = float(cells[columns.time - 1]) if columns.time else float(row)
            size = int(cells[columns.size - 1]) if columns.size else 1
            name = cells[columns.object - 1].strip()
            if not math.isfinite(time_s) or not 0 <= size < 1 << 63 or not name:
                raise ValueError("needs a finite time, an object and a size of 0 or more")
        except IndexError:
            bad.bad(path, number, f"{len(cells)} columns")
            continue
        except (ValueError, csv.Error) as why:
            bad.bad(path, number, str(why))
            continue
        row += 1
        if size:
            times.append(time_s)
            objects.append(name)
            sizes.append(size)
        if len(times) == _ROWS:
            _flush(builder, times, objects, sizes)
    _flush(builder, times, objects, sizes)
    return builder.build(skipped=bad.count)


def _flush(builder: TraceBuilder, times: list[float], objects: list[Hashable], sizes: list[int]) -> None:
    time_s: NDArray[np.float64] = np.array(times, np.float64)
    builder.add_single_blocks(time_s, objects, np.array(sizes, np.int64))
    times.clear()
    objects.clear()
    sizes.clear()


def _splitter(delimiter: str) -> Callable[[str], list[str]]:
    def split(text: str) -> list[str]:
        return next(csv.reader([text], delimiter=delimiter)) if '"' in text else text.split(delimiter)

    return split


def _delimiter(line: str) -> str:
    """The most frequent of those that libCacheSim knows (and ; and space); the first of equals."""
    found = max(_DELIMITERS, key=line.count)
    return found if found in line else max(_LAST_DELIMITERS, key=line.count)


def _is_header(columns: CsvColumns, cells: list[str]) -> bool:
    numeric = [place for place in (columns.time, columns.size) if place] or [columns.object]
    return not all(place <= len(cells) and _is_number(cells[place - 1]) for place in numeric)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _text(line: bytes) -> str:
    return line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
