"""One Hypothesis profile for the whole suite: repeatable, and never about time."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "kvstrata",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kvstrata")
