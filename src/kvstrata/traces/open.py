"""One door to every trace: tells the format from the content and hands the path to its reader.

Knows which formats there are and how to tell them apart, and nothing of what is inside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvstrata.errors import ConfigError, TraceFormatError
from kvstrata.traces import agentic, libcachesim, mlperf, mooncake, strace, stream
from kvstrata.traces.text import FIRST_BYTES, open_bytes
from kvstrata.traces.trace import DEFAULT_BYTES_PER_TOKEN, Trace, TraceSource

PARQUET = "parquet"

Progress = Callable[[int, int], None]
"""Called with (done, total) of whatever the reader counts."""


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """What `open_trace` was asked for; a reader takes of it what its format has."""

    skip_bad: bool = False
    block_bytes: int | None = None
    bytes_per_token: int = DEFAULT_BYTES_PER_TOKEN
    seed: int = 1
    mean_arrival_s: float = stream.MEAN_ARRIVAL_S
    block_tokens: int | None = None
    full_blocks: bool = False
    csv_columns: str | None = None
    path_prefix: str | None = None
    progress: Progress | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """about: for people. recognise: whether the file at a path, whose (unpacked) content starts with these
    bytes, is of the format. open: the reader."""

    about: str
    recognise: Callable[[Path, bytes], bool]
    open: Callable[[Path, OpenOptions], TraceSource]


def _open_parquet(path: Path, options: OpenOptions) -> TraceSource:
    from kvstrata.traces.parquet import ParquetTrace  # noqa: PLC0415 (an extra)

    return ParquetTrace(path, block_bytes=options.block_bytes)


def _open_mooncake(path: Path, options: OpenOptions) -> TraceSource:
    return mooncake.read(
        path,
        block_tokens=options.block_tokens or mooncake.BLOCK_TOKENS,
        block_bytes=options.block_bytes,
        bytes_per_token=options.bytes_per_token,
        full_blocks=options.full_blocks,
        skip_bad=options.skip_bad,
    )


def _open_agentic(path: Path, options: OpenOptions) -> TraceSource:
    return agentic.read(
        path,
        block_tokens=options.block_tokens or agentic.BLOCK_TOKENS,
        block_bytes=options.block_bytes,
        bytes_per_token=options.bytes_per_token,
        skip_bad=options.skip_bad,
    )


def _open_stream(folder: Path, options: OpenOptions) -> TraceSource:
    return stream.read(
        folder,
        seed=options.seed,
        mean_arrival_s=options.mean_arrival_s,
        block_tokens=options.block_tokens or stream.BLOCK_TOKENS,
        block_bytes=options.block_bytes,
        bytes_per_token=options.bytes_per_token,
        skip_bad=options.skip_bad,
        progress=options.progress,
    )


def _open_mlperf(path: Path, options: OpenOptions) -> TraceSource:
    return _resize(mlperf.read(path, skip_bad=options.skip_bad), options.block_bytes)


def _open_strace(path: Path, options: OpenOptions) -> TraceSource:
    extent_bytes = options.block_bytes or strace.DEFAULT_EXTENT_BYTES
    return strace.read(
        path, skip_bad=options.skip_bad, prefix=options.path_prefix, extent_bytes=extent_bytes
    )


def _open_oracle_general(path: Path, options: OpenOptions) -> TraceSource:
    trace = libcachesim.read_oracle_general(path, skip_bad=options.skip_bad)
    return _resize(trace, options.block_bytes)


def _open_csv(path: Path, options: OpenOptions) -> TraceSource:
    trace = libcachesim.read_csv(path, skip_bad=options.skip_bad, csv_columns=options.csv_columns)
    return _resize(trace, options.block_bytes)


def _resize(trace: Trace, block_bytes: int | None) -> Trace:
    """The trace with every block of that many bytes; None leaves the sizes that were recorded."""
    if block_bytes is None:
        return trace
    head = replace(trace.head, block_bytes=block_bytes)
    return replace(trace, head=head, size=np.full_like(trace.size, block_bytes))


def _is_parquet(path: Path, first: bytes) -> bool:
    return first.startswith(b"PAR1")


def _is_folder(path: Path, first: bytes) -> bool:
    return path.is_dir()


FORMATS: dict[str, Format] = {
    stream.FORMAT: Format("a folder of agentic conversations", _is_folder, _open_stream),
    PARQUET: Format("kvstrata's own columns", _is_parquet, _open_parquet),
    agentic.FORMAT: Format("an agentic conversation (JSON)", agentic.recognise, _open_agentic),
    mooncake.FORMAT: Format("a Mooncake trace (JSON lines)", mooncake.recognise, _open_mooncake),
    mlperf.FORMAT: Format("an MLPerf Storage KV I/O log (CSV)", mlperf.recognise, _open_mlperf),
    strace.FORMAT: Format("an strace log (-f -ttt -T -y)", strace.recognise, _open_strace),
    libcachesim.CSV: Format("a libCacheSim CSV trace", libcachesim.recognise_csv, _open_csv),
    libcachesim.ORACLE_GENERAL: Format(
        "a libCacheSim oracleGeneral trace", libcachesim.recognise_oracle_general, _open_oracle_general
    ),
}
"""Every format by the name that `--format` takes. Recognised in this order, the vaguest last."""


def recognise(path: Path | str) -> str:
    """The name in FORMATS of what lies at path. Raises TraceFormatError if it is none of them, OSError if
    it cannot be read."""
    path = Path(path)
    first = b""
    if not path.is_dir():
        with open_bytes(path) as file:
            first = file.read(FIRST_BYTES)
        if not first:
            raise TraceFormatError(f"{path}: empty")
    for name, known in FORMATS.items():
        if known.recognise(path, first):
            return name
    raise TraceFormatError(
        f"{path}: no trace of a known format; give it with --format: {', '.join(sorted(FORMATS))}"
    )


def open_trace(
    path: Path | str,
    *,
    format: str | None = None,
    skip_bad: bool = False,
    block_bytes: int | None = None,
    bytes_per_token: int = DEFAULT_BYTES_PER_TOKEN,
    seed: int = 1,
    mean_arrival_s: float = stream.MEAN_ARRIVAL_S,
    block_tokens: int | None = None,
    full_blocks: bool = False,
    csv_columns: str | None = None,
    path_prefix: str | None = None,
    progress: Progress | None = None,
) -> TraceSource:
    """The trace at path, whatever its format; a folder of agentic conversations becomes a stream.

    format: a name in FORMATS; None looks at the content. skip_bad: pass over records that cannot be read
    and count them in `head.skipped`. block_bytes: size of every block, in place of what the trace says or
    block_tokens x bytes_per_token makes. seed, mean_arrival_s: of a stream. block_tokens: tokens of a
    block, where the format leaves a choice: of agentic traces a multiple of 64 (64 for one conversation,
    256 for a stream), of Mooncake traces what they were recorded with (512). full_blocks: of Mooncake
    traces, leave out the partial block at the end of a request. csv_columns: which columns
    of a CSV trace mean what, see `libcachesim.CsvColumns`. path_prefix: of an strace log, take only files
    under this folder; block_bytes is the size of its extents. progress: of what takes long to read.

    Raises TraceFormatError, naming file and record, for what cannot be read; ConfigError for parameters
    that cannot work and for a missing package; OSError as `open` does.
    """
    options = OpenOptions(
        skip_bad,
        block_bytes,
        bytes_per_token,
        seed,
        mean_arrival_s,
        block_tokens,
        full_blocks,
        csv_columns,
        path_prefix,
        progress,
    )
    return open_with(path, format, options)


def open_with(path: Path | str, format: str | None, options: OpenOptions) -> TraceSource:
    """`open_trace` with its parameters in one object."""
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise ConfigError(f"no trace format {format!r}; there are {', '.join(sorted(FORMATS))}")
    for name, value in (
        ("block_bytes", options.block_bytes),
        ("bytes_per_token", options.bytes_per_token),
        ("block_tokens", options.block_tokens),
    ):
        if value is not None and not 0 < value < 2**40:
            raise ConfigError(f"{name} is {value}; take a number from 1 to {2**40 - 1}")
    name = format or recognise(path)
    if path.is_dir() != (name == stream.FORMAT):
        raise ConfigError(
            f"{path}: {'a folder' if path.is_dir() else 'no folder'}, and the format {name} is "
            f"{FORMATS[name].about}"
        )
    return FORMATS[name].open(path, options)
