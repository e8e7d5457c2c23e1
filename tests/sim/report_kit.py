"""Runs written by hand, whose figures can be worked out on paper, and real ones of a small trace."""

from __future__ import annotations

from pathlib import Path

from kvstrata.sim.capacity import resolve
from kvstrata.sim.metrics import RunResult
from kvstrata.sim.replay import Workload, simulate
from kvstrata.traces.open import open_trace

SAMPLE = Path(__file__).parent.parent / "data" / "mooncake_conversation_300.jsonl"
TWELVE = (
    "lru", "lru_forward", "arc", "twoq", "clock_pro", "lfu_aging", "tinylfu_slru", "s3fifo", "sieve", "mq",
    "gdsf", "lirs",
)  # fmt: skip
LFU = {"age_every": 10_000.0, "age_shift": 1.0}


def run_of(
    policy: str,
    hit_ratio: float = 0.5,
    *,
    trace: str = "a",
    fraction: float = 0.01,
    unique: int = 1000,
    accesses: int = 2000,
    prefix: float | None = None,
    hit_bytes: int | None = None,
    populated: int = 1000,
    wasted: float | None = 0.5,
    params: dict[str, float] | None = None,
) -> RunResult:
    """Blocks of one byte. fraction is cut to whole blocks, as a run does."""
    blocks = int(fraction * unique + 1e-9)
    hits = round(hit_ratio * accesses) if hit_bytes is None else hit_bytes
    return RunResult(
        trace=trace,
        policy=policy,
        params=params or {},
        capacity_fraction=blocks / unique,
        capacity_blocks=blocks,
        capacity_bytes=blocks,
        accesses=accesses,
        requests=100,
        unique_blocks=unique,
        block_hit_ratio=hit_ratio,
        usable_prefix_hit_ratio=hit_ratio if prefix is None else prefix,
        mean_usable_prefix_hit_ratio=hit_ratio,
        request_hit_ratio=hit_ratio / 2,
        byte_hit_ratio=hit_ratio,
        amplification=populated / hits if hits else None,
        wasted_ratio=wasted,
        admits=populated,
        evictions=0,
        hit_bytes=hits,
        populated_bytes=populated,
        recompute_tokens_saved=None,
        seconds=0.1,
    )


def twelve_runs(traces: int = 2, fractions: tuple[float, ...] = (0.001, 0.01, 0.1)) -> list[RunResult]:
    """Every policy and the oracle on several traces; one policy with variants."""
    runs = []
    for number in range(traces):
        for place, fraction in enumerate(fractions):
            cell = {
                "trace": f"trace-{number}",
                "fraction": fraction,
                "unique": 10_000 + 7 * number,
                "accesses": 40_000,
            }
            runs.append(run_of("belady", 0.30 + 0.2 * place, populated=300, wasted=0.1, **cell))
            for order, policy in enumerate(TWELVE):
                params = LFU if policy == "lfu_aging" else None
                hit_ratio = 0.25 + 0.2 * place - 0.004 * order**1.5
                runs.append(run_of(policy, hit_ratio, params=params, wasted=0.3 + order / 20, **cell))
            for every in (1_000.0, 50_000.0):
                params = {**LFU, "age_every": every}
                runs.append(run_of("lfu_aging", 0.2 + 0.2 * place + every / 5e6, params=params, **cell))
    return runs


def sample_runs() -> list[RunResult]:
    """Real figures: 300 requests of a real trace through three policies and the oracle."""
    workload = Workload(open_trace(SAMPLE), "conversation-300")
    return [
        simulate(workload, policy, resolve(capacity, workload.footprint))
        for policy in ("lru", "lru_forward", "arc", "belady")
        for capacity in ("1%", "10%", "40%")
    ]
