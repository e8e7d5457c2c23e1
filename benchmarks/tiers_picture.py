"""The picture of `tiers.py`: the speed of every side as a share of fio's, ours on top.

A panel per cell, a row per side, a mark per block size, small blocks above large ones. Draws again from
the figures without measuring: `python benchmarks/tiers_picture.py FIGURES.json PICTURE.svg`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvstrata.config import format_size
from kvstrata.sim.report.look import GRID, INK, QUIET, look
from peers.registry import OURS

MOVES = (
    ("write", "nothing", "write until durable"),
    ("read", "nothing", "cold read"),
    ("scattered", "nothing", "cold read, scattered"),
    ("mixed", "nothing", "70 % loads, 30 % stores"),
    ("write", "a spinning thread", "write, busy caller"),
    ("read", "a spinning thread", "read, busy caller"),
)
COLORS = ("#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00")
"""Of block sizes, smallest first. Okabe and Ito, "Color universal design", 2008."""
MARKS = ("o", "s", "D", "^", "v")
COLUMNS = 3
TICKS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
REACH = 0.32
"""Of a row's height, above and below its middle, for the marks of different sizes."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture, .svg or .png. Nothing is drawn where fio's figures are missing."""
    panels = [(where, *move) for where in ("disk", "ram") for move in MOVES if _rows(result, where, move)]
    if not panels:
        return
    with look():
        import matplotlib as mpl  # noqa: PLC0415 (an extra)
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415

        mpl.rcParams["svg.hashsalt"] = "kvstrata"
        sides = _sides(result)
        sizes = sorted({row["block_bytes"] for row in result["series"] if row.get("speed_to_fio")})
        columns = min(COLUMNS, len(panels))
        lines = -(-len(panels) // columns)
        height = 0.9 + lines * (0.75 + 0.33 * len(sides))
        figure = Figure(figsize=(2.0 + 2.9 * columns, height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True, sharex=True)
        for number, axes in enumerate(grid.flat):
            if number >= len(panels):
                axes.set_visible(False)
                continue
            where, cell, beside, title = panels[number]
            _panel(axes, _rows(result, where, (cell, beside, title)), sides, sizes)
            axes.set_title(f"{'RAM folder' if where == 'ram' else 'disk'}: {title}")
            axes.tick_params(labelbottom=True)
            if number + columns >= len(panels):
                axes.set_xlabel("speed / fio's")
        handles = [
            grid.flat[0].scatter([], [], s=30, marker=_mark(sizes, size), color=_color(sizes, size))
            for size in sizes
        ]
        figure.legend(
            handles,
            [format_size(size).replace(".0", "") for size in sizes],
            title=f"block size (hollow: below {TICKS[0]:g})",
            loc="outside upper center",
            ncols=len(sizes),
            frameon=False,
        )
        plain = {"Date": None} if path.suffix == ".svg" else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=plain)


def _rows(result: Mapping[str, Any], where: str, move: Sequence[str]) -> list[Mapping[str, Any]]:
    return [
        row
        for row in result["series"]
        if row.get("speed_to_fio") and (row["where"], row["cell"], row.get("beside")) == (where, *move[:2])
    ]


def _sides(result: Mapping[str, Any]) -> list[str]:
    """Ours, then the others in the order of the results; fio itself is the line at 1."""
    names = dict.fromkeys(name for row in result["series"] for name in row.get("speed_to_fio", {}))
    return [OURS, *(name for name in names if name not in (OURS, "fio"))]


def _color(sizes: Sequence[int], size: int) -> str:
    return COLORS[sizes.index(size) % len(COLORS)]


def _mark(sizes: Sequence[int], size: int) -> str:
    return MARKS[sizes.index(size) % len(MARKS)]


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], sides: list[str], sizes: Sequence[int]) -> None:
    axes.grid(False, axis="y")
    axes.axhspan(-0.5, 0.5, color=GRID, alpha=0.6, linewidth=0, zorder=0)
    for place in range(1, len(sides)):
        axes.axhline(place + 0.5, color=GRID, linewidth=0.7, zorder=0)
    axes.axvline(1.0, color=INK, linewidth=1.0, linestyle=(0, (5, 2)), zorder=1)
    for row in rows:
        number = sizes.index(row["block_bytes"])
        shift = (number / max(1, len(sizes) - 1) - 0.5) * 2 * REACH
        for place, side in enumerate(sides):
            ratio = row["speed_to_fio"].get(side)
            if ratio is None:
                continue
            color = _color(sizes, row["block_bytes"])
            axes.scatter(
                max(ratio, TICKS[0]),
                place + shift,
                s=22,
                marker=_mark(sizes, row["block_bytes"]),
                facecolors=color if ratio >= TICKS[0] else "white",
                edgecolors=color,
                linewidths=1.0,
                zorder=3,
                clip_on=False,
            )
    axes.set_xscale("log")
    axes.set_xlim(TICKS[0] * 0.8, TICKS[-1] * 1.1)
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_xticks([], minor=True)
    axes.set_ylim(len(sides) - 0.5, -0.5)
    axes.set_yticks(range(len(sides)), sides)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    for label in axes.get_yticklabels():
        if label.get_text() == OURS:
            label.set_fontweight("bold")
    axes.spines["bottom"].set_color(QUIET)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
