"""`kvstrata sim run`: some policies at some capacities on some traces, printed."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from kvstrata.cli.output import ProgressBar
from kvstrata.cli.reading import TRACE_HELP, Reading, reads_traces
from kvstrata.cli.sim_options import (
    CAPACITY_HELP,
    JOBS_OPTION,
    POLICY_HELP,
    SET_OPTION,
    read_variants,
    run_to_json,
    show_runs,
    tell_skipped,
)


@reads_traces
def run(
    traces: list[Path] = typer.Argument(metavar="TRACE...", readable=False, help=TRACE_HELP),
    policy: str = typer.Option("lru", "--policy", metavar="LIST", help=POLICY_HELP),
    capacity: str = typer.Option("1%,5%,10%,20%", "--capacity", metavar="LIST", help=CAPACITY_HELP),
    settings: list[str] | None = SET_OPTION,
    jobs: int | None = JOBS_OPTION,
    reading: Reading = Reading(),
    as_json: bool = typer.Option(False, "--json", help="Print a JSON list, one object per run."),
) -> None:
    """Replay traces through policies and print what they hit. Writes nothing.

    \b
    Examples:
      kvstrata sim run conversation_trace.jsonl.gz --policy lru,arc,belady --capacity 1%,5%,64GiB
      kvstrata sim run conversations/ --policy all --capacity 5% --json | jq '.[].usable_prefix_hit_ratio'
      kvstrata sim run stream.parquet --policy tinylfu_slru --set tinylfu_slru.cms_width=65536
    """
    from kvstrata.sim.capacity import split_capacities
    from kvstrata.sim.grid import run_grid

    variants = read_variants(policy, settings or [])
    capacities = split_capacities(capacity)
    specs = reading.specs(traces)
    with ProgressBar("simulating", "runs") as progress:
        grid = run_grid(specs, variants, capacities, jobs=jobs, progress=progress)
    tell_skipped(grid.skipped)
    if as_json:
        typer.echo(json.dumps([run_to_json(result) for result in grid.results], indent=2))
    else:
        show_runs(grid.results)
