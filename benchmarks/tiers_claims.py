"""What the tiers should be able to do, read off the figures of one session of `tiers.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvstrata.config import KIB, MIB, format_size
from peers.registry import COPY, FIO, NO_PRIORITY, OURS

NO_PEERS = (OURS, NO_PRIORITY, COPY)
FILES = "files "
NOISE = 0.97
"""Of two that are equally fast, one is measured up to so much behind the other."""

Row = Mapping[str, Any]


def _peer(name: str) -> bool:
    return name not in NO_PEERS and not name.startswith(FIO)


def _cells(result: Row, **wanted: Any) -> list[Row]:
    return [row for row in result["series"] if all(row.get(key) == value for key, value in wanted.items())]


def _claim(
    number: str, what: str, asked: str, least: bool, limit: float, found: Iterable[float]
) -> list[Row]:
    """least: the figures must reach the limit; else they must not pass it. Nothing measured, no claim."""
    values = list(found)
    if not values:
        return []
    worst = min(values) if least else max(values)
    return [
        {
            "claim": number,
            "what": what,
            "asked": asked,
            "measured": f"{worst:.3g}",
            "holds": worst >= limit if least else worst <= limit,
        }
    ]


def claims(result: Row) -> list[Row]:
    """One row per claim and cell that was measured; the figure is the worst of its cells."""
    rows: list[Row] = []
    for cell in ("write", "read", "scattered"):
        for size in sorted({row["block_bytes"] for row in _cells(result, where="disk", cell=cell)}):
            found = _cells(result, where="disk", cell=cell, beside="nothing", block_bytes=size)
            limit = 0.95 if size >= MIB else 0.85
            ratios = [row["speed_to_fio"][OURS] for row in found if OURS in row["speed_to_fio"]]
            what = f"{cell}, {format_size(size)}, to fio"
            rows += _claim("1", what, f">= {limit}", True, limit, ratios)
    for cell in ("write", "read"):
        for row in _cells(result, where="disk", cell=cell, beside="a spinning thread"):
            if row["block_bytes"] >= MIB and OURS in row["speed_to_fio"]:
                what = f"{cell}, {format_size(row['block_bytes'])}, busy caller, to idle fio"
                rows += _claim("1b", what, ">= 0.9", True, 0.9, [row["speed_to_fio"][OURS]])
    for row in [row for where in ("disk", "ram") for row in _cells(result, where=where, beside="nothing")]:
        others = {name: ratio for name, ratio in row["ours_to"].items() if _peer(name)}
        if others:
            nearest = min(others, key=others.__getitem__)
            ahead = row["block_bytes"] in (128 * KIB, MIB) or row["cell"] == "mixed"
            limit = 1.0 if ahead else NOISE
            what = f"{row['where']} {row['cell']}, {format_size(row['block_bytes'])}, to {nearest}"
            rows += _claim("2", what, f">= {limit}", True, limit, [others[nearest]])
    for cell in ("write", "read"):
        for row in _cells(result, where="disk", cell=cell, beside="nothing", block_bytes=4 * MIB):
            cpu = {name: figures["median"] for name, figures in row["cpu_seconds_per_gb"].items()}
            peers = {name: value for name, value in cpu.items() if _peer(name)}
            if OURS in cpu and peers:
                best = min(peers, key=peers.__getitem__)
                what = f"CPU of a {cell}, 4 MiB, to {best}'s {peers[best]:.4f} s/GB"
                rows += _claim("3", what, "<= 0.5", False, 0.5, [cpu[OURS] / peers[best]])
    writes = _cells(result, where="disk", cell="write", beside="nothing")
    ratios = [ratio for row in writes for name, ratio in row["ours_to"].items() if name.startswith(FILES)]
    rows += _claim("4", "durable write, to a file per block", ">= 2", True, 2.0, ratios)
    for cell in ("write", "read"):
        counts = [row for row in result["metadata"] if row["cell"] == cell]
        calls = {row["side"]: row["metadata_calls_per_block"] for row in counts}
        files = [value for name, value in calls.items() if name.startswith(FILES)]
        if OURS in calls and files:
            what = f"metadata calls of a {cell}, a file per block to ours"
            ours = max(calls[OURS], 1 / counts[0]["blocks"])  # none at all counts as one
            rows += _claim("4", what, ">= 5", True, 5.0, [min(files) / ours])
    for cell in ("write", "read"):
        for row in _cells(result, where="memory", cell=cell, block_bytes=4 * MIB):
            found_ratios = [row["speed_to_copy"][OURS]] if OURS in row.get("speed_to_copy", {}) else []
            rows += _claim("5", f"memory {cell}, 4 MiB, to numpy's copy", ">= 0.9", True, 0.9, found_ratios)
    for row in _cells(result, where="memory", cell="views"):
        micros = 1e6 * row["seconds"]["median"]
        what = f"handing out a view of {format_size(row['block_bytes'])}, us"
        rows += _claim("5", what, "< 5", False, 5.0, [micros])
    for row in result["latency"]:
        for name in (OURS, NO_PRIORITY):
            if name in row["seconds"]:
                what = f"p99 of a load beside stores to alone, {format_size(row['block_bytes'])}, {name}"
                rows += _claim("6", what, "<= 2", False, 2.0, [row["seconds"][name]["p99_ratio"]])
    for row in result["overhead"]:
        for part in ("thread", "user"):
            micros = 1e6 * row["seconds_per_block"][part]["median"]
            who = {"thread": "calling thread", "user": "whole process in user mode"}[part]
            what = f"CPU of a load of {format_size(row['block_bytes'])}, {row['tier']} tier, {who}, us"
            rows += _claim("8", what, "< 20", False, 20.0, [micros])
    return rows
