"""Pictures of a study, drawn with matplotlib off screen: figures and PNGs. Computes no table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvstrata.sim.report.labels import spread_out
from kvstrata.sim.report.look import (
    DASH,
    DOT,
    GRID,
    INK,
    STYLES,
    LineStyle,
    look,
    name_of,
    new_figure,
    png_of,
    style_of,
)
from kvstrata.sim.report.regimes import regimes
from kvstrata.sim.tables import (
    BLOCKS,
    ORACLE,
    Axis,
    Measure,
    Scores,
    Study,
    Tuning,
    Variant,
    block_hits,
    by_capacity,
    by_trace,
    headline,
    tunings,
    usable_prefix_hits,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 12
"""Traces in one picture of small multiples."""
TICK_GAP = 0.055
"""Least distance of two labelled capacities, as a share of the axis."""
TRACE_COLORS = ("#4477AA", "#228833", "#AA3377", "#BB5500", "#555555")
"""Of curves that are all of one policy; after Paul Tol's bright scheme."""
TRACE_LINES: tuple[LineStyle, ...] = ("-", DASH, DOT)
CHARACTER = 0.0089
"""Width of a letter of a label, as a share of the picture."""
LEAST_SHARE = 1e-4
"""Where the axis of the miss-ratio curves starts at the left, at the most."""


class MissCurve(NamedTuple):
    """Miss ratio of lru on one trace at every capacity. fractions: of the unique blocks, ascending."""

    trace: str
    fractions: Sequence[float]
    miss_ratios: Sequence[float]


@dataclass(frozen=True, slots=True)
class Picture:
    """kind: what it shows, such as "regimes". name: of its file, without the ending; the kind, and a number
    where several show the same. alt: what is to be seen, for those who cannot."""

    kind: str
    name: str
    title: str
    alt: str
    png: bytes


def _line(
    axes: Axes, variant: Variant, xs: Sequence[float], ys: Sequence[float | None], **extra: Any
) -> None:
    style = style_of(variant.policy)
    axes.plot(
        xs,
        [math.nan if y is None else y for y in ys],
        color=style.color,
        marker=style.marker or ("_" if len(xs) == 1 else ""),
        linestyle=style.line,
        markeredgecolor="white",
        zorder=4 if variant.policy == ORACLE else 3,
        **{"markeredgewidth": 0.5, **extra},
    )


def _capacity_axis(axes: Axes, axis: Axis, *, title: bool = True, tick_gap: float = TICK_GAP) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator  # noqa: PLC0415 (an extra)

    points = [point for point in axis.points if point > 0]
    if not points:
        return
    axes.set_xscale("log")
    low, high = math.log10(points[0]), math.log10(points[-1])
    pad = 0.04 * (high - low) or 0.5
    axes.set_xlim(10 ** (low - pad), 10 ** (high + pad))
    labelled: list[float] = []
    for point in reversed(points):
        place = math.log10(point)
        if not labelled or math.log10(labelled[-1]) - place >= tick_gap * (high - low):
            labelled.append(point)
    axes.xaxis.set_major_locator(FixedLocator(labelled))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(labelled, [_short(axis, point) for point in labelled])
    if title:
        axes.set_xlabel(axis.title)


def _short(axis: Axis, point: float) -> str:
    return axis.label(point) if axis.kind != BLOCKS else f"{point:,.0f}"


def _ratio_axis(axes: Axes, highest: float) -> None:
    axes.set_ylim(0, min(1.02, max(0.01, highest * 1.06)))


def _end_labels(axes: Axes, lines: Mapping[Variant, list[float | None]], xs: Sequence[float]) -> None:
    """Names and last values to the right of the axes, with a thin line to where each curve ends."""
    low, high = axes.get_ylim()
    ends = []
    for variant, ys in lines.items():
        last = max((i for i, y in enumerate(ys) if y is not None), default=None)
        if last is not None:
            y = ys[last]
            assert y is not None
            ends.append(((y - low) / (high - low), xs[last], y, variant))
    ends.sort(key=lambda end: (end[0], end[3].label))
    places = spread_out([end[0] for end in ends], 0.062, 0.0, 1.0)
    mixed = axes.get_yaxis_transform()
    for place, (_, x, y, variant) in zip(places, ends, strict=True):
        style = style_of(variant.policy)
        axes.annotate(
            "",
            xy=(x, y),
            xytext=(1.025, place),
            textcoords=axes.transAxes,
            arrowprops={
                "arrowstyle": "-", "color": style.color, "linewidth": 0.6, "alpha": 0.7,
                "shrinkA": 0, "shrinkB": 3,
            },
            annotation_clip=False,
        )  # fmt: skip
        at = low + place * (high - low)
        axes.plot(
            [1.03, 1.06, 1.09],
            [at] * 3,
            transform=mixed,
            clip_on=False,
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            markevery=[1],
            markeredgecolor="white",
            markeredgewidth=0.5,
        )
        axes.text(
            1.105, place, f"{y:.3f}  {name_of(variant)}", transform=axes.transAxes, va="center",
            fontsize=8.5, color=INK, fontweight="bold" if variant.policy == ORACLE else "normal",
        )  # fmt: skip


# The pictures


def capacity_lines(study: Study, measure: Measure, name: str) -> Figure:
    """One line per policy over the capacities, mean over the traces; belady dashed in black."""
    lines = {
        variant: row
        for variant, row in by_capacity(study, measure).items()
        if any(y is not None for y in row)
    }
    highest = max((y for row in lines.values() for y in row if y is not None), default=1.0)
    with look():
        figure = new_figure(5.0)
        axes = figure.add_axes((0.075, 0.105, 0.62, 0.86))
        for variant, row in reversed(lines.items()):
            _line(axes, variant, study.axis.points, row)
        _capacity_axis(axes, study.axis)
        _ratio_axis(axes, highest)
        axes.set_ylabel(f"{name}, mean over the traces")
        _end_labels(axes, lines, study.axis.points)
    return figure


def _bars(count: int, top_inches: float) -> tuple[Figure, Axes]:
    height = 0.55 + top_inches + 0.30 * max(1, count)
    figure = new_figure(height)
    axes = figure.add_axes((0.20, 0.55 / height, 0.63, 1 - (0.55 + top_inches) / height))
    axes.set_ylim(count - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def headline_bars(rows: Sequence[Scores]) -> Figure:
    """Mean block hit ratio per policy, and what is missing to belady behind it."""
    oracle = next((row.block_hit_ratio for row in rows if row.variant.policy == ORACLE), None)
    shown = [row for row in rows if row.variant.policy != ORACLE] or list(rows)
    with look():
        figure, axes = _bars(len(shown), 0.30 if oracle is not None else 0.1)
        for place, row in enumerate(shown):
            if row.gap_to_belady is not None and row.gap_to_belady > 0:
                axes.barh(
                    place, row.gap_to_belady, 0.62, left=row.block_hit_ratio,
                    color="#f0f0f0", edgecolor="#bdbdbd", linewidth=0.6,
                )  # fmt: skip
            axes.barh(place, row.block_hit_ratio, 0.62, color=style_of(row.variant.policy).color)
            gap = "" if row.gap_to_belady is None else f"   gap {row.gap_to_belady:.3f}"
            ends = max(row.block_hit_ratio, oracle or 0.0)
            axes.annotate(
                f"{row.block_hit_ratio:.3f}{gap}", (ends, place), (6, 0), textcoords="offset points",
                va="center", fontsize=8.5, annotation_clip=False,
            )  # fmt: skip
        highest = max([row.block_hit_ratio for row in rows], default=1.0)
        axes.set_xlim(0, max(0.01, highest) * 1.02)
        if oracle is not None:
            axes.axvline(oracle, color=STYLES[ORACLE].color, linestyle=DASH, linewidth=1.3)
            axes.annotate(
                f"belady {oracle:.3f}", (oracle, -0.6), (0, 3), textcoords="offset points",
                ha="center", va="bottom", fontsize=8.5, fontweight="bold", annotation_clip=False,
            )  # fmt: skip
        axes.set_yticks(range(len(shown)), [_cut(name_of(row.variant), 20) for row in shown])
        axes.set_xlabel("block hit ratio, mean over traces and capacities")
    return figure


def wasted_bars(rows: Sequence[Scores]) -> Figure:
    """Mean wasted ratio per policy, the lowest first."""
    shown = sorted(
        (row for row in rows if row.wasted_ratio is not None),
        key=lambda row: (row.wasted_ratio or 0.0, row.variant.label),
    )
    with look():
        figure, axes = _bars(len(shown), 0.1)
        for place, row in enumerate(shown):
            wasted = row.wasted_ratio or 0.0
            is_oracle = row.variant.policy == ORACLE
            axes.barh(
                place, wasted, 0.62, linewidth=1.2,
                color="white" if is_oracle else style_of(row.variant.policy).color,
                edgecolor=INK if is_oracle else "none", linestyle="--" if is_oracle else "-",
            )  # fmt: skip
            axes.annotate(
                f"{wasted:.3f}", (wasted, place), (6, 0), textcoords="offset points", va="center",
                fontsize=8.5, annotation_clip=False,
            )  # fmt: skip
        axes.set_xlim(0, 1)
        axes.set_yticks(range(len(shown)), [_cut(name_of(row.variant), 20) for row in shown])
        axes.set_xlabel("wasted ratio, mean over traces and capacities  (low is better)")
    return figure


def tuning_spread(study: Study) -> Figure:
    """Mean block hit ratio of every variant, and of the best real policy where the cells are the same."""
    shown = [tuning for tuning in tunings(study) if tuning.rows]
    lines = sum(len(tuning.rows) + 1 for tuning in shown)
    best = next((row for row in headline(study) if row.variant.policy != ORACLE), None)
    longest = max(len(_knobs(tuning, row.variant)) for tuning in shown for row in tuning.rows)
    left = min(0.6, max(0.3, 0.03 + CHARACTER * longest))
    with look():
        height = 1.05 + 0.24 * max(2, lines)
        figure = new_figure(height)
        axes = figure.add_axes((left, 0.55 / height, 0.92 - left, 1 - 0.90 / height))
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        place, names, highest = 0, list[tuple[int, str, bool]](), 0.0
        for tuning in shown:
            style = style_of(tuning.policy)
            names.append((place, f"{tuning.policy}: spread {tuning.spread * 100:.2f} points", True))
            place += 1
            for row in tuning.rows:
                axes.hlines(place, 0, row.block_hit_ratio, color=GRID, linewidth=0.8, zorder=1)
                axes.scatter(
                    row.block_hit_ratio,
                    place,
                    s=34,
                    marker=style.marker or "o",
                    color=style.color,
                    zorder=3,
                )
                axes.text(
                    1.02, place, f"{row.block_hit_ratio:.3f}", transform=axes.get_yaxis_transform(),
                    va="center", fontsize=8.5,
                )  # fmt: skip
                names.append((place, _knobs(tuning, row.variant), False))
                highest = max(highest, row.block_hit_ratio)
                place += 1
        axes.set_ylim(place - 0.4, -0.6)
        cells = study.comparison().cells
        if best is not None and all(tuning.comparison.cells == cells for tuning in shown):
            highest = max(highest, best.block_hit_ratio)
            axes.axvline(best.block_hit_ratio, color=style_of(best.variant.policy).color, linestyle=DASH)
            axes.annotate(
                f"{name_of(best.variant)} {best.block_hit_ratio:.3f}", (best.block_hit_ratio, -0.6), (0, 3),
                textcoords="offset points", ha="center", va="bottom", fontsize=8.5, annotation_clip=False,
            )  # fmt: skip
        axes.set_xlim(0, max(0.01, highest) * 1.04)
        axes.set_yticks([at for at, _, _ in names], [name for _, name, _ in names])
        for label, (_, _, heading) in zip(axes.get_yticklabels(), names, strict=True):
            label.set_fontweight("bold" if heading else "normal")
        axes.set_xlabel("block hit ratio, mean over traces and capacities")
    return figure


def _knobs(tuning: Tuning, variant: Variant) -> str:
    """The parameters in which the variants of the policy differ, of one of them."""
    values: dict[str, set[float]] = {}
    for row in tuning.rows:
        for name, value in row.variant.params:
            values.setdefault(name, set()).add(value)
    names = {name for name, of in values.items() if len(of) > 1}
    text = ", ".join(f"{name} {value:g}" for name, value in variant.params if name in names)
    return _cut(text or "its parameters", 62) + ("" if variant.changed else " (default)")


def trace_multiples(study: Study, traces: Sequence[str]) -> Figure:
    """One small panel per trace: block hit ratio over the capacities, the same axes in all of them."""
    columns = min(3, max(1, len(traces)))
    rows = math.ceil(len(traces) / columns)
    variants = list(by_capacity(study))
    legend_rows = math.ceil(len(variants) / 5)
    with look():
        from matplotlib.lines import Line2D  # noqa: PLC0415 (an extra)

        top = 0.05 + 0.19 * legend_rows
        height = top + 0.45 + 2.05 * rows
        figure = new_figure(height)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        figure.subplots_adjust(
            left=0.075, right=0.985, top=1 - (top + 0.25) / height, bottom=0.55 / height,
            hspace=0.28, wspace=0.08,
        )  # fmt: skip
        highest = 0.0
        for axes, trace in zip(panels, traces, strict=False):
            table = by_trace(study, trace)
            for variant, row in reversed(table.items()):
                _line(
                    axes,
                    variant,
                    study.axis.points,
                    row,
                    linewidth=1.2,
                    markersize=3.4,
                    markeredgewidth=0.2,
                )
                highest = max([highest, *(y for y in row if y is not None)])
            axes.set_title(_cut(trace, 34), fontsize=8.5)
        for axes in panels[len(traces) :]:
            axes.set_visible(False)
        for place, axes in enumerate(panels[: len(traces)]):
            _capacity_axis(axes, study.axis, title=place + columns >= len(traces), tick_gap=0.13)
            axes.xaxis.get_label().set_fontsize(8)
            axes.tick_params(labelsize=7.5, labelbottom=place + columns >= len(traces))
        _ratio_axis(panels[0], highest or 1.0)
        figure.supylabel("block hit ratio", fontsize=9, x=0.008)
        handles = [
            Line2D(
                [], [], color=style.color, marker=style.marker, linestyle=style.line, linewidth=1.4,
                markersize=4.5, label=name_of(variant),
            )
            for variant in variants
            for style in [style_of(variant.policy)]
        ]  # fmt: skip
        figure.legend(
            handles=handles, loc="upper center", ncols=5, frameon=False, fontsize=8, handlelength=2.6,
            bbox_to_anchor=(0.53, 1.0), columnspacing=1.6,
        )  # fmt: skip
    return figure


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def miss_curves(curves: Sequence[MissCurve]) -> Figure:
    """Miss ratio of lru at every capacity, one line per trace."""
    with look():
        figure = new_figure(4.4)
        axes = figure.add_axes((0.075, 0.12, 0.62, 0.84))
        lows, highs, ends = [], [], []
        for number, curve in enumerate(curves):
            color = TRACE_COLORS[number % len(TRACE_COLORS)]
            line = TRACE_LINES[number // len(TRACE_COLORS) % len(TRACE_LINES)]
            shown = [(x, y) for x, y in zip(curve.fractions, curve.miss_ratios, strict=True) if x > 0]
            xs, ys = [x for x, _ in shown], [y for _, y in shown]
            axes.step(xs, ys, where="post", color=color, linestyle=line, linewidth=1.5)
            lows.append(xs[0])
            highs.append(xs[-1])
            ends.append((ys[-1], color, line, curve.trace))
        axes.set_xscale("log")
        axes.set_xlim(max(min(lows), LEAST_SHARE), max(highs))
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value * 100:g}%")
        axes.set_xlabel("capacity, share of the unique blocks")
        axes.set_ylabel("miss ratio of lru")
        ends.sort(key=lambda end: end[0])
        places = spread_out([end[0] / 1.02 for end in ends], 0.062, 0.0, 1.0)
        for place, (y, color, line, trace) in zip(places, ends, strict=True):
            axes.plot(
                [1.0, 1.035, 1.09], [y / 1.02, place, place], transform=axes.transAxes, clip_on=False,
                color=color, linestyle=line, linewidth=1.2,
            )  # fmt: skip
            axes.text(
                1.105,
                place,
                f"{y:.3f}  {_cut(trace, 26)}",
                transform=axes.transAxes,
                va="center",
                fontsize=8.5,
            )
    return figure


# All of them


def draw_all(
    study: Study, curves: Sequence[MissCurve] = (), progress: Callable[[int, int], None] | None = None
) -> list[Picture]:
    """Every picture that the runs allow. progress: called with (done, all). Raises ConfigError without
    matplotlib."""
    rows = headline(study)
    found = [tuning for tuning in tunings(study) if tuning.rows]
    traces = [facts.name for facts in study.traces]
    pages = [traces[start : start + PANELS] for start in range(0, len(traces), PANELS)]
    names = ", ".join(variant.label for variant in by_capacity(study))
    plan: list[tuple[str, str, str, Callable[[], Figure]]] = []
    if rows:
        plan += [
            (
                "hit-ratio", "Block hit ratio across capacities",
                f"Lines of the mean block hit ratio over the capacity for {names}.",
                lambda: capacity_lines(study, block_hits, "block hit ratio"),
            ),
            (
                "usable-prefix", "Usable-prefix hit ratio across capacities",
                f"Lines of the mean usable-prefix hit ratio over the capacity for {names}.",
                lambda: capacity_lines(study, usable_prefix_hits, "usable-prefix hit ratio"),
            ),
            (
                "headline", "Mean block hit ratio and gap to belady",
                "Bars of the mean block hit ratio per policy, with what is missing to belady.",
                lambda: headline_bars(rows),
            ),
            (
                "regimes", "Hit ratio against amplification",
                "Policies by mean block hit ratio and total amplification, with their Pareto front.",
                lambda: regimes(rows),
            ),
        ]  # fmt: skip
    if any(row.wasted_ratio is not None for row in rows):
        plan.append((
            "wasted", "Wasted ratio", "Bars of the mean wasted ratio per policy.", lambda: wasted_bars(rows)
        ))  # fmt: skip
    if found:
        plan.append((
            "tuning", "Hit ratio of the variants", "Mean block hit ratio of every set of parameters.",
            lambda: tuning_spread(study),
        ))  # fmt: skip
    for number, page in enumerate(pages, start=1):
        plan.append((
            "traces" if len(pages) == 1 else f"traces-{number}", "Block hit ratio per trace",
            f"Small panels of the block hit ratio over the capacity for the traces {', '.join(page)}.",
            lambda page=page: trace_multiples(study, page),  # type: ignore[misc]
        ))  # fmt: skip
    if curves:
        plan.append((
            "miss-ratio", "Miss ratio of lru at every capacity",
            "Lines of lru's miss ratio, one per trace.",
            lambda: miss_curves(curves),
        ))  # fmt: skip
    starred = [variant.label for variant in study.variants if variant.changed]
    pictures = []
    for done, (name, title, alt, draw) in enumerate(plan):
        if progress is not None:
            progress(done, len(plan))
        kind = "traces" if name.startswith("traces-") else name
        remark = f" (* not with its default parameters: {', '.join(starred)})" if starred else ""
        pictures.append(Picture(kind, name, f"{title}{remark}", alt, png_of(draw())))
    return pictures
