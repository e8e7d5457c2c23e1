"""Hits of our kernels against libCacheSim's C loop: equal sizes, everything admitted, real traces.

What is compared is the block hit ratio, at capacities that are shares of the trace's unique blocks. A new
policy needs an entry in OURS, and one in `libcachesim_kit.NAMES` if it is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from kvstrata.policies import make_policy
from kvstrata.policies.base import HIT
from kvstrata.policies.belady import Belady, Future
from kvstrata.traces.open import open_trace
from kvstrata.traces.trace import Trace, TraceSource
from libcachesim_kit import OracleFile, block_hits, measurable, needs_libcachesim
from open_traces import OPEN

pytestmark = needs_libcachesim

CONVERSATION = OPEN / "mooncake" / "conversation_trace.jsonl.gz"
AGENTIC = OPEN / "agentic"
SAMPLE = Path(__file__).parents[1] / "data" / "mooncake_conversation_300.jsonl"

FRACTIONS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.4)
TOLERANCE = 1e-4


def kernel_hits(name: str) -> Callable[[Trace, int], int]:
    def hits(trace: Trace, capacity: int) -> int:
        policy = make_policy(name, trace.head.unique, capacity)
        sizes = np.ones(trace.head.unique, dtype=np.int64)
        return int(np.count_nonzero(policy.replay(trace.ids, trace.starts, sizes) == HIT))

    return hits


def belady_hits(trace: Trace, capacity: int) -> int:
    """libCacheSim's oracle lets every newcomer in."""
    oracle = Belady(Future(trace.ids, trace.depth), capacity, forced=1)
    sizes = np.ones(trace.head.unique, dtype=np.int64)
    return int(np.count_nonzero(oracle.replay(trace.ids, trace.starts, sizes) == HIT))


OURS: dict[str, Callable[[Trace, int], int]] = {
    name: kernel_hits(name) for name in ("lru_forward", "arc", "twoq", "s3fifo", "sieve")
}
OURS["belady"] = belady_hits


def in_memory(source: TraceSource) -> Trace:
    assert isinstance(source, Trace)
    return source


@cache
def whole(path: Path) -> Trace:
    """A trace, read once for all tests; skips the test where it is not there."""
    if not path.exists():
        pytest.skip(f"the real traces are not there: {Path(*path.parts[-4:])} beside the repository")
    return in_memory(open_trace(path))


def conversations() -> Iterator[Trace]:
    """The agentic conversations one by one, in 64-token blocks."""
    if not AGENTIC.exists():
        pytest.skip("the real traces are not there: shared/traces/open/agentic beside the repository")
    for path in sorted(AGENTIC.iterdir()):
        yield in_memory(open_trace(path))


def capacity_of(trace: Trace, fraction: float) -> int:
    return max(1, int(fraction * trace.head.unique))


def worst(name: str, trace: Trace, fractions: tuple[float, ...]) -> tuple[float, int]:
    """The largest difference of the block hit ratios, and how many capacities were compared."""
    capacities = sorted({capacity_of(trace, fraction) for fraction in fractions})
    compared = [capacity for capacity in capacities if measurable(name, capacity)]
    with OracleFile(trace.ids) as theirs:
        differences = [
            abs(OURS[name](trace, capacity) - theirs.hits(name, capacity)) for capacity in compared
        ]
    return max(differences, default=0) / len(trace.ids), len(compared)


@pytest.mark.parametrize("name", OURS)
def test_the_sample_in_this_repository(name: str) -> None:
    difference, compared = worst(name, whole(SAMPLE), FRACTIONS)
    assert compared >= 4
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", OURS)
def test_conversation(name: str) -> None:
    difference, compared = worst(name, whole(CONVERSATION), FRACTIONS)
    assert compared == len(FRACTIONS)
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", OURS)
def test_agentic_stream(name: str) -> None:
    """All conversations as one multi-tenant stream in 256-token blocks."""
    difference, compared = worst(name, whole(AGENTIC), (0.001, 0.05, 0.2))
    assert compared == 3
    assert difference <= TOLERANCE


def test_agentic_conversations() -> None:
    """All of them, each at two of the fractions, so that every policy meets every fraction twenty times."""
    compared = dict.fromkeys(OURS, 0)
    for number, trace in enumerate(conversations()):
        fractions = (FRACTIONS[number % 6], FRACTIONS[(number + 3) % 6])
        for name in OURS:
            difference, count = worst(name, trace, fractions)
            assert difference <= TOLERANCE, (name, trace.head.name)
            compared[name] += count
    assert min(compared.values()) >= 90


def test_block_hits_of_a_few_blocks() -> None:
    """Counted by hand: 0 and 1 come back while both are there; then 2, 3 and 0 push each other out."""
    ids = np.array([0, 1, 0, 1, 2, 3, 0])
    assert block_hits("lru_forward", ids, 2) == 2
    assert block_hits("belady", ids, 2) == 3
