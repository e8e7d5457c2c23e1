"""Slow and plain again what the package does fast: only for tests, never imported by the package."""

from __future__ import annotations

from collections.abc import Callable

from reference.arc import ReferenceArc
from reference.clock_pro import ReferenceClockPro
from reference.gdsf import ReferenceGdsf
from reference.lfu_aging import ReferenceLfuAging
from reference.lirs import ReferenceLirs
from reference.lru import ReferenceLru, ReferenceLruForward
from reference.mq import ReferenceMq
from reference.policy import ReferencePolicy
from reference.s3fifo import ReferenceS3Fifo
from reference.sieve import ReferenceSieve
from reference.tinylfu_slru import ReferenceTinyLfuSlru
from reference.twoq import ReferenceTwoQ

REFERENCES: dict[str, Callable[[int], ReferencePolicy]] = {
    "arc": ReferenceArc,
    "clock_pro": ReferenceClockPro,
    "gdsf": ReferenceGdsf,
    "lfu_aging": ReferenceLfuAging,
    "lirs": ReferenceLirs,
    "lru": ReferenceLru,
    "lru_forward": ReferenceLruForward,
    "mq": ReferenceMq,
    "s3fifo": ReferenceS3Fifo,
    "sieve": ReferenceSieve,
    "tinylfu_slru": ReferenceTinyLfuSlru,
    "twoq": ReferenceTwoQ,
}
"""By name, as in `kvstrata.policies.POLICIES`."""
