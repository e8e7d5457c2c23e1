"""`kvstrata sim curve`: the hits of LRU at every capacity, in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvstrata.cli.output import JSON_OPTION, ProgressBar, one_line, print_json, print_line, print_table
from kvstrata.cli.reading import TRACE_HELP, Reading, reads_traces
from kvstrata.cli.sim_options import ratio, tell_skipped
from kvstrata.cli.trace import FORCE_OPTION
from kvstrata.config import format_size
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from kvstrata.sim.curve import LruCurve

SHOWN_PERCENT = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 80, 100)


@reads_traces
def curve(
    trace: Path = typer.Argument(metavar="TRACE", readable=False, help=TRACE_HELP),
    policy: str = typer.Option("lru", "--policy", metavar="NAME", help="lru or lru_forward."),
    output: Path | None = typer.Option(
        None,
        "-o",
        "--output",
        metavar="FILE",
        readable=False,
        help="Write .csv, .json, .png, .svg or .pdf.",
    ),
    force: bool = FORCE_OPTION,
    reading: Reading = Reading(),
    as_json: bool = JSON_OPTION,
) -> None:
    """Show what LRU would hit at every capacity, exactly, from one pass.

    \b
    Examples:
      kvstrata sim curve conversation_trace.jsonl.gz
      kvstrata sim curve conversations/ -o curve.png
      kvstrata sim curve stream.parquet --policy lru_forward -o curve.csv
    """
    from kvstrata.sim.curve import lru_curve
    from kvstrata.sim.curve_file import as_dict, check_suffix, spread, write_curve
    from kvstrata.sim.specs import workload_of

    if output is not None:
        check_suffix(output)
        if output.exists() and not force:
            raise ConfigError(f"{output} exists; --force replaces it")
    specs = reading.specs([trace])
    with ProgressBar(f"reading {one_line(trace)}", "conversations") as progress:
        workload = workload_of(specs[0], progress)
    with ProgressBar("replaying", "accesses") as progress:
        found = lru_curve(workload, policy, progress)
    tell_skipped({workload.name: workload.head.skipped} if workload.head.skipped else {})
    if output is not None:
        write_curve(found, output)
    if as_json:
        print_json(as_dict(found, spread(found)))
    else:
        _show(found)
        if output is not None:
            print_line(f"wrote {one_line(output)}")


def _show(found: LruCurve) -> None:
    rows = []
    for percent in SHOWN_PERCENT:
        blocks = max(1, int(found.unique_blocks * percent / 100))
        rows.append(
            (
                f"{percent:g}%",
                blocks,
                format_size(blocks * found.block_bytes),
                ratio(found.block_hit_ratio(blocks)),
                ratio(found.usable_prefix_hit_ratio(blocks)),
                ratio(found.request_hit_ratio(blocks)),
            )
        )
    print_table(
        f"{found.policy} on {one_line(found.trace)}: {found.accesses} accesses, "
        f"{found.unique_blocks} unique blocks of {format_size(found.block_bytes)}",
        ["share", "blocks>", "size>", "block hits>", "usable prefix>", "whole requests>"],
        rows,
    )
    last = int(found.steps()[-1])
    print_line(
        f"from {last} blocks ({format_size(last * found.block_bytes)}) on, more capacity hits no more"
    )
