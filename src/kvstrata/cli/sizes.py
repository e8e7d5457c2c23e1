"""Sizes as people write them in options."""

from __future__ import annotations

from kvstrata.config import parse_size
from kvstrata.errors import ConfigError


def read_size(option: str, text: str) -> int:
    """Bytes. Raises ConfigError that names the option."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
