"""A study as files: one HTML page that needs nothing else, pictures, and tables as Markdown and CSV.

Puts together what tables, findings, sheets and pictures make; works out nothing itself.
"""

from __future__ import annotations

import base64
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from kvstrata import __version__
from kvstrata.errors import ConfigError
from kvstrata.sim.metrics import RunResult
from kvstrata.sim.replay import SIMULATED
from kvstrata.sim.report import findings
from kvstrata.sim.report.pictures import MissCurve, Picture, draw_all
from kvstrata.sim.report.sheets import (
    Sheet,
    capacity_sheets,
    escape_markdown,
    headline_sheet,
    leaf_first_sheet,
    missing_sheet,
    run_sheet,
    shown,
    to_csv,
    to_markdown,
    trace_sheet,
    trace_sheets,
    tuning_sheets,
)
from kvstrata.sim.tables import Study, study_of

PAGE, TEXT = "report.html", "report.md"
TITLE = "Which policy should hold this traffic?"
OPEN_TABLES = 4
"""So many per-trace tables are unfolded; more are folded away."""
CURVE_POINTS_PER_DECADE = 100

WORDS = (
    ("block", "Fixed run of tokens' KV, the unit of caching."),
    ("capacity", "Size of the cache; as a share, of the unique blocks of each trace."),
    ("cell", "One trace at one capacity. A mean is compared with means over the same cells alone."),
    ("block hit ratio", "Accesses that found their block / all accesses."),
    (
        "usable-prefix hit ratio",
        "Accesses in the unbroken run of hits from a request's first block / all accesses. "
        "An engine can use no hit behind a missing block.",
    ),
    ("request hit ratio", "Requests whose every block hit / all requests."),
    ("byte hit ratio", "Bytes of the hits / bytes of all accesses."),
    (
        "amplification",
        "Bytes populated (written into the cache) / bytes of the hits. Total: sums over all runs, divided. "
        "Mean: of the runs' own ratios; small caches rule it, and one run without a hit makes it infinite.",
    ),
    ("wasted ratio", "Admits whose block was not used before it left or the trace ended / all admits."),
    ("gap to belady", "belady's block hit ratio minus the policy's, over the same cells."),
    (
        "belady",
        "Evicts what is needed again last. It knows the future, so no real policy can be it; with blocks "
        "of one size none has a higher block hit ratio.",
    ),
    ("reuse", "Accesses to blocks that were seen before / all accesses: the bound of any block hit ratio."),
    (
        "Pareto front",
        "The policies than which no other real one has at least the block hit ratio with at most the total "
        "amplification.",
    ),
    ("point", "A hundredth of a ratio: 0.75 is 5 points above 0.70."),
    ("spread", "Mean block hit ratio of the best variant of a policy minus that of its worst."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. key: its anchor. said: sentences. folded: are its tables closed at first?"""

    key: str
    title: str
    said: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    sheets: tuple[Sheet, ...] = ()
    words: tuple[tuple[str, str], ...] = ()
    folded: bool = False


def write_report(
    results: Sequence[RunResult],
    folder: Path,
    *,
    asked: Sequence[str] = (),
    title: str = TITLE,
    force: bool = False,
    curves: Sequence[MissCurve] = (),
    notes: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write a report on runs into a folder, which is made if need be; returns the files, the page first.

    asked: per run the capacity as it was written ("1%"), if known. curves: miss-ratio curves of lru, if
    known. notes: sentences on what did not run and why. Replaces files of the same name only with force.
    Raises ConfigError (nothing to report, a file in the way, a package that is missing) and OSError.
    """
    if not results:
        raise ConfigError("there are no runs to report on; make some with `kvstrata sim sweep`")
    study = study_of(results, asked)
    tables = sheets_of(study)
    _refuse_to_replace(folder, [PAGE, TEXT, *(f"{sheet.key}.csv" for sheet in tables)], force)
    pictures = draw_all(study, curves, progress)
    sections = sections_of(study, pictures, notes)
    files: dict[str, bytes] = {
        PAGE: render_page(sections, title).encode(),
        TEXT: render_markdown(sections, title).encode(),
    }
    files |= {f"{picture.name}.png": picture.png for picture in pictures}
    files |= {f"{sheet.key}.csv": to_csv(sheet).encode() for sheet in tables}
    _refuse_to_replace(folder, list(files), force)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def read_curve(path: Path) -> MissCurve:
    """A curve that `kvstrata sim curve -o FILE.json` wrote, thinned to what a picture can show.

    Raises ConfigError, naming the file, and OSError.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        points = [
            (float(p["capacity_fraction"]), 1 - float(p["block_hit_ratio"]))
            for p in data["points"]
            if p["capacity_fraction"] > 0
        ]
        name = str(data["trace"]) + ("" if data["policy"] == "lru" else f" ({data['policy']})")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: no curve ({error!r}); `kvstrata sim curve TRACE -o FILE.json` makes one"
        ) from error
    if not points:
        raise ConfigError(f"{path}: a curve without points; its trace may be empty")
    shown: dict[int, tuple[float, float]] = {}
    for fraction, miss in points:
        shown[round(math.log10(fraction) * CURVE_POINTS_PER_DECADE)] = fraction, miss
    shown.setdefault(0, (1.0, points[-1][1]))
    return MissCurve(
        name, [fraction for fraction, _ in shown.values()], [miss for _, miss in shown.values()]
    )


def _refuse_to_replace(folder: Path, names: Sequence[str], force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give another one with -o")
    for name in names:
        if not force and (folder / name).exists():
            raise ConfigError(
                f"{folder / name} exists; give another folder with -o, or --force to replace it"
            )


def sheets_of(study: Study) -> list[Sheet]:
    """The tables that become CSV files; those without a row are left out."""
    found = [
        trace_sheet(study),
        headline_sheet(study),
        *capacity_sheets(study),
        *tuning_sheets(study),
        leaf_first_sheet(study),
        missing_sheet(study),
        run_sheet(study),
    ]
    return [sheet for sheet in found if sheet.rows]


def sections_of(study: Study, pictures: Sequence[Picture], notes: Sequence[str] = ()) -> list[Section]:
    """What the page and the Markdown file say, in order; sections without content are left out."""

    def drawn(*kinds: str) -> tuple[Picture, ...]:
        return tuple(picture for kind in kinds for picture in pictures if picture.kind == kind)

    not_asked = [name for name in SIMULATED if name not in study.chosen]
    hits, prefixes = capacity_sheets(study)
    per_trace = trace_sheets(study)
    sections = [
        Section(
            "ran",
            "What was run",
            (*findings.ran(study), f"This page was made with {_versions()}."),
            sheets=(trace_sheet(study),),
        ),
        Section(
            "headline",
            "The policies compared",
            tuple(findings.overall(study)),
            drawn("headline"),
            (headline_sheet(study),),
        ),
        Section(
            "capacities",
            "Hit ratio across capacities",
            tuple(findings.across_capacities(study)),
            drawn("hit-ratio", "usable-prefix", "miss-ratio"),
            (hits, prefixes),
        ),
        Section(
            "regimes",
            "Two regimes: hit ratio against amplification",
            tuple(findings.two_regimes(study)),
            drawn("regimes"),
        ),
        Section("wasted", "Wasted admits", tuple(findings.wasted(study)), drawn("wasted")),
        Section(
            "tuning",
            "Tuning",
            tuple(findings.tuning(study)),
            drawn("tuning"),
            tuple(tuning_sheets(study)),
        ),
        Section(
            "leaf-first",
            "Leaf first",
            tuple(findings.leaf_first(study)),
            sheets=(leaf_first_sheet(study),),
        ),
        Section(
            "traces",
            "Trace by trace",
            tuple(findings.per_trace(study)),
            drawn("traces"),
            tuple(per_trace),
            folded=len(per_trace) > OPEN_TABLES,
        ),
        Section("words", "What every word means", words=WORDS),
        Section(
            "missing",
            "What did not run, and why",
            (*findings.missing(study, not_asked), *notes) or ("No cell is missing; every policy ran.",),
            sheets=(missing_sheet(study),),
            folded=True,
        ),
    ]  # fmt: skip
    return [
        section
        for section in sections
        if section.said or section.pictures or section.words or any(sheet.rows for sheet in section.sheets)
    ]


def _versions() -> str:
    found = [f"{name} {metadata.version(name)}" for name in ("numpy", "numba", "matplotlib")]
    return f"kvstrata {__version__}, Python {platform.python_version()}, {findings.listed(found)}"


def render_page(sections: Sequence[Section], title: str) -> str:
    """The HTML page; everything in it is inline. Raises ConfigError without jinja2."""
    try:
        import jinja2  # noqa: PLC0415 (an extra)
    except ImportError:
        raise ConfigError(
            "the page needs the package jinja2, which is not installed: pip install 'kvstrata[sim]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvstrata.sim.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = lambda value, kind: shown(kind, value)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    return environment.get_template("page.html.j2").render(title=title, sections=sections)


def render_markdown(sections: Sequence[Section], title: str) -> str:
    """The same sections as Markdown, with the pictures as files beside it."""
    lines = [f"# {escape_markdown(title)}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.said:
            lines += [*(f"- {escape_markdown(sentence)}" for sentence in section.said), ""]
        for picture in section.pictures:
            lines += [f"![{escape_markdown(picture.title)}]({picture.name}.png)", ""]
        for sheet in section.sheets:
            if sheet.rows:
                lines += [f"### {escape_markdown(sheet.title)}", "", to_markdown(sheet)]
        if section.words:
            lines += ["| word | means |", "|---|---|"]
            lines += [f"| {word} | {meaning} |" for word, meaning in section.words]
            lines.append("")
    return "\n".join(lines)
