"""`kvstrata sim advise`: which policy and what capacity for a trace, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvstrata.cli.output import JSON_OPTION, SlotProgress, one_line, print_json, print_line, print_table
from kvstrata.cli.sim_options import params_label, ratio, read_specs, tell_skipped
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
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from kvstrata.sim.advise import Advice


def advise(
    trace: Path = typer.Argument(metavar="TRACE", readable=False, help=TRACE_HELP),
    bottleneck: str = typer.Option(
        ..., "--bottleneck", metavar="latency|bandwidth", help="What limits you: waiting, or bytes written."
    ),
    capacity: str | None = typer.Option(
        None,
        "--capacity",
        metavar="SIZE",
        help="What there is: 5%, 5000b, 64GiB. [default: where doubling it stops to pay]",
    ),
    give_up: str = typer.Option(
        "50%",
        "--give-up",
        metavar="SHARE",
        help="With bandwidth: the share of the best hit ratio that less writing may cost.",
    ),
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
    as_json: bool = JSON_OPTION,
) -> None:
    """Say which policy and what capacity would hold this traffic, and why.

    Simulates every policy that a live store can use. The last lines are for kvstrata.toml.

    \b
    Examples:
      kvstrata sim advise conversation_trace.jsonl.gz --bottleneck latency
      kvstrata sim advise conversations/ --bottleneck bandwidth --capacity 256GiB --give-up 20%
    """
    from kvstrata.sim.advise import BOTTLENECKS
    from kvstrata.sim.advise import advise as ask
    from kvstrata.sim.capacity import normal
    from kvstrata.sim.specs import workload_of

    if bottleneck not in BOTTLENECKS:
        raise ConfigError(f"--bottleneck {bottleneck!r}: take {' or '.join(BOTTLENECKS)}")
    if capacity is not None:
        normal(capacity)
    share = _share(give_up)
    specs = read_specs(
        [trace],
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
    with SlotProgress(f"reading {one_line(trace)}", "conversations") as progress:
        workload = workload_of(specs[0], progress)
    with SlotProgress("simulating", "runs") as progress:
        advice = ask(workload, bottleneck, capacity, give_up=share, progress=progress)
    tell_skipped({workload.name: workload.head.skipped} if workload.head.skipped else {})
    if as_json:
        print_json(advice.as_dict())
    else:
        _show(advice)


def _share(text: str) -> float:
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ConfigError(f"--give-up {text!r}: write a share from 0% to below 100%")
    return value


def _show(advice: Advice) -> None:
    for sentence in advice.sentences:
        print_line(sentence)
    print_line()
    print_table(
        f"policies at {advice.chosen.capacity_blocks} blocks",
        ["policy", "usable prefix>", "block hits>", "amplification>", "wasted>", ""],
        [
            (
                params_label(run.params, run.policy),
                ratio(run.usable_prefix_hit_ratio),
                ratio(run.block_hit_ratio),
                ratio(run.amplification),
                ratio(run.wasted_ratio),
                "advised" if run is advice.chosen else "",
            )
            for run in advice.runs
        ],
    )
    print_line(advice.toml)
