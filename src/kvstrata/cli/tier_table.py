"""The table of tiers, as `serve --status` and `stats` print it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvstrata.cli.output import print_table
from kvstrata.config import format_size


def print_tiers(tiers: Iterable[Mapping[str, Any]], *, name: str) -> None:
    """name: under which key a tier's own word is."""
    print_table(
        "tiers",
        ["tier", "readable", "writable", "blocks>", "used>", "capacity>", "pinned>"],
        [
            (
                tier[name],
                "yes" if tier["readable"] else "NO",
                "yes" if tier["writable"] else "NO",
                tier["blocks"],
                format_size(tier["used_bytes"]),
                format_size(tier["capacity_bytes"]),
                tier["pinned_blocks"],
            )
            for tier in tiers
        ],
    )
