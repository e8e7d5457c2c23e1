"""Slow and plain again what the package does fast: only for tests, never imported by the package."""

from __future__ import annotations

from collections.abc import Callable

from reference.arc import ReferenceArc
from reference.lru import ReferenceLru
from reference.policy import ReferencePolicy

REFERENCES: dict[str, Callable[[int], ReferencePolicy]] = {"arc": ReferenceArc, "lru": ReferenceLru}
"""By name, as in `kvstrata.policies.POLICIES`."""
