"""The look of all pictures: one colour, marker and line per policy, fonts, size, PNGs. Draws nothing.

Colours are those of Okabe and Ito ("Color universal design", 2008) and Paul Tol's schemes, which people
with colour-blindness tell apart; with more than eight lines colour alone does not suffice, so marker, line
and a label at the line say it again. matplotlib is imported when something is drawn, and draws off screen.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from kvstrata.errors import ConfigError
from kvstrata.sim.tables import ORACLE, Variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 160
WIDTH_INCHES = 8.0
INK, QUIET, GRID = "#222222", "#6b6b6b", "#e3e3e3"


LineStyle: TypeAlias = Literal["-"] | tuple[float, tuple[float, ...]]


class Style(NamedTuple):
    color: str
    marker: str
    line: LineStyle


DASH, DOT, DASH_DOT = (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 1.8, 1.2, 1.8))
STYLES: Mapping[str, Style] = {
    ORACLE: Style("#000000", "", DASH),
    "lru": Style("#0072B2", "o", "-"),
    "lru_forward": Style("#56B4E9", "s", DASH),
    "arc": Style("#D55E00", "^", "-"),
    "twoq": Style("#009E73", "v", "-"),
    "clock_pro": Style("#CC79A7", "D", DASH),
    "lfu_aging": Style("#882255", "P", DASH_DOT),
    "tinylfu_slru": Style("#E69F00", "X", "-"),
    "s3fifo": Style("#332288", "<", DASH),
    "sieve": Style("#999933", ">", DASH_DOT),
    "mq": Style("#44AA99", "h", DOT),
    "gdsf": Style("#7F7F7F", "p", DASH_DOT),
    "lirs": Style("#8C510A", "d", DOT),
    "learned": Style("#CC3311", "*", "-"),
}
SPARE = (
    Style("#AA4499", "8", DASH),
    Style("#117733", "H", DOT),
    Style("#6699CC", "*", DASH_DOT),
    Style("#661100", "s", DOT),
)


def style_of(policy: str) -> Style:
    """The style of a policy; one that has none of its own always gets the same spare one."""
    return STYLES.get(policy) or SPARE[sum(policy.encode()) % len(SPARE)]


def name_of(variant: Variant) -> str:
    """The policy, with a star where its parameters are not its defaults: they would need too much room."""
    return f"{variant.policy}*" if variant.changed else variant.policy


@contextmanager
def look() -> Iterator[None]:
    """matplotlib with our look, and an error that says what to install where it is missing."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 (an extra)
    except ImportError:
        raise ConfigError(
            "pictures need the package matplotlib, which is not installed: pip install 'kvstrata[sim]'"
        ) from None
    values: Any = {
        "font.family": ["DejaVu Sans"],
        "font.size": 9.0,
        "text.color": INK,
        "text.parse_math": False,
        "axes.labelcolor": INK,
        "axes.edgecolor": QUIET,
        "axes.linewidth": 0.8,
        "axes.titlesize": 10.0,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.minor.visible": False,
        "lines.linewidth": 1.7,
        "lines.markersize": 5.0,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    }
    defaults: Any = mpl.rcParamsDefault
    with mpl.rc_context({**defaults, **values, "backend": "agg"}):
        yield


def new_figure(height_inches: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG of WIDTH_INCHES x DOTS_PER_INCH pixels; the same bytes every time."""
    with look():
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
