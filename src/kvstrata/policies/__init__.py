"""Eviction policies: kernels on arrays, compiled by Numba, the same code live and simulated."""

from __future__ import annotations

from kvstrata.policies.arc import Arc
from kvstrata.policies.base import Policy
from kvstrata.policies.lru import Lru
from kvstrata.policies.lru_forward import LruForward

__all__ = ["POLICIES", "Policy", "make_policy"]

POLICIES: dict[str, type[Policy]] = {
    "arc": Arc,
    "lru": Lru,
    "lru_forward": LruForward,
}


def make_policy(name: str, max_ids: int, capacity: int, **knobs: float) -> Policy:
    """A policy by its name in the configuration (`POLICIES` lists them)."""
    return POLICIES[name](max_ids, capacity, **knobs)
