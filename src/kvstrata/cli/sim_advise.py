"""`kvstrata sim advise`: which policy and what capacity for a trace, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvstrata.cli.output import JSON_OPTION, ProgressBar, one_line, print_json, print_line, print_table
from kvstrata.cli.reading import TRACE_HELP, Reading, reads_traces
from kvstrata.cli.sim_options import params_label, ratio, tell_skipped
from kvstrata.errors import ConfigError

if TYPE_CHECKING:
    from kvstrata.sim.advise import Advice


@reads_traces
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
    reading: Reading = Reading(),
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
    specs = reading.specs([trace])
    with ProgressBar(f"reading {one_line(trace)}", "conversations") as progress:
        workload = workload_of(specs[0], progress)
    with ProgressBar("simulating", "runs") as progress:
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
