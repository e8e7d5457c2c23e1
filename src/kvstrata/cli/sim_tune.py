"""`kvstrata sim tune`: does it help to turn a policy's knobs?"""

from __future__ import annotations

from pathlib import Path

import typer

from kvstrata.cli.output import JSON_OPTION, ProgressBar, print_json, print_line
from kvstrata.cli.reading import TRACE_HELP, Reading, reads_traces
from kvstrata.cli.sim_options import (
    CAPACITY_HELP,
    FOLDER_OPTION,
    JOBS_OPTION,
    STUDY_CAPACITIES,
    plain_params,
    read_policies,
    read_settings,
    tell_skipped,
)
from kvstrata.cli.sim_sweep import grid_to_json, means_over, scores_to_json, show_scores, tell_grid
from kvstrata.errors import ConfigError


@reads_traces
def tune(
    traces: list[Path] = typer.Argument(metavar="TRACE...", readable=False, help=TRACE_HELP),
    output: Path = FOLDER_OPTION,
    policy: str | None = typer.Option(
        None, "--policy", metavar="NAME", help="Tune this one, with --set. [default: the study's variants]"
    ),
    settings: list[str] | None = typer.Option(
        None, "--set", metavar="TEXT", help="Values of a parameter: NAME=VALUE,VALUE; several make a grid."
    ),
    capacity: str = typer.Option(STUDY_CAPACITIES, "--capacity", metavar="LIST", help=CAPACITY_HELP),
    jobs: int | None = JOBS_OPTION,
    reading: Reading = Reading(),
    as_json: bool = JSON_OPTION,
) -> None:
    """Run variants of a policy's parameters against lru and arc, and keep the results.

    Without --policy: the thirteen variants of the eviction study (five of tinylfu_slru, six of
    lfu_aging, lru and arc). What is in the folder already is not run again.

    \b
    Examples:
      kvstrata sim tune conversation_trace.jsonl.gz -o tuning/
      kvstrata sim tune traces/*.parquet --policy twoq --set kin=0.1,0.25,0.5 --set kout=0.5,1 -o tuning/
    """
    from kvstrata.sim.capacity import split_capacities
    from kvstrata.sim.grid import run_grid
    from kvstrata.sim.tune import STUDY_VARIANTS, grid_variants, spreads, tune_rows

    if policy is None:
        if settings:
            raise ConfigError("--set goes with --policy NAME")
        variants = list(STUDY_VARIANTS)
    else:
        names = read_policies(policy)
        if len(names) != 1:
            raise ConfigError(f"--policy {policy}: one policy is tuned at a time")
        variants = grid_variants(names[0], read_settings(settings or [], names).get(names[0], {}))
    capacities = split_capacities(capacity)
    specs = reading.specs(traces)
    chosen = [(variant.policy, variant.params) for variant in variants]
    with ProgressBar("simulating", "runs") as progress:
        grid = run_grid(specs, chosen, capacities, out=output, jobs=jobs, progress=progress)
    tell_skipped(grid.skipped)
    rows = tune_rows(grid, variants)
    ranges = spreads(rows)
    if as_json:
        print_json(
            grid_to_json(output, specs, capacities, grid)
            | {
                "variants": [
                    {"variant": row.variant.name}
                    | scores_to_json(row.scores)
                    | {"set": plain_params(row.variant.params)}
                    for row in rows
                ],
                "spread": {name: {"lowest": low, "highest": high} for name, (low, high) in ranges.items()},
            }
        )
        return
    show_scores(
        means_over(specs, capacities),
        [row.scores for row in rows],
        [row.variant.name for row in rows],
    )
    for name, (low, high) in ranges.items():
        print_line(f"{name}: {low:.4f} to {high:.4f}, a spread of {(high - low) * 100:.1f} points")
    print_line(tell_grid(grid.ran, grid.reused, output))
