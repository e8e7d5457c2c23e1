"""Traces for tests of the simulator: real ones where they are, small ones by hand, random trees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from kvstrata.traces.builder import TraceBuilder
from kvstrata.traces.open import open_trace
from kvstrata.traces.trace import Trace, TraceSource

GIB, MIB = 2**30, 2**20


def open_real(path: Path, **options: int) -> TraceSource:
    """A real trace; the test is skipped where it is not there."""
    if not path.exists():
        pytest.skip(f"the real traces are not there: {Path(*path.parts[-4:])} beside the repository")
    return open_trace(path, **options)


def trace_of(chains: Sequence[Sequence[int]], block_bytes: int = 1, **add: object) -> Trace:
    """One request per second and chain."""
    builder = TraceBuilder("by hand", "test", 512, block_bytes)
    for second, chain in enumerate(chains):
        builder.add(float(second), list(chain), **add)
    return builder.build()


def random_tree_chains(rng: np.random.Generator, nodes: int, requests: int) -> list[list[int]]:
    """Requests for whole chains of a random tree: equal beginnings are the same blocks."""
    chains: list[list[int]] = []
    for node in range(nodes):
        parent = int(rng.integers(max(0, node - 20), node)) if node else 0
        chains.append([node] if node == 0 or rng.random() < 0.05 else [*chains[parent], node])
    return [chains[int(rng.zipf(1.2)) % nodes] for _ in range(requests)]


def tree_chains() -> st.SearchStrategy[list[list[int]]]:
    """Chains as paths of choices in a tree of three branches per node."""

    def number(paths: list[list[int]]) -> list[list[int]]:
        ids: dict[tuple[int, ...], int] = {}
        return [
            [ids.setdefault(tuple(path[: depth + 1]), len(ids)) for depth in range(len(path))]
            for path in paths
        ]

    paths = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=40)
    return paths.map(number)
