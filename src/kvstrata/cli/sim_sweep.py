"""`kvstrata sim sweep`: traces x policies x capacities into a folder of Parquet, and the headline table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvstrata.cli.output import JSON_OPTION, ProgressBar, one_line, print_json, print_line, print_table
from kvstrata.cli.reading import TRACE_HELP, Reading, reads_traces
from kvstrata.cli.sim_options import (
    CAPACITY_HELP,
    FOLDER_OPTION,
    JOBS_OPTION,
    POLICY_HELP,
    SET_OPTION,
    STUDY_CAPACITIES,
    counted,
    plain_params,
    ratio,
    read_variants,
    tell_skipped,
)

if TYPE_CHECKING:
    from kvstrata.sim.grid import GridRun
    from kvstrata.sim.specs import TraceSpec
    from kvstrata.sim.tables import Scores


@reads_traces
def sweep(
    traces: list[Path] = typer.Argument(metavar="TRACE...", readable=False, help=TRACE_HELP),
    output: Path = FOLDER_OPTION,
    policy: str = typer.Option("all", "--policy", metavar="LIST", help=POLICY_HELP),
    capacity: str = typer.Option(STUDY_CAPACITIES, "--capacity", metavar="LIST", help=CAPACITY_HELP),
    settings: list[str] | None = SET_OPTION,
    jobs: int | None = JOBS_OPTION,
    reading: Reading = Reading(),
    as_json: bool = JSON_OPTION,
) -> None:
    """Run a whole grid, and keep the results.

    What is in the folder already is not run again, so an interrupted sweep goes on where it was, and
    traces, policies and capacities can be added later.

    \b
    Examples:
      kvstrata sim sweep traces/*.jsonl.gz -o results/
      kvstrata sim sweep monday.parquet tuesday.parquet --policy lru,arc,belady --capacity 1%,5% -o results/
      kvstrata sim sweep conversations/ -o results/ --json | jq .headline
    """
    from kvstrata.sim.capacity import split_capacities
    from kvstrata.sim.grid import run_grid
    from kvstrata.sim.tables import headline

    variants = read_variants(policy, settings or [])
    capacities = split_capacities(capacity)
    specs = reading.specs(traces)
    with ProgressBar("simulating", "runs") as progress:
        grid = run_grid(specs, variants, capacities, out=output, jobs=jobs, progress=progress)
    tell_skipped(grid.skipped)
    rows = headline(grid.study())
    if as_json:
        print_json(
            grid_to_json(output, specs, capacities, grid)
            | {"headline": [scores_to_json(row) for row in rows]}
        )
        return
    show_scores(means_over(specs, capacities), rows)
    print_line(tell_grid(grid.ran, grid.reused, output))
    print_line(f"`kvstrata sim report {one_line(output)} -o report` draws them")


def means_over(traces: Sequence[object], capacities: Sequence[str]) -> str:
    sizes = "1 capacity" if len(capacities) == 1 else f"{len(capacities)} capacities"
    return f"means over {counted(len(traces), 'trace')} x {sizes}"


def tell_grid(ran: int, reused: int, output: Path) -> str:
    was_there = f", {reused} were there already and were not run again" if reused else ""
    return f"{counted(ran, 'run')} done{was_there}; results in {one_line(output)}/*.parquet"


def grid_to_json(
    output: Path, specs: Sequence[TraceSpec], capacities: Sequence[str], grid: GridRun
) -> dict[str, Any]:
    """What was run, and where it lies."""
    return {
        "output": str(output),
        "traces": [spec.name for spec in specs],
        "capacities": capacities,
        "runs": len(grid.results),
        "ran": grid.ran,
        "reused": grid.reused,
    }


def scores_to_json(row: Scores) -> dict[str, Any]:
    return {
        "policy": row.variant.policy,
        "params": plain_params(dict(row.variant.params)),
        "runs": row.cells,
        "block_hit_ratio": row.block_hit_ratio,
        "usable_prefix_hit_ratio": row.usable_prefix_hit_ratio,
        "amplification": _finite(row.mean_amplification),
        "total_amplification": _finite(row.amplification),
        "wasted_ratio": row.wasted_ratio,
        "gap_to_belady": row.gap_to_belady,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def show_scores(title: str, rows: Sequence[Scores], names: Sequence[str] = ()) -> None:
    """names: what to call the rows, in place of policy and parameters. Without gaps they are not shown."""
    figures: dict[str, Callable[[Scores], float | None]] = {
        "block hits>": lambda row: row.block_hit_ratio,
        "usable prefix>": lambda row: row.usable_prefix_hit_ratio,
        "amplification>": lambda row: row.mean_amplification,
        "total amplif.>": lambda row: row.amplification,
        "wasted>": lambda row: row.wasted_ratio,
        "gap to belady>": lambda row: row.gap_to_belady,
    }
    if all(row.gap_to_belady is None for row in rows):
        del figures["gap to belady>"]
    print_table(
        title,
        ["policy", *figures],
        [
            (name, *(ratio(figure(row)) for figure in figures.values()))
            for name, row in zip(names or [row.variant.label for row in rows], rows, strict=True)
        ],
    )
