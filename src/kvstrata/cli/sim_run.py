"""`kvstrata sim run`: some policies at some capacities on some traces, printed."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from kvstrata.cli.output import SlotProgress
from kvstrata.cli.sim_options import (
    CAPACITY_HELP,
    JOBS_OPTION,
    POLICY_HELP,
    SET_OPTION,
    read_specs,
    read_variants,
    run_to_json,
    show_runs,
    tell_skipped,
)
from kvstrata.cli.trace import (
    BLOCK_BYTES_OPTION,
    BLOCK_TOKENS_OPTION,
    BYTES_PER_TOKEN_OPTION,
    CSV_COLUMNS_OPTION,
    FORMAT_OPTION,
    FULL_BLOCKS_OPTION,
    MEAN_ARRIVAL_OPTION,
    PATH_PREFIX_OPTION,
    SEED_OPTION,
    SKIP_BAD_OPTION,
    TRACE_HELP,
)


def run(
    traces: list[Path] = typer.Argument(metavar="TRACE...", readable=False, help=TRACE_HELP),
    policy: str = typer.Option("lru", "--policy", metavar="LIST", help=POLICY_HELP),
    capacity: str = typer.Option("1%,5%,10%,20%", "--capacity", metavar="LIST", help=CAPACITY_HELP),
    settings: list[str] | None = SET_OPTION,
    jobs: int | None = JOBS_OPTION,
    format: str | None = FORMAT_OPTION,
    skip_bad: bool = SKIP_BAD_OPTION,
    block_bytes: str | None = BLOCK_BYTES_OPTION,
    bytes_per_token: str | None = BYTES_PER_TOKEN_OPTION,
    block_tokens: int | None = BLOCK_TOKENS_OPTION,
    full_blocks: bool = FULL_BLOCKS_OPTION,
    csv_columns: str | None = CSV_COLUMNS_OPTION,
    path_prefix: str | None = PATH_PREFIX_OPTION,
    seed: int = SEED_OPTION,
    mean_arrival: float = MEAN_ARRIVAL_OPTION,
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
    specs = read_specs(
        traces,
        format=format,
        skip_bad=skip_bad,
        block_bytes=block_bytes,
        bytes_per_token=bytes_per_token,
        block_tokens=block_tokens,
        full_blocks=full_blocks,
        csv_columns=csv_columns,
        path_prefix=path_prefix,
        seed=seed,
        mean_arrival=mean_arrival,
    )
    with SlotProgress("simulating", "runs") as progress:
        grid = run_grid(specs, variants, capacities, jobs=jobs, progress=progress)
    tell_skipped(grid.skipped)
    if as_json:
        typer.echo(json.dumps([run_to_json(result) for result in grid.results], indent=2))
    else:
        show_runs(grid.results)
