"""`kvstrata trace`: what a trace is like, any trace in our columns, and streams of many conversations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvstrata.cli.output import (
    JSON_OPTION,
    ProgressBar,
    format_age,
    one_line,
    print_json,
    print_line,
    print_table,
)
from kvstrata.cli.reading import (
    BLOCK_BYTES_OPTION,
    BYTES_PER_TOKEN_OPTION,
    MEAN_ARRIVAL_OPTION,
    SEED_OPTION,
    SKIP_BAD_OPTION,
    TRACE_HELP,
    Reading,
    reads_traces,
)
from kvstrata.config import format_size
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from kvstrata.traces.summary import TraceSummary
    from kvstrata.traces.trace import TraceSource

OUTPUT_OPTION = typer.Option(
    ..., "-o", "--output", metavar="FILE", readable=False, help="The file to write."
)
FORCE_OPTION = typer.Option(False, "--force", help="Replace the file if it exists.")

app = typer.Typer(name="trace", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def trace(context: typer.Context) -> None:
    """Look at traces, convert them, and make multi-tenant streams.

    \b
    Examples:
      kvstrata trace info conversation_trace.jsonl.gz
      kvstrata trace convert conversation_trace.jsonl.gz -o conversation.parquet
      kvstrata trace stream --agentic conversations/ -o stream.parquet
      kvstrata trace capture /var/log/kv-capture -o monday.parquet
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@reads_traces
def info(
    traces: list[Path] = typer.Argument(metavar="TRACE...", readable=False, help=TRACE_HELP),
    reading: Reading = Reading(),
    as_json: bool = JSON_OPTION,
) -> None:
    """Show what traces are like: requests, accesses, reuse, bytes, lengths and gaps.

    \b
    Examples:
      kvstrata trace info conversation_trace.jsonl.gz
      kvstrata trace info monday.parquet tuesday.parquet --json | jq '.traces[].reuse'
      kvstrata trace info conversations/ --seed 2
    """
    from kvstrata.traces.summary import summarize

    summaries = []
    for path in traces:
        source = _open(path, reading)
        with ProgressBar(f"reading {one_line(path)}", "accesses") as progress:
            summaries.append(summarize(source, progress))
    if as_json:
        print_json({"traces": [_to_json(*pair) for pair in zip(traces, summaries, strict=True)]})
    else:
        _show(traces, summaries)


@app.command()
@reads_traces
def convert(
    trace: Path = typer.Argument(metavar="TRACE", readable=False, help=TRACE_HELP),
    output: Path = OUTPUT_OPTION,
    to: str = typer.Option(
        "parquet", "--to", metavar="NAME", help="parquet, or oracleGeneral for libCacheSim."
    ),
    reading: Reading = Reading(),
    force: bool = FORCE_OPTION,
) -> None:
    """Write any trace in kvstrata's own columns, which load fast and stream.

    \b
    Examples:
      kvstrata trace convert conversation_trace.jsonl.gz -o conversation.parquet
      kvstrata trace convert kv.log --format strace --skip-bad -o kv.parquet
      kvstrata trace convert conversation.parquet --to oracleGeneral -o conversation.oracleGeneral
    """
    writer = _writer(to)
    _refuse_to_replace(output, force, trace)
    source = _open(trace, reading)
    _write(source, output, writer)


@app.command()
def stream(
    agentic: Path = typer.Option(
        ...,
        "--agentic",
        metavar="DIR",
        readable=False,
        help="Folder of agentic conversations, one per file.",
    ),
    output: Path = OUTPUT_OPTION,
    seed: int = SEED_OPTION,
    mean_arrival: float = MEAN_ARRIVAL_OPTION,
    block_tokens: int = typer.Option(256, "--block-tokens", metavar="N", help="Tokens of a block: k x 64."),
    skip_bad: bool = SKIP_BAD_OPTION,
    block_bytes: str | None = BLOCK_BYTES_OPTION,
    bytes_per_token: str | None = BYTES_PER_TOKEN_OPTION,
    force: bool = FORCE_OPTION,
) -> None:
    """Make one multi-tenant stream of many recorded conversations.

    They start at random times and keep their own gaps; equal tool definitions and system prompts
    become shared blocks. The same folder, seed and options give the same stream.

    \b
    Examples:
      kvstrata trace stream --agentic conversations/ -o stream.parquet
      kvstrata trace stream --agentic conversations/ --seed 2 --mean-arrival 30 -o busy.parquet
    """
    writer = _writer("parquet")
    _refuse_to_replace(output, force, agentic)
    source = _open(
        agentic,
        Reading(
            "stream",
            skip_bad,
            block_bytes,
            bytes_per_token,
            block_tokens,
            seed=seed,
            mean_arrival=mean_arrival,
        ),
    )
    _write(source, output, writer)


@app.command()
def capture(
    paths: list[Path] = typer.Argument(
        metavar="FOLDER...", readable=False, help="Folders that live stores captured into, or single files."
    ),
    output: Path = OUTPUT_OPTION,
    force: bool = FORCE_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Make one trace of what live stores have captured.

    Requests of all processes and restarts come in order of time. A file that is damaged or not
    complete is named on stderr and left out.

    \b
    Examples:
      kvstrata trace capture /var/log/kv-capture -o monday.parquet
      kvstrata trace capture node1/ node2/ -o both.parquet --json | jq .requests
    """
    _writer("parquet")
    from kvstrata.traces.capture_merge import merge_captures

    for path in paths:
        _refuse_to_replace(output, force, path)
    with ProgressBar("merging capture files", "accesses") as progress:
        merged = merge_captures(paths, output, progress)
    for one in merged.skipped:
        typer.echo(f"warning: skipped {one_line(one.path)}: {one_line(one.why)}", err=True)
    if as_json:
        print_json(
            {
                "output": str(output),
                "files": merged.files,
                "skipped": [{"file": str(one.path), "why": one.why} for one in merged.skipped],
                "tenants": merged.tenants,
                "requests": merged.requests,
                "accesses": merged.accesses,
                "unique": merged.unique,
                "first_unix_seconds": merged.first_unix_s,
                "last_unix_seconds": merged.last_unix_s,
                "output_bytes": output.stat().st_size,
            }
        )
        return
    print_line(
        f"wrote {one_line(output)}: {merged.requests} requests, {merged.accesses} accesses, "
        f"{merged.unique} unique blocks, {format_size(output.stat().st_size)}"
    )
    print_line(
        f"from {merged.files} files of {len(merged.tenants)} tenants, "
        f"{format_age(merged.last_unix_s - merged.first_unix_s)}"
    )
    if merged.skipped:
        print_line(f"skipped {len(merged.skipped)} files")


def _open(path: Path, reading: Reading) -> TraceSource:
    from kvstrata.traces.open import open_with

    with ProgressBar(f"reading {one_line(path)}", "conversations") as progress:
        return open_with(path, reading.format, replace(reading.options(), progress=progress))


Writer = Callable[["TraceSource", Path, Callable[[int, int], None]], None]


def _writer(to: str) -> Writer:
    """Also makes sure, before anything is read, that the packages for writing are there."""
    if to == "parquet":
        from kvstrata.traces.parquet import write_parquet

        return write_parquet
    if to == "oracleGeneral":
        from kvstrata.traces.libcachesim import write_oracle_general

        return lambda source, path, progress: write_oracle_general(source, path)
    raise ConfigError(f"--to {to}: nothing writes that; take parquet or oracleGeneral")


def _refuse_to_replace(output: Path, force: bool, source: Path) -> None:
    if output.is_dir():
        raise ConfigError(f"{output} is a folder; name the file to write with -o")
    if output.exists() and source.exists() and output.samefile(source):
        raise ConfigError(f"{output} is the trace itself; give another file with -o")
    if output.exists() and not force:
        raise ConfigError(f"{output} exists; --force replaces it")


def _write(source: TraceSource, output: Path, writer: Writer) -> None:
    with ProgressBar(f"writing {one_line(output)}", "accesses") as progress:
        writer(source, output, progress)
    head = source.head
    print_line(
        f"wrote {one_line(output)}: {head.requests} requests, {head.accesses} accesses, "
        f"{head.unique} unique blocks, {format_size(output.stat().st_size)}"
    )
    if head.skipped:
        print_line(f"skipped {head.skipped} broken records")


def _to_json(path: Path, summary: TraceSummary) -> dict[str, Any]:
    head = summary.head
    return {
        "trace": str(path),
        "name": head.name,
        "format": head.source_format,
        "requests": head.requests,
        "accesses": head.accesses,
        "unique": head.unique,
        "reuse": round(summary.reuse, 6),
        "sessions": summary.sessions,
        "tenants": summary.tenants,
        "duration_seconds": summary.duration_s,
        "accessed_bytes": summary.accessed_bytes,
        "unique_bytes": summary.unique_bytes,
        "block_tokens": head.block_tokens or None,
        "block_bytes": head.block_bytes or None,
        "request_blocks_p50": summary.request_blocks_p50,
        "request_blocks_p99": summary.request_blocks_p99,
        "reuse_gap_seconds_p50": summary.reuse_gap_s_p50,
        "labels": {name: list(labels) for name, labels in head.labels.items()},
        "skipped": head.skipped,
    }


def _show(traces: Sequence[Path], summaries: Sequence[TraceSummary]) -> None:
    rows: dict[str, Callable[[TraceSummary], object]] = {
        "format": lambda one: one.head.source_format,
        "requests": lambda one: one.head.requests,
        "accesses": lambda one: one.head.accesses,
        "unique blocks": lambda one: one.head.unique,
        "reuse": lambda one: f"{one.reuse:.4f}",
        "sessions": lambda one: one.sessions or "-",
        "tenants": lambda one: one.tenants or "-",
        "duration": lambda one: format_age(one.duration_s),
        "accessed": lambda one: format_size(one.accessed_bytes),
        "unique": lambda one: format_size(one.unique_bytes),
        "block tokens": lambda one: one.head.block_tokens or "-",
        "block size": lambda one: format_size(one.head.block_bytes) if one.head.block_bytes else "varies",
        "request blocks p50": lambda one: one.request_blocks_p50,
        "request blocks p99": lambda one: one.request_blocks_p99,
        "reuse gap p50": lambda one: _gap(one.reuse_gap_s_p50),
        "skipped records": lambda one: one.head.skipped,
    }
    print_table(
        "traces",
        ["", *(f"{one_line(path.resolve().name)}>" for path in traces)],
        [(name, *(figure(one) for one in summaries)) for name, figure in rows.items()],
    )


def _gap(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.3g} s" if seconds < 60 else format_age(math.floor(seconds))
