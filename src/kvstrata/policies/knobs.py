"""Parameters of policies, checked: a value that cannot work is a ConfigError that says what can."""

from __future__ import annotations

from collections.abc import Mapping

from kvstrata.errors import ConfigError


def share(policy: str, knobs: Mapping[str, float], name: str) -> float:
    """A parameter that is a share of the capacity, 0 to 1."""
    value = knobs[name]
    if not 0 <= value <= 1:
        raise ConfigError(f"policy {policy}: {name} is {value}; it is a share of the capacity, 0 to 1")
    return value


def whole(policy: str, knobs: Mapping[str, float], name: str, lowest: int, highest: int) -> int:
    """A parameter that is a whole number from lowest to highest."""
    value = knobs[name]
    if value != int(value) or not lowest <= value <= highest:
        raise ConfigError(
            f"policy {policy}: {name} is {value}; it is a whole number from {lowest} to {highest}"
        )
    return int(value)
