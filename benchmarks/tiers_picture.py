"""The pictures of `tiers.py`: the speed of every side as a share of fio's, ours on top.

One picture of the disk, and one of the folder in RAM beside it (NAME-ram). A panel per cell, a row per
side, a mark per block size, small blocks above large ones. Draws again from the figures without measuring:
`python benchmarks/tiers_picture.py FIGURES.json PICTURE.svg`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvstrata.config import format_size
from kvstrata.sim.report.look import GRID, INK, QUIET, look
from peers.registry import FIO_SMALL, OURS, VARIANTS

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
    """Write the pictures, .svg or .png. Nothing is drawn where fio's figures are missing."""
    for where, name in (("disk", path), ("ram", path.with_stem(f"{path.stem}-ram"))):
        rows = [row for row in result["series"] if row["where"] == where and row.get("speed_to_fio")]
        if rows:
            _draw(rows, where, name)


def _draw(rows: Sequence[Mapping[str, Any]], where: str, path: Path) -> None:
    panels = [move for move in MOVES if _of(rows, move)]
    with look():
        import matplotlib as mpl  # noqa: PLC0415 (an extra)
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415

        mpl.rcParams["svg.hashsalt"] = "kvstrata"
        sides = _sides(rows)
        sizes = sorted({row["block_bytes"] for row in rows})
        columns = min(len(panels), 2 if len(panels) == 4 else COLUMNS)
        lines = -(-len(panels) // columns)
        height = 0.9 + lines * (0.7 + 0.27 * len(sides))
        figure = Figure(figsize=(2.0 + 2.9 * columns, height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True, sharex=True)
        for number, axes in enumerate(grid.flat):
            if number >= len(panels):
                axes.set_visible(False)
                continue
            _panel(axes, _of(rows, panels[number]), sides, sizes)
            axes.set_title(f"{'folder in RAM' if where == 'ram' else 'disk'}: {panels[number][2]}")
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
            title="block size (hollow: beyond the scale)",
            loc="outside upper center",
            ncols=len(sizes),
            frameon=False,
        )
        plain = {"Date": None} if path.suffix == ".svg" else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=plain)


def _of(rows: Sequence[Mapping[str, Any]], move: Sequence[str]) -> list[Mapping[str, Any]]:
    return [row for row in rows if (row["cell"], row["beside"]) == tuple(move[:2])]


def _sides(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ours, the peers, fio without huge pages; fio itself is the line at 1."""
    names = dict.fromkeys(name for row in rows for name in row["speed_to_fio"])
    order = [OURS, *VARIANTS, FIO_SMALL]
    return [name for name in dict.fromkeys(order) if name in names]


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
                min(max(ratio, TICKS[0]), TICKS[-1]),
                place + shift,
                s=18,
                marker=_mark(sizes, row["block_bytes"]),
                facecolors=color if TICKS[0] <= ratio <= TICKS[-1] else "white",
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
