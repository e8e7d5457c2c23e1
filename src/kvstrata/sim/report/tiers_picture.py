"""The picture of a multi-tier run: who served the blocks over time, and the TTFT beside recomputing.

Draws what `simulate_tiers` found, with matplotlib off screen. Computes nothing but shares of a time slice.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstrata.errors import ConfigError
from kvstrata.sim.tiers import TiersResult
from kvstrata.sim.ttft import PERCENTS, Floats, Ttft

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SLICES = 30
SUFFIXES = (".png", ".svg", ".pdf")
COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#F0E442")
"""Of tiers, fastest first. Okabe and Ito, "Color universal design", 2008."""
COMPUTED, CACHED, INK, GRID = "#D9D9D9", "#0072B2", "#222222", "#E3E3E3"
RECOMPUTE = "#D55E00"
SHOWN_PERCENTS = (10, 50, 90, 95, 99, 99.9)
SECONDS_PER = (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0), ("seconds", 1.0))


def draw_tiers(result: TiersResult, path: Path) -> None:
    """Write the picture. Raises ConfigError for a missing package and a file ending it cannot write."""
    check_picture(path)
    import matplotlib as mpl  # noqa: PLC0415 (an extra)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    look: dict[Any, Any] = {
        "font.family": ["DejaVu Sans"], "font.size": 9.0, "text.color": INK, "text.parse_math": False,
        "axes.titlesize": 10.0, "axes.titlelocation": "left", "axes.spines.top": False,
        "axes.spines.right": False, "axes.axisbelow": True, "grid.color": GRID, "backend": "agg",
    }  # fmt: skip
    with mpl.rc_context({**mpl.rcParamsDefault, **look}):
        panels = 1 if result.ttft is None else 2
        figure = Figure(figsize=(1.0 + 5.5 * panels, 4.6), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_shares(axes[0], result)
        if result.ttft is not None:
            _draw_ttft(axes[1], result)
        figure.suptitle(
            f"{result.trace}: {', '.join(tier.name for tier in result.tiers)}", x=0.01, ha="left"
        )
        figure.savefig(path)


def check_picture(path: Path) -> None:
    """Can a picture be written to this path? Raises ConfigError that says what to do."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: a picture's name ends in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: PLC0415, F401 (an extra)
    except ImportError:
        raise ConfigError(
            "pictures need the package matplotlib, which is not installed: pip install 'kvstrata[sim]'"
        ) from None


def _draw_shares(axes: Axes, result: TiersResult) -> None:
    served = result.served
    arrival = served.arrival_seconds - (served.arrival_seconds[0] if result.requests else 0.0)
    span = float(arrival[-1]) if result.requests else 0.0
    unit, per = next(((name, size) for name, size in SECONDS_PER if span >= 2 * size), SECONDS_PER[-1])
    width = span / SLICES or 1.0
    place = np.minimum((arrival / width).astype(np.int64), SLICES - 1)
    asked = np.bincount(place, served.blocks_asked, SLICES)
    bars = [
        (tier.name, COLORS[number % len(COLORS)], np.bincount(place, served.blocks[:, number], SLICES))
        for number, tier in enumerate(result.tiers)
    ]
    bars.append(("computed", COMPUTED, asked - sum(blocks for _, _, blocks in bars)))
    middle = (np.arange(SLICES) + 0.5) * width / per
    bottom = np.zeros(SLICES)
    for number, (name, color, blocks) in enumerate(bars):
        share = 100 * np.divide(blocks, asked, out=np.zeros(SLICES), where=asked > 0)
        hatch = "//" if len(COLORS) <= number < len(result.tiers) else None
        total = 100 * float(blocks.sum()) / max(1.0, float(asked.sum()))
        axes.bar(
            middle,
            share,
            0.92 * width / per,
            bottom,
            color=color,
            hatch=hatch,
            label=f"{name} {total:.1f} %",
        )
        bottom += share
    axes.set(
        xlabel=f"time in the trace, {unit}", ylabel="blocks asked for, %", ylim=(0, 100),
        xlim=(0, max(span, width) / per),
    )  # fmt: skip
    axes.set_title("Who served the blocks", pad=46)
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, borderaxespad=0.2)


def _draw_ttft(axes: Axes, result: TiersResult) -> None:
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415 (an extra)

    assert result.ttft is not None
    for name, color, ttft in (
        ("with the tiers", CACHED, result.ttft.cached),
        ("recompute", RECOMPUTE, result.ttft.recompute),
    ):
        over = f" (overloaded: {_loads(ttft)})" if ttft.overloaded else ""
        _draw_line(axes, ttft.alone_seconds, color, "--", f"{name}, no waiting{over}")
        if ttft.queued_seconds is not None:
            _draw_line(axes, ttft.queued_seconds, color, "-", f"{name}, queued")
    wide = bool(result.ttft.cached.overloaded or result.ttft.recompute.overloaded)
    axes.set(yscale="log", xlabel="percentile of requests", ylabel="modelled TTFT, seconds")
    axes.set_xticks([_tail(percent) for percent in SHOWN_PERCENTS], [f"{p:g}" for p in SHOWN_PERCENTS])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(visible=True, which="major")
    axes.set_title("Time to first token", pad=46)
    axes.legend(
        ncols=1 if wide else 2, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, borderaxespad=0.2
    )


def _draw_line(axes: Axes, seconds: Floats, color: str, style: str, label: str) -> None:
    if not len(seconds):
        return
    percents = 100 * (1 - np.geomspace(0.9, 0.001, 200))
    values = np.percentile(seconds, percents)
    thin = style == "--"
    axes.plot(
        [_tail(p) for p in percents],
        values,
        color=color,
        linestyle=style,
        lw=1.2 if thin else 2.0,
        label=label,
    )
    marks = np.percentile(seconds, PERCENTS)
    axes.plot([_tail(p) for p in PERCENTS], marks, color=color, marker="o", ls="", ms=3.5 if thin else 5)


def _tail(percent: float) -> float:
    """Where a percentile lies on the axis: every tenfold rarer request as far again."""
    return -float(np.log10(1 - percent / 100))


def _loads(ttft: Ttft) -> str:
    return ", ".join(
        f"{server} {100 * load:.0f} %"
        if (load := ttft.utilisation[server]) is not None
        else f"{server}, all at once"
        for server in ttft.overloaded
    )
