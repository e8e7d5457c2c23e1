"""The picture of the two regimes: hit ratio against amplification, and its Pareto front.

Where most policies lie close together, that part is drawn once more, enlarged, and named there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstrata.sim.report.labels import Box, needs_leader, place_labels
from kvstrata.sim.report.look import DOT, DOTS_PER_INCH, INK, QUIET, look, name_of, new_figure, style_of
from kvstrata.sim.tables import ORACLE, Scores, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEAR = 0.09
"""Policies within this share of both axes of each other are close together."""
CROWD = 4
"""So many of them are enlarged."""
X_TITLE = "block hit ratio, mean  (right is better)"
Y_TITLE = "amplification, total populated / total hit bytes  (low is better)"


def regimes(rows: Sequence[Scores]) -> Figure:
    """Mean block hit ratio against total amplification of every policy that has one."""
    finite = [row for row in rows if 0 < row.amplification < math.inf]
    front = [row for row in pareto_front(rows) if row.amplification > 0]
    crowd = _crowd(finite)
    with look():
        figure = new_figure(5.0)
        axes = figure.add_axes((0.09, 0.105, 0.47 if crowd else 0.88, 0.84))
        axes.set_yscale("log")
        _pad(axes, finite, log=True)
        _number_log_axis(axes)
        _draw(axes, finite, front)
        axes.set_xlabel(X_TITLE)
        axes.set_ylabel(Y_TITLE)
        if crowd:
            zoom = figure.add_axes((0.645, 0.105, 0.335, 0.84))
            _pad(zoom, crowd, log=False)
            _draw(zoom, crowd, front)
            zoom.set_xlabel(X_TITLE)
            zoom.set_title("enlarged", color=QUIET, fontsize=8.5)
            for spine in zoom.spines.values():
                spine.set_visible(True)
                spine.set_color(QUIET)
            _name_points(zoom, crowd, front)
            _frame(axes, crowd)
        _name_points(axes, [row for row in finite if row not in crowd], front, also=crowd)
        _note(figure, rows, finite, front)
    return figure


def _crowd(rows: Sequence[Scores]) -> list[Scores]:
    """The real policies around the one that has the most close neighbours; none if they are few, or all."""
    spots = {row.variant: (row.block_hit_ratio, math.log10(row.amplification)) for row in rows}
    if len(spots) <= CROWD:
        return []
    wide, tall = (max(axis) - min(axis) or 1.0 for axis in zip(*spots.values(), strict=True))

    def neighbours(row: Scores) -> list[Scores]:
        x, y = spots[row.variant]
        return [
            other
            for other in rows
            if other.variant.policy != ORACLE
            and abs(spots[other.variant][0] - x) <= NEAR * wide
            and abs(spots[other.variant][1] - y) <= NEAR * tall
        ]

    crowd = max((neighbours(row) for row in rows if row.variant.policy != ORACLE), key=len, default=[])
    return crowd if CROWD <= len(crowd) < len(rows) else []


def _draw(axes: Axes, rows: Sequence[Scores], front: Sequence[Scores]) -> None:
    if len(front) > 1:
        axes.step(
            [row.block_hit_ratio for row in front], [row.amplification for row in front],
            where="post", color=QUIET, linewidth=1.2, linestyle=DOT, zorder=2,
        )  # fmt: skip
    for row in rows:
        style = style_of(row.variant.policy)
        on_front = row in front
        axes.scatter(
            row.block_hit_ratio,
            row.amplification,
            s=70 if on_front else 46 if style.marker else 110,
            marker=style.marker or "*",
            color=style.color,
            edgecolors=INK if on_front else "white",
            linewidths=1.1 if on_front else 0.5,
            zorder=4,
        )


def _pad(axes: Axes, rows: Sequence[Scores], *, log: bool) -> None:
    """Limits with room for labels around the points."""
    if not rows:
        axes.set_xlim(0, 1)
        axes.set_ylim(0.1, 10)
        return
    xs = [row.block_hit_ratio for row in rows]
    ys = [math.log10(row.amplification) if log else row.amplification for row in rows]
    wide, tall = max(xs) - min(xs) or 0.02, max(ys) - min(ys) or 0.15
    side = 0.16 if log else 0.24
    axes.set_xlim(max(0, min(xs) - side * wide), min(1.0 + 0.02 * wide, max(xs) + side * wide))
    low, high = min(ys) - 0.13 * tall, max(ys) + 0.13 * tall
    axes.set_ylim(10**low if log else low, 10**high if log else high)


def _number_log_axis(axes: Axes) -> None:
    from matplotlib.ticker import NullFormatter  # noqa: PLC0415 (an extra)

    low, high = axes.get_ylim()
    shown = (1, 2, 3, 5) if high / low > 5 else tuple(range(1, 10))

    def number(value: float, _position: float | None) -> str:
        digit = round(value / 10 ** math.floor(math.log10(value))) if value > 0 else 0
        return f"{value:.6g}" if digit in shown else ""

    axes.yaxis.set_major_formatter(number)
    axes.yaxis.set_minor_formatter(number if high / low < 300 else NullFormatter())


def _frame(axes: Axes, crowd: Sequence[Scores]) -> None:
    """Around what is enlarged."""
    from matplotlib.patches import Rectangle  # noqa: PLC0415 (an extra)

    box = _crowd_box(axes, crowd)
    corner = axes.transAxes.inverted().transform([(box.left, box.low), (box.right, box.high)])
    (x0, y0), (x1, y1) = corner
    axes.add_patch(
        Rectangle(
            (x0, y0), x1 - x0, y1 - y0, transform=axes.transAxes, fill=False, edgecolor=QUIET,
            linewidth=0.8, zorder=3,
        )
    )  # fmt: skip
    axes.text(
        x0, y1 + 0.008, "enlarged", transform=axes.transAxes, fontsize=8, color=QUIET, va="bottom",
        zorder=5, bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.3},
    )  # fmt: skip


def _crowd_box(axes: Axes, crowd: Sequence[Scores]) -> Box:
    """In pixels."""
    spots = [axes.transData.transform((row.block_hit_ratio, row.amplification)) for row in crowd]
    xs, ys = [float(x) for x, _ in spots], [float(y) for _, y in spots]
    return Box(min(xs), min(ys), max(xs), max(ys)).grown(8 * DOTS_PER_INCH / 72)


def _name_points(
    axes: Axes, rows: Sequence[Scores], front: Sequence[Scores], also: Sequence[Scores] = ()
) -> None:
    """A label beside every point, with a thin line where it had to go further away.

    also: what is framed and named elsewhere; no label covers its frame.
    """
    dot = DOTS_PER_INCH / 72
    points = [(row.block_hit_ratio, row.amplification) for row in rows]
    pixels = [tuple(map(float, axes.transData.transform(point))) for point in points]
    texts = [
        axes.annotate(
            name_of(row.variant) + (" (oracle)" if row.variant.policy == ORACLE else ""),
            point, (0, 0), textcoords="offset points", fontsize=8.5, ha="left", va="bottom",
            fontweight="bold" if row in front else "normal", zorder=5,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.3},
        )
        for row, point in zip(rows, points, strict=True)
    ]  # fmt: skip
    extents = [text.get_window_extent() for text in texts]
    taken = []
    if also:
        box = _crowd_box(axes, also)
        taken.append(Box(box.left, box.low, max(box.right, box.left + 55 * dot), box.high + 13 * dot))
    spots = place_labels(
        [(x, y) for x, y in pixels],
        [(box.width, box.height) for box in extents],
        Box(*axes.get_window_extent().extents),
        4.5 * dot,
        taken,
    )
    for text, point, (x, y), spot in zip(texts, points, pixels, spots, strict=True):
        text.xyann = ((spot.left - x) / dot, (spot.low - y) / dot)
        if needs_leader(spot, (x, y)):
            near_x, near_y = spot.nearest(x, y)
            axes.annotate(
                "", point, ((near_x - x) / dot, (near_y - y) / dot), textcoords="offset points",
                arrowprops={
                    "arrowstyle": "-", "color": QUIET, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4,
                },
            )  # fmt: skip


def _note(
    figure: Figure, rows: Sequence[Scores], finite: Sequence[Scores], front: Sequence[Scores]
) -> None:
    notes = ["bold, outlined, dotted line: Pareto front of the real policies"] if front else []
    left_out = [name_of(row.variant) for row in rows if row not in finite]
    if left_out:
        notes.append(f"no amplification to show: {', '.join(left_out)}")
    figure.text(0.09, 0.965, "; ".join(notes), fontsize=8, color=QUIET)
