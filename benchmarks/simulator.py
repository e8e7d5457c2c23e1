"""Block accesses per second of the simulator and of libCacheSim, in turn, on the same accesses.

The stream is that of the real agentic conversations with blocks of 64 tokens (DESIGN.md, section 6):
7.5 million accesses in requests of about 1,800 blocks. Sides, per policy and capacity:

    full     our replay with every metric that `kvstrata sim run` prints
    bare     our policy kernel alone
    peer     libCacheSim's C loop over an oracleGeneral file in the page cache (hashpower 20)

Both sides run on one core. `peer` has no leaf-first LRU: lru is set against its LRU; lfu_aging and
tinylfu_slru against its nearest kin, LFUDA and WTinyLFU.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from harness import in_turn, machine, pair_ratio, parser, show, spread, write_json
from kvstrata.errors import KVStrataError
from kvstrata.policies import POLICIES
from kvstrata.sim.capacity import Capacity, resolve
from kvstrata.sim.replay import BATCH_ACCESSES, Workload, make_simulated, simulate
from kvstrata.traces.open import open_trace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from libcachesim_kit import AVAILABLE, REASON, OracleFile

TRACES = Path(__file__).parents[2] / "shared" / "traces" / "open" / "agentic"
PEERS = {"lru": "lru_forward", "lfu_aging": "lfuda", "tinylfu_slru": "wtinylfu"}
"""The peer's policy, where it is not the one of our name."""

EVERY = (*sorted(POLICIES), "belady")


def full(workload: Workload, policy: str, capacity: Capacity) -> float:
    """Seconds of a replay with all metrics."""
    return simulate(workload, policy, capacity).seconds


def bare(workload: Workload, policy: str, capacity: Capacity) -> float:
    """Seconds of the kernel alone."""
    simulated = make_simulated(workload, policy, capacity)
    sizes = workload.sizes()
    seconds = 0.0
    for batch in workload.source.batches(BATCH_ACCESSES):
        started = time.perf_counter()
        simulated.replay(batch.ids, batch.starts, sizes)
        seconds += time.perf_counter() - started
    return seconds


def peer(file: OracleFile, policy: str, capacity: Capacity, hits: list[int]) -> float:
    started = time.perf_counter()
    hits.append(file.hits(PEERS.get(policy, policy), capacity.units))
    return time.perf_counter() - started


def main() -> None:
    arguments = parser("Our simulator against libCacheSim", "simulator")
    arguments.add_argument(
        "--trace", type=Path, default=TRACES, help="a trace, or a folder of conversations"
    )
    arguments.add_argument("--block-tokens", type=int, default=64)
    arguments.add_argument("--policies", default=",".join(EVERY))
    arguments.add_argument("--capacities", default="1%,10%")
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    if not AVAILABLE:
        sys.exit(REASON)
    try:
        workload = Workload(open_trace(options.trace, block_tokens=options.block_tokens))
    except (KVStrataError, OSError) as error:
        sys.exit(f"error: {error}")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    ids = np.concatenate([batch.ids for batch in workload.source.batches()])
    workload.future()
    accesses = len(ids)
    rows, results = [], []
    with OracleFile(ids) as file:
        for text in options.capacities.split(","):
            capacity = resolve(text, workload.footprint)
            for policy in options.policies.split(","):
                hits: list[int] = []
                sides: dict[str, Callable[[], float]] = {
                    "full": lambda policy=policy, capacity=capacity: full(workload, policy, capacity),
                    "bare": lambda policy=policy, capacity=capacity: bare(workload, policy, capacity),
                    "peer": lambda policy=policy, capacity=capacity, hits=hits: peer(
                        file, policy, capacity, hits
                    ),
                }
                seconds = in_turn(sides, options.rounds)
                result = figures(policy, text, capacity, accesses, seconds)
                ours = simulate(workload, policy, capacity)
                result |= {
                    "block_hit_ratio": ours.block_hit_ratio,
                    "peer_block_hit_ratio": hits[-1] / accesses,
                }
                results.append(result)
                rows.append(row(result))
                Console(stderr=True).print(f"{text} {policy}: {result['peer_over_full']:.1f} x")
    show(
        f"Million block accesses per second, one core; {workload.name}, {accesses:,} accesses",
        ["capacity, policy", "full", "bare", "peer", "full / peer", "bare / full", "hit ratio", "peer's"],
        rows,
    )
    write_json(
        options.json,
        {
            "machine": machine(["kvstrata", "numba", "numpy", "libcachesim"]),
            "trace": {"name": workload.name, "accesses": accesses, "unique": workload.head.unique},
            "rounds": options.rounds,
            "results": results,
        },
    )


def figures(
    policy: str, text: str, capacity: Capacity, accesses: int, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    return {
        "policy": policy,
        "peer": PEERS.get(policy, policy),
        "capacity": text,
        "capacity_blocks": capacity.blocks,
        "accesses_per_second": {
            side: accesses / statistics.median(times) for side, times in seconds.items()
        },
        "seconds": {side: spread(times) for side, times in seconds.items()},
        "peer_over_full": pair_ratio(seconds["peer"], seconds["full"]),
        "full_over_bare": pair_ratio(seconds["full"], seconds["bare"]),
    }


def row(result: dict[str, Any]) -> list[str]:
    speeds = result["accesses_per_second"]
    return [
        f"{result['capacity']} {result['policy']}",
        *(f"{speeds[side] / 1e6:.1f}" for side in ("full", "bare", "peer")),
        f"{result['peer_over_full']:.1f} x",
        f"{result['full_over_bare']:.2f} x",
        f"{result['block_hit_ratio']:.4f}",
        f"{result['peer_block_hit_ratio']:.4f}",
    ]


if __name__ == "__main__":
    main()
