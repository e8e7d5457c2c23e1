"""The tables of a study as rows and columns, as Markdown and as CSV. Computes no figure of its own."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from kvstrata.sim.metrics import RunResult
from kvstrata.sim.tables import (
    FRACTION,
    ORACLE,
    Measure,
    Study,
    Variant,
    block_hits,
    by_capacity,
    by_trace,
    headline,
    leaf_first_gains,
    pareto_front,
    tunings,
    usable_prefix_hits,
)

TEXT, COUNT, RATIO, AMPLIFICATION = "text", "count", "ratio", "amplification"
Value: TypeAlias = str | int | float | None


class Column(NamedTuple):
    """kind: how its values are written, TEXT, COUNT, RATIO or AMPLIFICATION. about: one line for people."""

    name: str
    kind: str
    about: str = ""


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table for people and machines. key: its file name and anchor."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]


def shown(kind: str, value: Value) -> str:
    """A value as people read it. None is what was not run or is not defined, a dash."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if math.isinf(value):
        return "∞"
    if kind == COUNT:
        return f"{value:,.0f}"
    if kind == AMPLIFICATION:
        return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
    return f"{value:.3f}"


# One function per table


def trace_sheet(study: Study) -> Sheet:
    columns = (
        Column("trace", TEXT),
        Column("requests", COUNT),
        Column("accesses", COUNT, "block accesses"),
        Column("unique blocks", COUNT),
        Column("reuse", RATIO, "share of accesses to blocks seen before: no block hit ratio can be higher"),
        Column("runs", COUNT, "runs of it in this report"),
    )
    rows = tuple(
        (facts.name, facts.requests, facts.accesses, facts.unique_blocks, facts.reuse, facts.runs)
        for facts in study.traces
    )
    return Sheet("traces", "Traces", columns, rows)


def headline_sheet(study: Study) -> Sheet:
    rows = headline(study)
    front = {row.variant for row in pareto_front(rows)}
    columns = (
        Column("policy", TEXT),
        Column("block hit ratio", RATIO, "mean of the runs"),
        Column("usable-prefix hit ratio", RATIO, "mean of the runs"),
        Column("gap to belady", RATIO, "belady's block hit ratio minus this one's"),
        Column("amplification, total", AMPLIFICATION, "all populated bytes / all hit bytes"),
        Column(
            "amplification, mean", AMPLIFICATION, "mean of the runs' ratios; infinite if one had no hit"
        ),
        Column("wasted ratio", RATIO, "mean of the runs"),
        Column("request hit ratio", RATIO, "mean of the runs"),
        Column("byte hit ratio", RATIO, "mean of the runs"),
        Column("runs", COUNT),
        Column("runs without a hit", COUNT),
        Column("Pareto front", TEXT, "no other real policy hits as much with as little amplification"),
    )
    return Sheet(
        "headline",
        "Policies",
        columns,
        tuple(
            (
                row.variant.label,
                row.block_hit_ratio,
                row.usable_prefix_hit_ratio,
                None if row.variant.policy == ORACLE else row.gap_to_belady,
                row.amplification,
                row.mean_amplification,
                row.wasted_ratio,
                row.request_hit_ratio,
                row.byte_hit_ratio,
                row.cells,
                row.runs_without_hit,
                "yes" if row.variant in front else "",
            )
            for row in rows
        ),
    )


def capacity_sheets(study: Study) -> tuple[Sheet, Sheet]:
    """Block and usable-prefix hit ratio, policy x capacity, means over the traces."""
    return (
        _over_capacities(study, "hit-ratio", "Block hit ratio by capacity", block_hits),
        _over_capacities(study, "usable-prefix", "Usable-prefix hit ratio by capacity", usable_prefix_hits),
    )


def _over_capacities(study: Study, key: str, title: str, measure: Measure) -> Sheet:
    return Sheet(key, title, _capacity_columns(study), _rows(by_capacity(study, measure).items()))


def trace_sheets(study: Study) -> list[Sheet]:
    """Block hit ratio, policy x capacity, one table per trace."""
    return [
        Sheet(
            f"trace-{number}",
            facts.name,
            _capacity_columns(study),
            _rows(by_trace(study, facts.name).items()),
        )
        for number, facts in enumerate(study.traces, start=1)
    ]


def _capacity_columns(study: Study) -> tuple[Column, ...]:
    return (
        Column("policy", TEXT),
        *(Column(study.axis.label(point), RATIO) for point in study.axis.points),
    )


def _rows(items: Iterable[tuple[Variant, Sequence[float | None]]]) -> tuple[tuple[Value, ...], ...]:
    return tuple((variant.label, *row) for variant, row in items)


def tuning_sheets(study: Study) -> list[Sheet]:
    """The variants of a policy, one table per policy that has several."""
    sheets = []
    for tuning in tunings(study):
        knobs = sorted({name for row in tuning.rows for name, _ in row.variant.params})
        columns = (
            *(Column(knob, TEXT) for knob in knobs),
            Column("block hit ratio", RATIO, "mean of the runs"),
            Column("usable-prefix hit ratio", RATIO, "mean of the runs"),
            Column("amplification, total", AMPLIFICATION, "all populated bytes / all hit bytes"),
            Column("wasted ratio", RATIO, "mean of the runs"),
            Column("runs", COUNT),
            Column("default", TEXT),
        )
        rows = tuple(
            (
                *(dict(row.variant.params).get(knob) for knob in knobs),
                row.block_hit_ratio,
                row.usable_prefix_hit_ratio,
                row.amplification,
                row.wasted_ratio,
                row.cells,
                "" if row.variant.changed else "yes",
            )
            for row in tuning.rows
        )
        rows = _knobs_as_text(rows, len(knobs))
        sheets.append(Sheet(f"tuning-{tuning.policy}", f"Variants of {tuning.policy}", columns, rows))
    return sheets


def _knobs_as_text(rows: tuple[tuple[Value, ...], ...], knobs: int) -> tuple[tuple[Value, ...], ...]:
    return tuple(
        tuple(
            f"{value:g}" if place < knobs and isinstance(value, int | float) else value
            for place, value in enumerate(row)
        )
        for row in rows
    )


def leaf_first_sheet(study: Study) -> Sheet:
    columns = (
        Column("capacity", TEXT),
        Column("lru", RATIO, "mean usable-prefix hit ratio, leaves touched first"),
        Column("lru_forward", RATIO, "mean usable-prefix hit ratio, roots touched first"),
        Column("gain", RATIO),
        Column("traces", COUNT),
    )
    rows = tuple(
        (study.axis.label(gain.point), gain.lru, gain.lru_forward, gain.gain, gain.traces)
        for gain in leaf_first_gains(study)
    )
    return Sheet("leaf-first", "What leaf first gains lru", columns, rows)


def missing_sheet(study: Study) -> Sheet:
    """Every cell that kept a policy or a variant out of a mean, and every cell that is in no mean."""
    found: dict[tuple[str, str, str], str] = {}
    comparisons = [study.comparison(), *(tuning.comparison for tuning in tunings(study))]
    for comparison in comparisons:
        for variant, cells in comparison.missing.items():
            for cell in cells:
                key = (variant.label, cell.trace, study.axis.label(cell.point))
                found[key] = "not run; the policy has no mean"
        for cell, variants in comparison.left_out.items():
            for variant in variants:
                key = (variant.label, cell.trace, study.axis.label(cell.point))
                found.setdefault(key, "run, but by few; in no mean")
    columns = (
        Column("policy", TEXT),
        Column("trace", TEXT),
        Column("capacity", TEXT),
        Column("what", TEXT),
    )
    return Sheet("missing", "Cells", columns, tuple((*key, what) for key, what in found.items()))


def run_sheet(study: Study) -> Sheet:
    """Every run with all its figures, for machines."""
    names = [field.name for field in dataclasses.fields(RunResult)]
    rows = []
    for variant, cells in study.runs.items():
        for cell, run in cells.items():
            values = run.as_dict()
            values["trace"] = cell.trace
            values["params"] = " ".join(f"{name}={value:g}" for name, value in variant.params)
            rows.append((*(values[name] for name in names), cell.point))
    unit = "asked_fraction" if study.axis.kind == FRACTION else f"asked_{study.axis.kind}"
    return Sheet("runs", "Runs", tuple(Column(name, TEXT) for name in (*names, unit)), tuple(rows))


# Files


def to_markdown(sheet: Sheet) -> str:
    """A table of Markdown, numbers to the right."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = [
        line(escape_markdown(column.name) for column in sheet.columns),
        "|" + "|".join("---" if column.kind == TEXT else "---:" for column in sheet.columns) + "|",
    ]
    for row in sheet.rows:
        lines.append(
            line(
                escape_markdown(shown(column.kind, value))
                for column, value in zip(sheet.columns, row, strict=True)
            )
        )
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Text from outside, on one line, that is no markup."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    return "".join(f"\\{c}" if c in "\\|`*[]<>~" else c for c in flat).replace("&", "&amp;")


def to_csv(sheet: Sheet) -> str:
    """All digits; empty where there is no value, `inf` where a ratio is infinite."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(column.name for column in sheet.columns)
    for row in sheet.rows:
        writer.writerow("" if value is None else value for value in row)
    return out.getvalue()
