"""What the figures of a study say, in sentences made from them. No sentence is there without its figure.

Differences of ratios are in points: 0.75 is 5 points above 0.70.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvstrata.sim.tables import (
    ORACLE,
    Cell,
    Scores,
    Study,
    Variant,
    by_capacity,
    by_trace,
    headline,
    leaf_first_gains,
    pareto_front,
    tunings,
)

TIE_POINTS = 1.0
"""Policies that lie within this of the best are told in one breath."""
SATURATED_POINTS = 1.0
"""A capacity that is this near to the hit ratio of the largest one is as good."""
NO_EFFECT_POINTS = 0.1
NAMED_TRACES = 4
"""More traces are counted, not named."""


def points(difference: float) -> str:
    """A difference of ratios for people."""
    value = abs(difference) * 100
    if value < 0.05:
        return "less than 0.1 points"
    return "1.0 point" if f"{value:.1f}" == "1.0" else f"{value:.1f} points"


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 9.5 else f"{ratio:.1f} times"


def amplification(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _plural(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("y") else f"{count:,} {noun}s"


def ran(study: Study) -> list[str]:
    comparison = study.comparison()
    runs = sum(len(cells) for cells in study.runs.values())
    capacities = ", ".join(study.axis.label(point) for point in study.axis.points)
    said = [
        f"{_plural(runs, 'run')}: {_plural(len(study.traces), 'trace')}, "
        f"{_plural(len(study.chosen), 'policy')}"
        + (f" with {len(study.runs)} sets of parameters" if len(study.runs) > len(study.chosen) else "")
        + f", {_plural(len(study.axis.points), 'capacity')} ({capacities}). "
        f"Together the traces have {sum(facts.accesses for facts in study.traces):,} block accesses.",
        f"Means are over {_plural(len(comparison.cells), 'cell')} (trace x capacity) that "
        f"{_plural(len(comparison.complete), 'policy')} "
        f"{'has' if len(comparison.complete) == 1 else 'have'} in common.",
    ]
    if study.repeated:
        said.append(f"{_plural(study.repeated, 'run')} came more than once; the last one counts.")
    odd = [variant.label for variant in study.variants if variant.changed]
    if odd:
        said.append(f"Not run with default parameters: {listed(odd)}.")
    return said


def overall(study: Study) -> list[str]:
    rows = headline(study)
    real = [row for row in rows if row.variant.policy != ORACLE]
    if not real:
        return ["No policy has all cells, so no mean can be compared."]
    best, last = real[0], real[-1]
    near = [row for row in real if best.block_hit_ratio - row.block_hit_ratio <= TIE_POINTS / 100]
    names = [row.variant.label for row in near]
    said = []
    if len(near) > 1:
        spread = best.block_hit_ratio - near[-1].block_hit_ratio
        said.append(
            f"{listed(names)} lie within {points(spread)} of each other, at a mean block hit ratio of "
            f"{near[-1].block_hit_ratio:.3f} to {best.block_hit_ratio:.3f}."
        )
    else:
        said.append(f"{names[0]} has the highest mean block hit ratio, {best.block_hit_ratio:.3f}.")
        if len(real) > 1:
            behind = best.block_hit_ratio - real[1].block_hit_ratio
            said.append(f"{real[1].variant.label} follows {points(behind)} behind.")
    if best.gap_to_belady is not None:
        side = "above" if best.gap_to_belady >= 0 else "below"
        said.append(f"belady, which knows the future, is {points(best.gap_to_belady)} {side} {names[0]}.")
    if last not in near and len(real) > 2:
        said.append(
            f"The lowest is {last.variant.label} with {last.block_hit_ratio:.3f}, "
            f"{points(best.block_hit_ratio - last.block_hit_ratio)} below {names[0]}."
        )
    by_prefix = max(real, key=lambda row: row.usable_prefix_hit_ratio)
    said.append(
        f"Of what an engine can use, the leading run of hits, {by_prefix.variant.label} gives the most: "
        f"a mean usable-prefix hit ratio of {by_prefix.usable_prefix_hit_ratio:.3f}."
    )
    stranded = max(real, key=lambda row: row.block_hit_ratio - row.usable_prefix_hit_ratio)
    lost = stranded.block_hit_ratio - stranded.usable_prefix_hit_ratio
    if lost >= 0.0005:
        said.append(
            f"{stranded.variant.label} loses the most to hits behind a missing block: {points(lost)}."
        )
    return said


def across_capacities(study: Study) -> list[str]:
    complete = {row.variant for row in headline(study)}
    table = {
        variant: row
        for variant, row in by_capacity(study).items()
        if variant.policy != ORACLE and variant in complete
    }
    if not table:
        return []
    wins: dict[str, list[str]] = {}
    spans: list[tuple[float, int, Variant, Variant]] = []
    compared = [place for place in range(len(study.axis.points)) if _whole(table, place)]
    for place in compared:
        column = {variant: row[place] or 0.0 for variant, row in table.items()}
        top, bottom = max(column, key=column.__getitem__), min(column, key=column.__getitem__)
        wins.setdefault(top.label, []).append(study.axis.label(study.axis.points[place]))
        spans.append((column[top] - column[bottom], place, top, bottom))
    said = [
        f"{name} is the best at {listed(where) if len(where) < len(compared) else 'every capacity'}."
        for name, where in wins.items()
    ]
    if len(table) > 1 and len(spans) > 1:
        wide, narrow = max(spans), min(spans)
        said.append(
            f"The policies differ most at {study.axis.label(study.axis.points[wide[1]])}, where "
            f"{points(wide[0])} lie between {wide[2].label} and {wide[3].label}, and least at "
            f"{study.axis.label(study.axis.points[narrow[1]])}, with {points(narrow[0])}."
        )
    variant, row = next(iter(table.items()))
    last = row[compared[-1]] if compared else None
    if last is not None:
        enough = next(p for p in compared if last - (row[p] or 0.0) <= SATURATED_POINTS / 100)
        if enough < compared[-1]:
            said.append(
                f"From {study.axis.label(study.axis.points[enough])} on, {variant.label} is within "
                f"{points(SATURATED_POINTS / 100)} of what it reaches at "
                f"{study.axis.label(study.axis.points[compared[-1]])}."
            )
    return said


def _whole(table: dict[Variant, list[float | None]], place: int) -> bool:
    return all(row[place] is not None for row in table.values())


def two_regimes(study: Study) -> list[str]:
    rows = headline(study)
    front = pareto_front(rows)
    if not front:
        return []
    best, thrifty = front[0], front[-1]
    if len(front) == 1:
        said = [
            f"{best.variant.label} alone is the front: no other policy has a higher mean block hit ratio "
            f"({best.block_hit_ratio:.3f}) or a lower amplification ({amplification(best.amplification)})."
        ]
    else:
        said = [
            "The front, from the most hits to the least amplification: "
            + ", ".join(
                f"{row.variant.label} ({row.block_hit_ratio:.3f}, {amplification(row.amplification)})"
                for row in front
            )
            + "."
        ]
        if thrifty.amplification > 0:
            less = times(best.amplification / thrifty.amplification)
            said.append(
                f"{thrifty.variant.label} populates {less} less "
                f"per hit byte than {best.variant.label} and gives up "
                f"{points(best.block_hit_ratio - thrifty.block_hit_ratio)} of hit ratio for it."
            )
    hitless = [row for row in rows if row.runs_without_hit]
    if hitless:
        said.append(
            "Runs without any hit, whose amplification is infinite: "
            + ", ".join(f"{row.variant.label} {row.runs_without_hit} of {row.cells}" for row in hitless)
            + "."
        )
    return said


def wasted(study: Study) -> list[str]:
    rows = [
        (row.wasted_ratio, row)
        for row in headline(study)
        if row.wasted_ratio is not None and row.variant.policy != ORACLE
    ]
    if not rows:
        return []
    low, high = min(rows, key=lambda pair: pair[0]), max(rows, key=lambda pair: pair[0])
    said = [f"{low[1].variant.label} wastes the least: {low[0]:.3f} of what it admits is never used again."]
    if high[1] is not low[1]:
        said.append(f"{high[1].variant.label} wastes the most: {high[0]:.3f}.")
    return said


def tuning(study: Study) -> list[str]:
    real = [row for row in headline(study) if row.variant.policy != ORACLE]
    said = []
    for found in tunings(study):
        if not found.rows:
            said.append(f"{found.policy}: no variant has all cells, so none can be compared.")
            continue
        best, worst = found.rows[0], found.rows[-1]
        said.append(
            f"{found.policy}: {len(found.rows)} variants lie between {worst.block_hit_ratio:.3f} and "
            f"{best.block_hit_ratio:.3f}, a spread of {points(found.spread)}; the best is "
            f"{_knobs(best)}."
        )
        for effect in found.effects:
            much = effect.largest * 100
            moved = "changes nothing" if much < 0.005 else f"moves the mean by at most {much:.2f} points"
            if much >= 0.005 and much < NO_EFFECT_POINTS:
                moved += ", next to nothing"
            said.append(f"{found.policy}: {effect.knob} alone {moved}.")
        rivals = [row for row in real if row.variant.policy != found.policy]
        if rivals and found.comparison.cells == study.comparison().cells:
            gap = rivals[0].block_hit_ratio - best.block_hit_ratio
            if gap > 0:
                said.append(
                    f"{found.policy}: no variant reaches {rivals[0].variant.label}; "
                    f"{points(gap)} are missing."
                )
    return said


def _knobs(row: Scores) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in row.variant.params) or "the only one"


def per_trace(study: Study) -> list[str]:
    """The best real policy of every trace by its mean over the capacities that all of them have there."""
    best: dict[str, list[str]] = {}
    for facts in study.traces:
        table = {v: row for v, row in by_trace(study, facts.name).items() if v.policy != ORACLE}
        shared = [p for p in range(len(study.axis.points)) if table and _whole(table, p)]
        if not shared or len(table) < 2:
            continue
        means = {v: math.fsum(row[p] or 0.0 for p in shared) for v, row in table.items()}
        best.setdefault(max(means, key=means.__getitem__).label, []).append(facts.name)
    said = []
    for name, traces in sorted(best.items(), key=lambda item: -len(item[1])):
        many = len(traces) > NAMED_TRACES
        where = f"{len(traces)} of {len(study.traces)} traces" if many else listed(traces)
        said.append(f"{name} has the highest mean block hit ratio on {where}.")
    return said


def leaf_first(study: Study) -> list[str]:
    gains = leaf_first_gains(study)
    if not gains:
        return []
    best = max(gains, key=lambda gain: gain.gain)
    if abs(best.gain) < 0.0005:
        return ["Touching the leaves first changes the usable prefix of lru by less than 0.1 points."]
    said = [
        f"Touching a request's leaves first gives lru up to {points(best.gain)} more usable prefix than "
        f"touching its roots first, at {study.axis.label(best.point)}."
    ]
    least = min(gains, key=lambda gain: gain.gain)
    if least is not best:
        word = "gains" if least.gain >= 0 else "loses"
        said.append(f"At {study.axis.label(least.point)} it {word} {points(least.gain)}.")
    return said


def missing(study: Study, not_asked: Sequence[str]) -> list[str]:
    """What has no mean, what is in no mean, and policies of which there are no runs at all."""
    said = []
    comparison = study.comparison()
    for variant, cells in comparison.missing.items():
        said.append(
            f"{variant.label} has no mean: {_plural(len(cells), 'cell')} missing, {_few(study, cells)}."
        )
    for found in tunings(study):
        for variant, cells in found.comparison.missing.items():
            if variant not in comparison.missing:
                said.append(
                    f"{variant.label} is not in the tuning table: {_plural(len(cells), 'cell')} missing, "
                    f"{_few(study, cells)}."
                )
    if comparison.left_out:
        cells = tuple(comparison.left_out)
        said.append(
            f"In no mean, because less than half of the policies ran there: {_few(study, cells)} "
            f"({_plural(len(cells), 'cell')})."
        )
    if not_asked:
        said.append(f"No runs of {listed(list(not_asked))} are among these results.")
    return said


def _few(study: Study, cells: Sequence[Cell], most: int = 3) -> str:
    named = [f"{cell.trace} at {study.axis.label(cell.point)}" for cell in cells[:most]]
    return ", ".join(named) + (f" and {len(cells) - most} more" if len(cells) > most else "")
