"""A hit-ratio curve as a table of points, a CSV or JSON file, or a picture. Computes no hits."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from kvstrata.config import GIB
from kvstrata.errors import ConfigError
from kvstrata.sim.curve import LruCurve

PICTURES = (".png", ".svg", ".pdf")
SUFFIXES = (".csv", ".json", *PICTURES)
SHOWN_POINTS = 200
COLUMNS = (
    "capacity_blocks", "capacity_bytes", "capacity_fraction", "block_hit_ratio",
    "usable_prefix_hit_ratio", "request_hit_ratio",
)  # fmt: skip


def point(curve: LruCurve, blocks: int) -> dict[str, Any]:
    """The exact figures at one capacity."""
    figures = (
        blocks,
        blocks * curve.block_bytes,
        blocks / curve.unique_blocks if curve.unique_blocks else 0.0,
        curve.block_hit_ratio(blocks),
        curve.usable_prefix_hit_ratio(blocks),
        curve.request_hit_ratio(blocks),
    )
    return dict(zip(COLUMNS, figures, strict=True))


def spread(curve: LruCurve, points: int = SHOWN_POINTS) -> list[int]:
    """At most that many capacities from one block to all, in about equal ratios."""
    if not curve.unique_blocks:
        return []
    return [
        int(n) for n in np.unique(np.geomspace(1, curve.unique_blocks, points).round().astype(np.int64))
    ]


def as_dict(curve: LruCurve, capacities: list[int]) -> dict[str, Any]:
    return {
        "trace": curve.trace,
        "policy": curve.policy,
        "accesses": curve.accesses,
        "requests": curve.requests,
        "unique_blocks": curve.unique_blocks,
        "block_bytes": curve.block_bytes,
        "points": [point(curve, blocks) for blocks in capacities],
    }


def check_suffix(path: Path) -> None:
    """Before anything is computed. Raises ConfigError."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: write a curve to a file that ends in {', '.join(SUFFIXES)}")
    if path.suffix.lower() in PICTURES:
        _figure()


def write_curve(curve: LruCurve, path: Path) -> None:
    """CSV and JSON hold every capacity at which a figure changes, so nothing is lost. Raises OSError."""
    kind = path.suffix.lower()
    path.parent.mkdir(parents=True, exist_ok=True)
    exact = [int(blocks) for blocks in curve.steps()]
    if kind == ".csv":
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(point(curve, blocks) for blocks in exact)
        path.write_text(text.getvalue(), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(as_dict(curve, exact)) + "\n", encoding="utf-8")
    else:
        _draw(curve, path)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)
    except ImportError:
        raise ConfigError("pictures need matplotlib; pip install 'kvstrata[sim]', or write .csv") from None
    return Figure


def _draw(curve: LruCurve, path: Path) -> None:
    figure = _figure()(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    capacities = np.unique([*spread(curve, 1000), *curve.steps()[1:]])
    size = max(1, curve.unique_blocks)
    share = capacities / size * 100
    lines = (
        ("block hits", curve.block_hits, curve.accesses, "#1f77b4", "-"),
        ("usable prefix hits", curve.prefix_hits, curve.accesses, "#d95f02", "--"),
    )
    for label, hits, of, colour, style in lines:
        ratios = hits[capacities] / max(1, of)
        axes.step(share, ratios, where="post", label=label, color=colour, linestyle=style, linewidth=1.8)
    axes.set_xscale("log")
    axes.set_xlabel("capacity, % of the unique blocks")
    axes.set_ylabel("hit ratio")
    axes.set_ylim(0, max(0.05, min(1.0, 1.1 * float(curve.block_hits[-1]) / max(1, curve.accesses))))
    axes.grid(True, which="major", alpha=0.3)
    axes.set_title(f"{curve.policy} on {curve.trace}: every capacity")
    gib = size * curve.block_bytes / GIB / 100
    top = axes.secondary_xaxis("top", functions=(lambda x: x * gib, lambda x: x / gib))
    top.set_xlabel("GiB")
    axes.xaxis.set_major_formatter("{x:g}")
    top.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(path)
