"""Figures of the eviction study that started this one, as it prints them ("the seed").

Xinnor, "Enhancing Lustre for Modern AI with Disaggregated Storage and ML-Tuned Caching Policies": its
pages on the set-up, the headline comparison, the two regimes and tuning. Nothing of ours is in this file.
"""

from __future__ import annotations

from typing import NamedTuple

TITLE = "Xinnor, *Enhancing Lustre for Modern AI with Disaggregated Storage and ML-Tuned Caching Policies*"


class SeedScore(NamedTuple):
    """Means over 30 traces at 6 capacities."""

    name: str
    hit_ratio: float
    amplification: float


POLICIES = {
    "belady": SeedScore("belady", 0.827, 0.254),
    "arc": SeedScore("arc", 0.758, 0.430),
    "lru": SeedScore("lru", 0.756, 0.430),
    "lru_forward": SeedScore("lru", 0.756, 0.430),
    "twoq": SeedScore("2q", 0.755, 0.434),
    "clock_pro": SeedScore("clock_pro", 0.737, 0.510),
    "lfu_aging": SeedScore("lfu_aging", 0.556, 1.106),
    "tinylfu_slru": SeedScore("tinylfu_slru", 0.430, 0.035),
}
"""By our name. It has one LRU, a "byte-LRU baseline"; its figures stand beside both of ours."""

ORACLE_HIT_RATIO = POLICIES["belady"].hit_ratio

VARIANTS = {
    "tinylfu_p10": 0.423,
    "tinylfu_p20": 0.430,
    "tinylfu_p20_w65k": 0.438,
    "tinylfu_p50": 0.428,
    "tinylfu_p80": 0.426,
    "lfu_e1k_s1": 0.544,
    "lfu_e5k_s1": 0.553,
    "lfu_e10k_s1": 0.556,
    "lfu_e10k_s2": 0.556,
    "lfu_e10k_s3": 0.556,
    "lfu_e50k_s1": 0.561,
}
"""Mean hit ratio by the name of the variant."""

SETUP = {
    "traces": "30",
    "what a trace is": "20 minutes of a model and phase on Lustre with PCC, captured",
    "accesses": "8.0 M events",
    "working set": "281 GB",
    "policies": "7",
    "capacities": "6 fractions",
    "runs": "1,260",
    "runs of 13 variants": "2,340",
}
