"""Slow and plain again what the package does fast: only for tests, never imported by the package."""

from __future__ import annotations

from collections.abc import Callable

from reference.arc import ReferenceArc
from reference.lirs import ReferenceLirs
from reference.lru import ReferenceLru, ReferenceLruForward
from reference.policy import ReferencePolicy

REFERENCES: dict[str, Callable[[int], ReferencePolicy]] = {
    "arc": ReferenceArc,
    "lirs": ReferenceLirs,
    "lru": ReferenceLru,
    "lru_forward": ReferenceLruForward,
}
"""By name, as in `kvstrata.policies.POLICIES`."""
