"""Tables of a study: runs in, figures out. Pure functions; draws nothing, reads and writes no file.

A mean is taken over the same cells (trace x capacity) for every policy that it is compared with: a policy
that lacks one of them has no mean, and the cells it lacks are named. Amplification comes twice: the total
(all populated bytes / all hit bytes) and the mean of the ratios of the runs, which is infinite as soon as
one run had no hit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Generic, NamedTuple, TypeVar

from kvstrata.config import format_size
from kvstrata.policies import POLICIES
from kvstrata.policies.belady import Belady
from kvstrata.sim.metrics import RunResult

ORACLE = Belady.name
FRACTION, BLOCKS, BYTES = "fraction", "blocks", "bytes"
MAX_DIGITS = 6

Key = TypeVar("Key", bound=Hashable)
Measure = Callable[[RunResult], float]


class Cell(NamedTuple):
    """One trace at one capacity (a point of `Axis`)."""

    trace: str
    point: float


class Variant(NamedTuple):
    """A policy and its parameters. changed: those that are not its defaults."""

    policy: str
    params: tuple[tuple[str, float], ...]
    changed: tuple[tuple[str, float], ...]

    @property
    def label(self) -> str:
        return " ".join([self.policy, *(f"{name}={value:g}" for name, value in self.changed)])


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """What the runs tell of a trace. reuse: share of accesses to blocks that were seen before, which no
    policy can exceed in block hit ratio. runs: how many there are of it."""

    name: str
    requests: int
    accesses: int
    unique_blocks: int
    reuse: float
    runs: int


@dataclass(frozen=True, slots=True)
class Axis:
    """The capacities of a study. kind: their unit, FRACTION, BLOCKS or BYTES. points: ascending."""

    kind: str
    points: tuple[float, ...]

    def label(self, point: float) -> str:
        if self.kind == FRACTION:
            return f"{point * 100:.6g}%"
        if self.kind == BLOCKS:
            return f"{point:,.0f} blocks"
        return format_size(point)

    @property
    def title(self) -> str:
        return {
            FRACTION: "capacity, share of the unique blocks",
            BLOCKS: "capacity in blocks",
            BYTES: "capacity in bytes",
        }[self.kind]


@dataclass(frozen=True, slots=True)
class Comparison(Generic[Key]):
    """Which means may be compared.

    cells: what the means are over. complete: has all of them. missing: lacks these. left_out: cells that
    only a minority has, with those that have them; they are in no mean.
    """

    cells: tuple[Cell, ...]
    complete: tuple[Key, ...]
    missing: Mapping[Key, tuple[Cell, ...]]
    left_out: Mapping[Cell, tuple[Key, ...]]


@dataclass(frozen=True, slots=True)
class Scores:
    """Means of one variant over the cells of a comparison.

    amplification: total populated bytes / total hit bytes. mean_amplification: mean of the runs' ratios.
    Both are infinite where they divide by nothing; runs_without_hit says in how many runs. wasted_ratio:
    mean, None where a run admitted nothing. gap_to_belady: belady's block hit ratio minus this one's, None
    where belady lacks a cell.
    """

    variant: Variant
    cells: int
    block_hit_ratio: float
    usable_prefix_hit_ratio: float
    request_hit_ratio: float
    byte_hit_ratio: float
    amplification: float
    mean_amplification: float
    runs_without_hit: int
    wasted_ratio: float | None
    gap_to_belady: float | None


@dataclass(frozen=True, slots=True)
class KnobEffect:
    """largest: how far the mean block hit ratio moves at most where only this knob differs."""

    knob: str
    largest: float
    pairs: int


@dataclass(frozen=True, slots=True)
class Tuning:
    """The variants of one policy, best first. spread: best minus worst mean block hit ratio."""

    policy: str
    comparison: Comparison[Variant]
    rows: tuple[Scores, ...]
    spread: float
    effects: tuple[KnobEffect, ...]


@dataclass(frozen=True, slots=True)
class LeafFirstGain:
    """Mean usable prefix hit ratio of lru and of lru_forward at one capacity, over the same traces."""

    point: float
    traces: int
    lru: float
    lru_forward: float

    @property
    def gain(self) -> float:
        return self.lru - self.lru_forward


@dataclass(frozen=True, slots=True)
class Study:
    """Runs in order. runs: per variant and cell. chosen: the variant that stands for a policy outside of
    the tuning tables: its defaults, or what comes nearest. repeated: runs that were there more than once;
    the last one counts."""

    traces: tuple[TraceFacts, ...]
    axis: Axis
    runs: Mapping[Variant, Mapping[Cell, RunResult]]
    chosen: Mapping[str, Variant]
    repeated: int

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Those that stand for their policies."""
        return tuple(self.chosen.values())

    def comparison(self) -> Comparison[Variant]:
        return compare({variant: self.runs[variant] for variant in self.variants})


# Reading the runs


def study_of(
    results: Sequence[RunResult],
    asked: Sequence[str] = (),
    defaults: Mapping[str, Mapping[str, float]] | None = None,
) -> Study:
    """Put runs in order. asked: per run the capacity as it was written ("1%"), "" where that is not known.
    defaults: parameters of policies, by default those of POLICIES and the oracle."""
    known = _defaults() if defaults is None else defaults
    names = _trace_names(results)
    axis, points = _axis(results, asked)
    runs: dict[Variant, dict[Cell, RunResult]] = {}
    repeated = 0
    for result, point in zip(results, points, strict=True):
        variant = _variant(result, known.get(result.policy, {}))
        cell = Cell(names[_identity(result)], point)
        of_variant = runs.setdefault(variant, {})
        repeated += cell in of_variant
        of_variant[cell] = result
    facts = tuple(
        TraceFacts(
            name=name,
            requests=requests,
            accesses=accesses,
            unique_blocks=unique,
            reuse=(accesses - unique) / accesses if accesses else 0.0,
            runs=sum(cell.trace == name for cells in runs.values() for cell in cells),
        )
        for (_, requests, accesses, unique), name in names.items()
    )
    return Study(facts, axis, runs, _chosen(runs), repeated)


def _defaults() -> dict[str, Mapping[str, float]]:
    return {name: policy.KNOBS for name, policy in POLICIES.items()} | {ORACLE: Belady.KNOBS}


def _identity(result: RunResult) -> tuple[str, int, int, int]:
    return result.trace, result.requests, result.accesses, result.unique_blocks


def _trace_names(results: Iterable[RunResult]) -> dict[tuple[str, int, int, int], str]:
    """Two traces may have one name: the later ones get a number."""
    names: dict[tuple[str, int, int, int], str] = {}
    used: set[str] = set()
    for identity in dict.fromkeys(_identity(result) for result in results):
        name, number = identity[0], 1
        while name in used:
            number += 1
            name = f"{identity[0]} ({number})"
        used.add(name)
        names[identity] = name
    return names


def _variant(result: RunResult, defaults: Mapping[str, float]) -> Variant:
    params = tuple(sorted(result.params.items()))
    return Variant(result.policy, params, tuple((k, v) for k, v in params if defaults.get(k) != v))


def _chosen(runs: Mapping[Variant, Mapping[Cell, RunResult]]) -> dict[str, Variant]:
    """Per policy the defaults, else the variant with most runs and then the highest hit ratio."""

    def rank(variant: Variant) -> tuple[bool, int, float]:
        cells = runs[variant]
        return not variant.changed, len(cells), _mean([run.block_hit_ratio for run in cells.values()])

    chosen: dict[str, Variant] = {}
    for variant in runs:
        rival = chosen.get(variant.policy)
        if rival is None or rank(variant) > rank(rival):
            chosen[variant.policy] = variant
    return chosen


def _axis(results: Sequence[RunResult], asked: Sequence[str]) -> tuple[Axis, list[float]]:
    """The unit in which the runs have the fewest different capacities, and every run's point in it."""
    candidates = {
        FRACTION: asked_fractions(results, asked),
        BLOCKS: [float(result.capacity_blocks) for result in results],
        BYTES: [float(result.capacity_bytes) for result in results],
    }
    kind = min(candidates, key=lambda kind: len(set(candidates[kind])))
    return Axis(kind, tuple(sorted(set(candidates[kind])))), candidates[kind]


def asked_fractions(results: Sequence[RunResult], asked: Sequence[str] = ()) -> list[float]:
    """Per run the share of the unique blocks that was asked for, before it was cut to whole blocks.

    Where the words are not known: a run of b blocks of u was asked for with something in [b/u, (b+1)/u):
    of that, what another trace was asked for, else the number with the fewest digits. Narrow ranges, of
    large traces, decide first.
    """
    spans = [
        (
            run.capacity_fraction,
            max((run.capacity_blocks + 1) / max(1, run.unique_blocks), run.capacity_fraction),
        )
        for run in results
    ]
    decided: dict[tuple[float, float], float] = {}
    for low, high in sorted(set(spans), key=lambda span: (span[1] - span[0], span)):
        shared = [value for value in decided.values() if low - 1e-12 <= value < high - 1e-12]
        decided[low, high] = min(shared, default=shortest_in(low, high))
    words = asked or [""] * len(spans)
    return [
        float(word.strip().removesuffix("%")) / 100 if word.strip().endswith("%") else decided[span]
        for word, span in zip(words, spans, strict=True)
    ]


def shortest_in(low: float, high: float) -> float:
    """The number with the fewest significant digits in [low, high), the smallest of them; else low."""
    if low <= 0:
        return low
    for digits in range(1, MAX_DIGITS + 1):
        exponent = math.floor(math.log10(low)) - digits + 1
        steps = math.ceil(low / 10.0**exponent - 1e-9)
        value = float(f"{steps}e{exponent}")
        if value < high:
            return value
    return low


# Comparing


def compare(groups: Mapping[Key, Mapping[Cell, RunResult]]) -> Comparison[Key]:
    """Means are over the cells that at least half of the groups have."""
    seen = Counter(cell for cells in groups.values() for cell in cells)
    shared = tuple(sorted(cell for cell, count in seen.items() if 2 * count >= len(groups)))
    lacking = {key: tuple(cell for cell in shared if cell not in cells) for key, cells in groups.items()}
    return Comparison(
        cells=shared,
        complete=tuple(key for key, cells in lacking.items() if not cells),
        missing={key: cells for key, cells in lacking.items() if cells},
        left_out={
            cell: tuple(key for key, cells in groups.items() if cell in cells)
            for cell in sorted(set(seen) - set(shared))
        },
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _over(over: float, under: float) -> float:
    return over / under if under else math.inf


def _scores(study: Study, variant: Variant, cells: Sequence[Cell]) -> Scores:
    runs = [study.runs[variant][cell] for cell in cells]
    ratios = [math.inf if run.amplification is None else run.amplification for run in runs]
    wasted = [run.wasted_ratio for run in runs if run.wasted_ratio is not None]
    hit_ratio = _mean([run.block_hit_ratio for run in runs])
    oracle = study.runs[study.chosen[ORACLE]] if ORACLE in study.chosen else {}
    gap = None
    if all(cell in oracle for cell in cells):
        gap = _mean([oracle[cell].block_hit_ratio for cell in cells]) - hit_ratio
    return Scores(
        variant=variant,
        cells=len(cells),
        block_hit_ratio=hit_ratio,
        usable_prefix_hit_ratio=_mean([run.usable_prefix_hit_ratio for run in runs]),
        request_hit_ratio=_mean([run.request_hit_ratio for run in runs]),
        byte_hit_ratio=_mean([run.byte_hit_ratio for run in runs]),
        amplification=_over(sum(run.populated_bytes for run in runs), sum(run.hit_bytes for run in runs)),
        mean_amplification=_mean(ratios),
        runs_without_hit=ratios.count(math.inf),
        wasted_ratio=_mean(wasted) if len(wasted) == len(runs) else None,
        gap_to_belady=gap,
    )


# The tables


def headline(study: Study) -> list[Scores]:
    """One row per policy that has all cells, the highest mean block hit ratio first."""
    comparison = study.comparison()
    rows = [_scores(study, variant, comparison.cells) for variant in comparison.complete]
    return sorted(rows, key=lambda row: (-row.block_hit_ratio, row.variant))


def block_hits(run: RunResult) -> float:
    return run.block_hit_ratio


def usable_prefix_hits(run: RunResult) -> float:
    return run.usable_prefix_hit_ratio


def by_capacity(study: Study, measure: Measure = block_hits) -> dict[Variant, list[float | None]]:
    """Per policy the mean over traces at every point of the axis, over the same traces for all.

    None where the policy lacks one of them, or nobody was compared there. Policies in order of `headline`,
    then those with missing cells.
    """
    comparison = study.comparison()
    order = [row.variant for row in headline(study)]
    order += [variant for variant in study.variants if variant not in order]
    table: dict[Variant, list[float | None]] = {}
    for variant in order:
        runs, row = study.runs[variant], list[float | None]()
        for point in study.axis.points:
            cells = [cell for cell in comparison.cells if cell.point == point]
            whole = bool(cells) and all(cell in runs for cell in cells)
            row.append(_mean([measure(runs[cell]) for cell in cells]) if whole else None)
        table[variant] = row
    return table


def by_trace(study: Study, trace: str, measure: Measure = block_hits) -> dict[Variant, list[float | None]]:
    """Per policy its figure on one trace at every point of the axis, None where it was not run."""
    table: dict[Variant, list[float | None]] = {}
    for variant in by_capacity(study):
        found = [study.runs[variant].get(Cell(trace, point)) for point in study.axis.points]
        if any(run is not None for run in found):
            table[variant] = [None if run is None else measure(run) for run in found]
    return table


def pareto_front(rows: Iterable[Scores]) -> list[Scores]:
    """Rows than which no other hits at least as much with at most the amplification; never the oracle.

    The highest hit ratio first. Rows without any hit are on no front.
    """
    real = [row for row in rows if row.variant.policy != ORACLE and math.isfinite(row.amplification)]

    def beaten(row: Scores) -> bool:
        mine = (-row.block_hit_ratio, row.amplification)
        for other in real:
            theirs = (-other.block_hit_ratio, other.amplification)
            if theirs != mine and theirs[0] <= mine[0] and theirs[1] <= mine[1]:
                return True
        return False

    return sorted((row for row in real if not beaten(row)), key=lambda row: -row.block_hit_ratio)


def tunings(study: Study) -> list[Tuning]:
    """One per policy that was run with more than one set of parameters."""
    found = []
    for policy in sorted({variant.policy for variant in study.runs}):
        groups = {variant: cells for variant, cells in study.runs.items() if variant.policy == policy}
        if len(groups) < 2:
            continue
        comparison = compare(groups)
        rows = [_scores(study, variant, comparison.cells) for variant in comparison.complete]
        rows.sort(key=lambda row: (-row.block_hit_ratio, row.variant))
        spread = rows[0].block_hit_ratio - rows[-1].block_hit_ratio if rows else 0.0
        found.append(Tuning(policy, comparison, tuple(rows), spread, _knob_effects(rows)))
    return found


def _knob_effects(rows: Sequence[Scores]) -> tuple[KnobEffect, ...]:
    moves: dict[str, list[float]] = {}
    for one, other in combinations(rows, 2):
        mine, theirs = dict(one.variant.params), dict(other.variant.params)
        differing = [knob for knob in mine.keys() | theirs.keys() if mine.get(knob) != theirs.get(knob)]
        if len(differing) == 1:
            moves.setdefault(differing[0], []).append(abs(one.block_hit_ratio - other.block_hit_ratio))
    return tuple(KnobEffect(knob, max(of), len(of)) for knob, of in sorted(moves.items()))


def leaf_first_gains(study: Study) -> list[LeafFirstGain]:
    """What touching a request's tail first gains lru, where both orders were run; by capacity."""
    if "lru" not in study.chosen or "lru_forward" not in study.chosen:
        return []
    leaf, forward = study.runs[study.chosen["lru"]], study.runs[study.chosen["lru_forward"]]
    gains = []
    for point in study.axis.points:
        cells = [cell for cell in leaf if cell.point == point and cell in forward]
        if cells:
            of = [_mean([usable_prefix_hits(runs[cell]) for cell in cells]) for runs in (leaf, forward)]
            gains.append(LeafFirstGain(point, len(cells), of[0], of[1]))
    return gains
