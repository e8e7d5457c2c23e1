"""How long a grid of the size of a published study takes, and how long the first run of a policy.

The published one replayed 30 traces of 8.0 million events through 7 policies at 6 capacities: 336 million
policy events. Here: the 60 real agentic conversations in 30 pairs, each pair a stream of 64-token blocks,
and the Mooncake conversation trace with and without its partial blocks: 32 traces, 8.0 million accesses,
the same 7 policies at 6 capacities. What is timed is the command that a user types, `kvstrata sim sweep`,
in a process of its own and with an empty results folder; it includes reading the traces. Kernels lie
compiled on disk, as they do after any earlier run. Cold start is `kvstrata sim run` of one policy without
that cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from harness import machine, parser, show, spread, write_json
from kvstrata.traces.open import open_trace
from kvstrata.traces.parquet import write_parquet

TRACES = Path(__file__).parents[2] / "shared" / "traces" / "open"
POLICIES = ("belady", "lru", "twoq", "arc", "clock_pro", "lfu_aging", "tinylfu_slru")
CAPACITIES = "0.1%,1%,5%,10%,20%,40%"
PROGRAM = Path(sys.executable).parent / "kvstrata"


def make_traces(source: Path, folder: Path) -> list[str]:
    """32 traces as Parquet, the form that `kvstrata trace convert` writes."""
    conversations = sorted((source / "agentic").glob("*.json*"))
    paths = []
    for pair in range(len(conversations) // 2):
        both = folder / f"pair-{pair:02}"
        both.mkdir()
        for path in conversations[2 * pair : 2 * pair + 2]:
            (both / path.name).symlink_to(path)
        paths.append(folder / f"pair-{pair:02}.parquet")
        write_parquet(open_trace(both, block_tokens=64), paths[-1])
    for name, full in (("conversation", False), ("conversation-full", True)):
        paths.append(folder / f"{name}.parquet")
        mooncake = source / "mooncake" / "conversation_trace.jsonl.gz"
        write_parquet(open_trace(mooncake, full_blocks=full), paths[-1])
    return [str(path) for path in paths]


def run(*arguments: str, **environment: str) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(
        [PROGRAM, "sim", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    return time.perf_counter() - started, done.stdout


def cold_starts(trace: str, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of the first run of each policy ever, and of the second, on the smallest trace."""
    found = {}
    for policy in POLICIES:
        times: dict[str, list[float]] = {"first": [], "second": []}
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as cache:
                for series in times.values():
                    arguments = ("run", trace, "--policy", policy, "--capacity", "10%", "--json")
                    series.append(run(*arguments, NUMBA_CACHE_DIR=cache)[0])
        found[policy] = {name: spread(values)["median"] for name, values in times.items()}
    return found


def main() -> None:
    arguments = parser("A grid of a published study's size", "study_grid")
    arguments.add_argument("--traces", type=Path, default=TRACES)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    if not options.traces.is_dir():
        sys.exit(f"error: {options.traces}: no such folder; give the real traces with --traces")
    say = Console(stderr=True).print
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("making the traces")
        traces = make_traces(options.traces, folder)
        run("run", traces[0], "--policy", ",".join(POLICIES), "--capacity", "10%", "--json")
        seconds: list[float] = []
        for number in range(options.rounds):
            say(f"sweep {number + 1} of {options.rounds}")
            took, printed = run(
                "sweep", *traces, "--policy", ",".join(POLICIES), "--capacity", CAPACITIES,
                "-o", str(folder / f"results-{number}"), "--json",
            )  # fmt: skip
            seconds.append(took)
        say("cold starts")
        smallest = min(traces, key=lambda path: Path(path).stat().st_size)
        cold = cold_starts(smallest, options.rounds)
        accesses = sum(open_trace(path).head.accesses for path in traces)
    events = accesses * len(POLICIES) * len(CAPACITIES.split(","))
    result: dict[str, Any] = {
        "machine": machine(["kvstrata", "numba", "numpy", "joblib", "pyarrow"]),
        "traces": len(traces),
        "accesses": accesses,
        "policy_events": events,
        "runs": len(traces) * len(POLICIES) * len(CAPACITIES.split(",")),
        "sweep_seconds": spread(seconds),
        "cold_start_seconds": cold,
        "printed": {key: value for key, value in json.loads(printed).items() if key != "output"},
    }
    show(
        f"{len(traces)} traces, {accesses / 1e6:.1f} M accesses, {events / 1e6:.0f} M policy events",
        ["what", "seconds (median)"],
        [
            ["the whole grid, one command", f"{result['sweep_seconds']['median']:.1f}"],
            *([f"first run of {policy} ever", f"{times['first']:.1f}"] for policy, times in cold.items()),
            ["a second run, mean of these", f"{sum(t['second'] for t in cold.values()) / len(cold):.1f}"],
        ],
    )
    write_json(options.json, result)


if __name__ == "__main__":
    main()
