"""Eviction policies: kernels on arrays, compiled by Numba, the same code live and simulated."""

from __future__ import annotations

from kvstrata.policies.arc import Arc
from kvstrata.policies.base import Policy
from kvstrata.policies.clock_pro import ClockPro
from kvstrata.policies.gdsf import Gdsf
from kvstrata.policies.lfu_aging import LfuAging
from kvstrata.policies.lirs import Lirs
from kvstrata.policies.lru import Lru
from kvstrata.policies.lru_forward import LruForward
from kvstrata.policies.mq import Mq
from kvstrata.policies.s3fifo import S3Fifo
from kvstrata.policies.sieve import Sieve
from kvstrata.policies.tinylfu_slru import TinyLfuSlru
from kvstrata.policies.twoq import TwoQ

__all__ = ["POLICIES", "Policy", "make_policy"]

POLICIES: dict[str, type[Policy]] = {
    "arc": Arc,
    "clock_pro": ClockPro,
    "gdsf": Gdsf,
    "lfu_aging": LfuAging,
    "lirs": Lirs,
    "lru": Lru,
    "lru_forward": LruForward,
    "mq": Mq,
    "s3fifo": S3Fifo,
    "sieve": Sieve,
    "tinylfu_slru": TinyLfuSlru,
    "twoq": TwoQ,
}


def make_policy(name: str, max_ids: int, capacity: int, **knobs: float) -> Policy:
    """A policy by its name in the configuration (`POLICIES` lists them)."""
    return POLICIES[name](max_ids, capacity, **knobs)
