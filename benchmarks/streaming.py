"""Peak memory of a replay that streams a trace of 100 million accesses.

The trace is the real agentic stream again and again: every copy begins when the one before it has ended,
and has its own conversations, so that unique blocks grow with it. It is written once as Parquet (the
format that streams), then replayed in a fresh process, whose peak resident memory is read from the
kernel. For comparison the same process is run on the first copy alone, and an empty one that only
imports the simulator.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from harness import machine, parser, show, write_json
from kvstrata.errors import KVStrataError
from kvstrata.traces.open import open_trace
from kvstrata.traces.parquet import write_parquet
from kvstrata.traces.trace import BATCH_ACCESSES, Batch, Trace, TraceHead

TRACES = Path(__file__).parents[2] / "shared" / "traces" / "open" / "agentic"

CHILD = """
import json, re, sys, time
from kvstrata.sim.capacity import resolve
from kvstrata.sim.replay import Workload, simulate
from kvstrata.traces.open import open_trace
policy, capacity, *paths = sys.argv[1:]
out = {}
for path in paths:
    workload = Workload(open_trace(path))
    started = time.perf_counter()
    result = simulate(workload, policy, resolve(capacity, workload.footprint))
    out = {"accesses": result.accesses, "unique": result.unique_blocks, "hit_ratio": result.block_hit_ratio,
           "replay_seconds": result.seconds, "seconds": time.perf_counter() - started}
status = open("/proc/self/status").read()
out["peak_rss_bytes"] = int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) * 1024
print(json.dumps(out))
"""


class Repeated:
    """A trace `copies` times in a row, each copy with blocks, sessions and tenants of its own."""

    def __init__(self, trace: Trace, copies: int) -> None:
        self._trace = trace
        self._copies = copies
        head = trace.head
        self.head: TraceHead = replace(
            head,
            name=f"{head.name}, {copies} times",
            requests=head.requests * copies,
            accesses=head.accesses * copies,
            unique=head.unique * copies,
        )

    def batches(self, max_accesses: int = BATCH_ACCESSES) -> Iterator[Batch]:
        head = self._trace.head
        period = float(self._trace.time_s[-1]) + 1.0
        sessions = int(self._trace.session.max()) + 1
        for copy in range(self._copies):
            first = np.int32(copy * head.unique)
            for batch in self._trace.batches(max_accesses):
                yield replace(
                    batch,
                    first_request=batch.first_request + copy * head.requests,
                    ids=batch.ids + first,
                    parents=np.where(batch.parents < 0, batch.parents, batch.parents + first),
                    time_s=batch.time_s + copy * period,
                    session=batch.session + np.int32(copy * sessions),
                    tenant=batch.tenant + np.int32(copy * sessions),
                )


def child(*arguments: str) -> dict[str, Any]:
    """Run a replay in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout))


def main() -> None:
    arguments = parser("Peak memory of a replay that streams", "streaming")
    arguments.add_argument("--trace", type=Path, default=TRACES)
    arguments.add_argument("--accesses", type=int, default=100_000_000)
    arguments.add_argument("--policy", default="lru")
    arguments.add_argument("--capacity", default="10%")
    arguments.add_argument("--dir", type=Path, default=None, help="where the Parquet files go, then away")
    options = arguments.parse_args()
    say = Console(stderr=True).print
    try:
        trace = open_trace(options.trace, block_tokens=64)
    except (KVStrataError, OSError) as error:
        sys.exit(f"error: {error}")
    assert isinstance(trace, Trace)
    copies = -(-options.accesses // trace.head.accesses)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for name, count in (("one copy", 1), (f"{copies} copies", copies)):
            path = Path(folder) / f"{count}.parquet"
            say(f"writing {name}")
            started = time.perf_counter()
            write_parquet(Repeated(trace, count), path)
            wrote = {"write_seconds": time.perf_counter() - started, "file_bytes": path.stat().st_size}
            say(f"replaying {name}")
            results[name] = child(options.policy, options.capacity, str(path)) | wrote
        results["imports alone"] = child(options.policy, options.capacity)
    show(
        f"Peak resident memory, {options.policy} at {options.capacity}",
        ["trace", "accesses", "unique", "peak MiB", "seconds", "replay alone", "file MiB"],
        [
            [
                name,
                f"{figures.get('accesses', 0):,}",
                f"{figures.get('unique', 0):,}",
                f"{figures['peak_rss_bytes'] / 2**20:.0f}",
                f"{figures.get('seconds', 0):.1f}",
                f"{figures.get('replay_seconds', 0):.1f}",
                f"{figures.get('file_bytes', 0) / 2**20:.0f}",
            ]
            for name, figures in results.items()
        ],
    )
    write_json(
        options.json,
        {"machine": machine(["kvstrata", "numba", "numpy", "pyarrow"]), "results": results},
    )


if __name__ == "__main__":
    main()
