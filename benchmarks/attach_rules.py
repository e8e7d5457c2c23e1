"""What each attach rule of the read-only client cache buys and costs, on a real stream of agentic traffic.

A live store is fed with the stream: an nvme tier that saves never write to, before a shared folder that
holds everything. Every request is looked up, loaded (every block verified) and saved. Shown per rule: the
share of block reads that the local tier served, bytes that came from the shared folder, and bytes that were
written to the local disk. Blocks are small, so that the stream fits on any disk: no share depends on it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from harness import machine, parser, show, write_json
from kvstrata import BlockLayout, BlockStore, namespace_digest
from kvstrata.config import Config, NvmeTierConfig, SharedFsTierConfig, StoreConfig
from kvstrata.hashing import wrap_keys
from kvstrata.tiers.nvme_format import slot_stride
from kvstrata.traces import stream
from kvstrata.traces.trace import Trace
from kvstrata.transfer.buffers import Arena, Region
from kvstrata.types import BlockKey, Namespace, Outcome

TRACES = Path(__file__).parents[2] / "shared" / "traces" / "open" / "agentic"
BLOCK_BYTES = 4096
STRIDE = slot_stride(BLOCK_BYTES)
SPARE_BYTES = 16 << 20
NAMESPACE = Namespace(namespace_digest({"model": "attach rules"}))
WAIT_SECONDS = 60.0
SETTINGS = StoreConfig(io_deadline_seconds=WAIT_SECONDS)

RULES: dict[str, dict[str, Any]] = {
    "no": {"attach": "no"},
    "always": {"attach": "always"},
    "second read": {"attach": "second"},
    "third read": {"attach": "second", "attach_reads": 3},
    "always, whole chunk": {"attach": "always", "attach_chunk": "whole"},
    "always, 32 blocks ahead": {"attach": "always", "read_ahead_blocks": 32},
    "always, 1 MB/s": {"attach": "always", "attach_bytes_per_second": 1_000_000},
}


@dataclass(frozen=True)
class Outcomes:
    """Of one replay. Bytes are those of payloads."""

    local_blocks: int
    shared_blocks: int
    shared_bytes: int
    local_bytes_written: int
    seconds: float

    @property
    def hit_ratio(self) -> float:
        """Local blocks / blocks read."""
        return self.local_blocks / max(1, self.local_blocks + self.shared_blocks)


def replay(trace: Trace, rule: Mapping[str, Any], share: float, folder: Path, progress: Any) -> Outcomes:
    """share: of the unique blocks, that fit into the local tier."""
    ids = trace.ids
    every = wrap_keys(NAMESPACE.digest, [int(n).to_bytes(8, "big") for n in range(trace.head.unique)])
    longest = int(np.diff(trace.starts).max())
    arena = Arena(longest * BLOCK_BYTES)
    arena.view[:] = bytes(len(arena.view))
    region = Region(arena.view, BLOCK_BYTES)
    contents = np.frombuffer(arena.view, dtype=np.int64).reshape(longest, -1)
    local = NvmeTierConfig(
        path=str(folder / "local"),
        capacity_bytes=int(share * trace.head.unique) * STRIDE + SPARE_BYTES,
        write_mode="none",
        attach_staging_bytes=256 << 20,
        **rule,
    )
    shared = SharedFsTierConfig(
        path=str(folder / "shared"),
        capacity_bytes=3 * trace.head.unique * STRIDE + (64 << 20),
        refresh_seconds=0.1,
        publish_seconds=0.1,
    )
    started = time.perf_counter()
    with BlockStore(Config(SETTINGS, (local, shared)), BlockLayout(BLOCK_BYTES, 1), NAMESPACE) as store:
        for number in range(len(trace.starts) - 1):
            chain = ids[trace.starts[number] : trace.starts[number + 1]]
            keys = [every[block] for block in chain.tolist()]
            _serve(store, keys, chain, region, contents)
            progress.advance(0)
        counters = store.telemetry.counters()
    loads = counters.get("blocks_total", {})
    served = {tier: n for (op, tier, end), n in loads.items() if (op, end) == ("load", "loaded")}
    written = counters.get("write_bytes_total", {})
    return Outcomes(
        served.get("nvme", 0),
        served.get("shared_fs", 0),
        counters.get("read_bytes_total", {}).get(("shared_fs",), 0),
        written.get(("nvme",), 0),
        time.perf_counter() - started,
    )


def _serve(store: BlockStore, keys: list[BlockKey], chain: Any, region: Region, contents: Any) -> None:
    """One request: what is there is loaded and looked at, the rest is saved."""
    request = store.new_request()
    match = store.lookup(keys)
    if match.blocks:
        rows = np.arange(match.blocks)
        transfer = store.load(match, region.rows(rows))
        transfer.wait()
        transfer.wait_released(WAIT_SECONDS)
        loaded = np.array([outcome is Outcome.LOADED for outcome in transfer.outcomes])
        if (contents[rows[loaded], 0] != chain[: match.blocks][loaded]).any():
            raise SystemExit("wrong bytes were served")
    if match.blocks < len(keys):
        contents[: len(keys)] = chain[:, None]
        _save(store, keys, region, request)
    else:
        store.touch(keys, request=request)
    # The next request comes later than what this one has started takes.
    if not all(tier.drain(WAIT_SECONDS) for tier in store.tiers):
        raise SystemExit("the tiers did not take the blocks in time")


def _save(store: BlockStore, keys: list[BlockKey], region: Region, request: int) -> None:
    """Until the folder has room for all: the replay outruns any engine, and grants take a refresh."""
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        transfer = store.save(keys, region.rows(np.arange(len(keys))), request=request)
        transfer.wait()
        transfer.wait_released(WAIT_SECONDS)
        if Outcome.REJECTED not in transfer.outcomes:
            return
        time.sleep(0.02)
    raise SystemExit("the shared folder gave no room")


def main() -> None:
    arguments = parser("Attach rules of the client cache on agentic traffic", "attach_rules")
    arguments.add_argument("--traces", type=Path, default=TRACES, help="a folder of conversations")
    arguments.add_argument("--block-tokens", type=int, default=1024)
    arguments.add_argument("--share", type=float, default=0.1, help="of unique blocks that fit locally")
    options = arguments.parse_args()
    trace = stream.read(options.traces, block_tokens=options.block_tokens)
    results: dict[str, Outcomes] = {}
    with Progress(transient=True) as progress:
        bar = progress.add_task("", total=len(RULES) * (len(trace.starts) - 1))
        for name, rule in RULES.items():
            progress.update(bar, description=name)
            with tempfile.TemporaryDirectory(dir=".") as folder:
                results[name] = replay(trace, rule, options.share, Path(folder), progress)
    show(
        f"{trace.head.accesses} block reads of {trace.head.unique} blocks, "
        f"a local tier for {options.share:.0%} of them",
        ["attach", "served locally", "from shared, GB", "written locally, GB", "written per local read"],
        [
            [
                name,
                f"{out.hit_ratio:.3f}",
                f"{out.shared_bytes / 1e9:.2f}",
                f"{out.local_bytes_written / 1e9:.3f}",
                f"{out.local_bytes_written / max(1, out.local_blocks * BLOCK_BYTES):.3f}",
            ]
            for name, out in results.items()
        ],
    )
    figures = {
        name: {
            "hit_ratio": out.hit_ratio,
            "local_blocks": out.local_blocks,
            "shared_blocks": out.shared_blocks,
            "shared_bytes": out.shared_bytes,
            "local_bytes_written": out.local_bytes_written,
            "seconds": out.seconds,
        }
        for name, out in results.items()
    }
    head = {"trace": trace.head.name, "block_tokens": options.block_tokens, "local_share": options.share}
    write_json(options.json, machine(["kvstrata", "numpy"]) | head | {"rules": figures})


if __name__ == "__main__":
    sys.exit(main())
