"""`kvstrata stats`: the counters of a running process, from its metrics endpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvstrata.cli.output import JSON_OPTION, one_line, print_json, print_line, print_table
from kvstrata.cli.tier_table import print_tiers
from kvstrata.config import format_size, load_config
from kvstrata.errors import ConfigError
from kvstrata.telemetry import CATALOGUE

if TYPE_CHECKING:
    from kvstrata.cli.scrape import Page

CONFIG = "kvstrata.toml"

QUEUES = (
    ("queued_loads", "load_queue_blocks"),
    ("queued_stores", ""),
    ("held_blocks", "queue_blocks"),
    ("held_bytes", "queue_bytes"),
    ("moving_blocks", ""),
    ("staged_bytes", "staging_bytes"),
    ("attach_staged_bytes", "attach_staging_bytes"),
)
"""Gauge, and the configured bound that it is held against. Queued stores are saves, bounded by
held_blocks, and copies between tiers, moving_blocks: each lower tier's write-back is bounded by as much
again, demotion by the spare slots above, attaching by its arena."""

TIER_GAUGES = ("shared", "readable", "writable", "blocks", "used_bytes", "capacity_bytes", "pinned_blocks")

SHOWN_ELSEWHERE = (
    "lookups_total",
    "lookup_blocks_total",
    "blocks_total",
    "misses_total",
    "served_bytes_total",
    "attach_blocks_total",
    "attach_bytes_total",
)


def stats(
    url: str = typer.Argument(
        "", metavar="[URL]", help="Such as http://127.0.0.1:9400; else from --config."
    ),
    config: Path | None = typer.Option(
        None,
        "--config",
        readable=False,
        help=f"The process's configuration file.  [default: {CONFIG}]",
        show_default=False,
    ),
    as_json: bool = JSON_OPTION,
) -> None:
    """Show the counters of a running process.

    Hits and misses by reason, tiers, queues against their bounds, latencies.

    \b
    Examples:
      kvstrata stats --config kvstrata.toml
      kvstrata stats http://127.0.0.1:9400 --json | jq .lookups.block_hit_ratio
    """
    from kvstrata.cli.scrape import endpoint, fetch

    if url and config is not None:
        raise ConfigError("give a URL or --config, not both")
    if not url:
        file = config or Path(CONFIG)
        url = endpoint(load_config(file).metrics, str(file))
    found = _collect(url, fetch(url))
    if as_json:
        print_json(found)
    else:
        _show(found)


def _collect(url: str, page: Page) -> dict[str, Any]:
    """Everything that is shown, as --json prints it."""
    hits = int(page.value("lookup_blocks_total", {"result": "hit"}) or 0)
    misses = int(page.value("lookup_blocks_total", {"result": "miss"}) or 0)
    tiers = [labels.get("tier", "") for labels, _ in page.rows("tier_readable")]
    served = _served(page, tiers, hits + misses)
    return {
        "url": url,
        "lookups": {
            "requests": int(page.value("lookups_total") or 0),
            "hit_blocks": hits,
            "missed_blocks": misses,
            "block_hit_ratio": hits / (hits + misses) if hits + misses else None,
        },
        "tiers": [
            {"tier": tier}
            | {name: int(page.value(f"tier_{name}", {"tier": tier}) or 0) for name in TIER_GAUGES}
            for tier in tiers
        ],
        "traffic": served,
        "attach": [attach for tier in tiers if (attach := _attach(page, tier))],
        "blocks": _counted(page, "blocks_total"),
        "misses": _counted(page, "misses_total"),
        "queues": [
            {
                "name": name,
                "now": _whole(page.value(name)),
                "bound": _whole(page.value("bound", {"name": bound})),
            }
            for name, bound in QUEUES
        ],
        "latencies": [
            {
                "op": latency.name,
                "tier": latency.labels.get("tier"),
                "count": latency.count,
                "mean_seconds": latency.mean_seconds,
                "p50_seconds": _finite(latency.p50_seconds),
                "p99_seconds": _finite(latency.p99_seconds),
            }
            for latency in page.latencies()
        ],
        "counters": [
            {"name": name, "labels": labels, "count": count}
            for name, labels, count in page.counters()
            if name not in SHOWN_ELSEWHERE
        ],
    }


def _served(page: Page, tiers: list[str], asked: int) -> list[dict[str, Any]]:
    """What loads got from each tier, and what they did not have to get from it because of those above."""
    above = 0
    rows: list[dict[str, Any]] = []
    for tier in tiers:
        labels = {"op": "load", "tier": tier, "outcome": "loaded"}
        blocks = int(page.value("blocks_total", labels) or 0)
        size = int(page.value("served_bytes_total", {"tier": tier}) or 0)
        rows.append(
            {
                "tier": tier,
                "served_blocks": blocks,
                "served_bytes": size,
                "hit_ratio": blocks / asked if asked else None,
                "kept_off_bytes": above,
            }
        )
        above += size
    return rows


def _attach(page: Page, tier: str) -> dict[str, Any] | None:
    """What the read cache did with blocks that were read from below; None for a tier that is none."""
    blocks, sizes = (
        {labels["result"]: int(count) for labels, count in page.rows(name) if labels.get("tier") == tier}
        for name in ("attach_blocks_total", "attach_bytes_total")
    )
    offered = blocks.pop("offered", 0)
    if not offered:
        return None
    attached = blocks.pop("attached", 0)
    return {
        "tier": tier,
        "offered_blocks": offered,
        "attached_blocks": attached,
        "attached_bytes": sizes.get("attached", 0),
        "attach_ratio": attached / offered,
        "refused_blocks": blocks,
    }


def _counted(page: Page, name: str) -> list[dict[str, Any]]:
    known = dict.fromkeys(CATALOGUE[name][0], "")
    return [known | labels | {"count": int(value)} for labels, value in page.rows(name) if value]


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _finite(value: float | None) -> float | str | None:
    """JSON has no infinity: a quantile above the last bucket is the word for it."""
    return "above_last_bucket" if value is not None and math.isinf(value) else value


def _show(found: dict[str, Any]) -> None:
    lookups = found["lookups"]
    ratio = lookups["block_hit_ratio"]
    print_line(one_line(found["url"]))
    print_line(
        f"{lookups['requests']} look-ups, {lookups['hit_blocks']} blocks hit, "
        f"{lookups['missed_blocks']} missed, block hit ratio {_ratio(ratio)}"
    )
    print_line()
    print_tiers(found["tiers"], name="tier")
    print_table(
        "traffic",
        ["tier", "blocks served>", "bytes>", "hit ratio>", "kept off it>"],
        [
            (
                row["tier"],
                row["served_blocks"],
                format_size(row["served_bytes"]),
                _ratio(row["hit_ratio"]),
                format_size(row["kept_off_bytes"]),
            )
            for row in found["traffic"]
        ],
    )
    if found["attach"]:
        print_table(
            "read cache",
            ["tier", "offered>", "attached>", "bytes>", "attach ratio>", "refused"],
            [
                (
                    row["tier"],
                    row["offered_blocks"],
                    row["attached_blocks"],
                    format_size(row["attached_bytes"]),
                    _ratio(row["attach_ratio"]),
                    ", ".join(f"{reason} {count}" for reason, count in row["refused_blocks"].items())
                    or "-",
                )
                for row in found["attach"]
            ],
        )
    print_table(
        "blocks",
        ["op", "tier", "outcome", "count>"],
        [(row["op"], row["tier"], row["outcome"], row["count"]) for row in found["blocks"]],
    )
    print_table(
        "blocks not served",
        ["tier", "reason", "count>"],
        [(row["tier"], row["reason"], row["count"]) for row in found["misses"]],
    )
    print_table(
        "queues",
        ["queue", "now>", "bound>"],
        [(row["name"], _or_dash(row["now"]), _or_dash(row["bound"])) for row in found["queues"]],
    )
    print_table(
        "latencies",
        ["op", "tier", "count>", "mean>", "p50>", "p99>"],
        [
            (
                row["op"],
                row["tier"] or "",
                row["count"],
                *(_duration(row[f"{name}_seconds"]) for name in ("mean", "p50", "p99")),
            )
            for row in found["latencies"]
        ],
    )
    print_table(
        "other counters",
        ["counter", "labels", "count>"],
        [
            (row["name"], ", ".join(f"{k} {v}" for k, v in row["labels"].items()), row["count"])
            for row in found["counters"]
        ],
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _or_dash(value: int | None) -> object:
    return "-" if value is None else value


def _duration(seconds: float | str | None) -> str:
    if seconds is None:
        return "-"
    if isinstance(seconds, str):
        return "> 10 s"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
