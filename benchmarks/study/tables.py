"""The tables of the study that put our figures beside the seed's. Runs in, sheets out; writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import seed
from runs import Group, StudyRuns

from kvstrata.config import format_size
from kvstrata.errors import ConfigError
from kvstrata.sim.advise import BANDWIDTH, LATENCY, advise
from kvstrata.sim.grid import defaults_of, study_in_order
from kvstrata.sim.metrics import RunResult
from kvstrata.sim.report.findings import amplification, points
from kvstrata.sim.report.sheets import AMPLIFICATION, COUNT, RATIO, TEXT, Column, Sheet, Value
from kvstrata.sim.tables import ORACLE, Scores, headline
from kvstrata.sim.tune import STUDY_VARIANTS, TuneVariant

TIED = ("arc", "lru_forward", "twoq")
"""What the seed found tied; its LRU is the plain one."""
TUNED = ("tinylfu_slru", "lfu_aging")
TIE, NEAR, LEAP, NO_EFFECT = 0.01, 0.07, 0.05, 0.001
"""Bounds of the seed's statements, as shares."""
TENFOLD = 10.0
ROUND = 5e-4
"""A bound that is met when both are rounded to the digits of the tables is met."""


def scores_by_policy(group: Group) -> dict[str, Scores]:
    """Of every policy as it is, the highest mean block hit ratio first."""
    rows = headline(study_in_order([(cell, run) for cell, run in group.runs if not cell.params]))
    return {row.variant.policy: row for row in rows}


def scores_of(group: Group, variant: TuneVariant) -> Scores | None:
    """Of one set of parameters."""
    defaults = defaults_of(variant.policy)
    changed = {name: value for name, value in variant.params.items() if defaults[name] != value}
    wanted = variant.policy, tuple(sorted(changed.items()))
    runs = [(cell, run) for cell, run in group.runs if (cell.policy, cell.params) == wanted]
    return headline(study_in_order(runs))[0] if runs else None


def share_of_oracle(scores: dict[str, Scores], policy: str) -> float | None:
    """Mean block hit ratio over that of belady."""
    if ORACLE not in scores or policy not in scores or not scores[ORACLE].block_hit_ratio:
        return None
    return scores[policy].block_hit_ratio / scores[ORACLE].block_hit_ratio


def beside_seed_sheet(group: Group) -> Sheet:
    """Every policy, with the seed's figures of the one that it comes nearest to."""
    scores = scores_by_policy(group)
    rows: list[tuple[Value, ...]] = []
    for policy, row in scores.items():
        theirs = seed.POLICIES.get(policy)
        real = policy != ORACLE
        rows.append((
            policy,
            theirs.hit_ratio if theirs else None,
            row.block_hit_ratio,
            row.usable_prefix_hit_ratio,
            seed.ORACLE_HIT_RATIO - theirs.hit_ratio if theirs and real else None,
            row.gap_to_belady if real else None,
            theirs.hit_ratio / seed.ORACLE_HIT_RATIO if theirs and real else None,
            share_of_oracle(scores, policy) if real else None,
            theirs.amplification if theirs else None,
            row.amplification,
        ))  # fmt: skip
    columns = (
        Column("policy", TEXT),
        Column("seed: hits", RATIO),
        Column("here: hits", RATIO),
        Column("here: usable prefix", RATIO),
        Column("seed: gap", RATIO),
        Column("here: gap", RATIO),
        Column("seed: of belady", RATIO),
        Column("here: of belady", RATIO),
        Column("seed: amplif.", AMPLIFICATION),
        Column("here: amplif.", AMPLIFICATION),
    )
    return Sheet("beside-seed", "Policies, beside the seed's", columns, tuple(rows))


def scores_sheet(group: Group, key: str, title: str) -> Sheet:
    """The headline in the columns that a page has room for."""
    scores = scores_by_policy(group)
    columns = (
        Column("policy", TEXT),
        Column("hits", RATIO),
        Column("usable prefix", RATIO),
        Column("gap", RATIO),
        Column("of belady", RATIO),
        Column("amplif.", AMPLIFICATION),
        Column("wasted", RATIO),
        Column("runs without a hit", COUNT),
    )
    rows = tuple(
        (
            policy,
            row.block_hit_ratio,
            row.usable_prefix_hit_ratio,
            row.gap_to_belady if policy != ORACLE else None,
            share_of_oracle(scores, policy) if policy != ORACLE else None,
            row.amplification,
            row.wasted_ratio,
            row.runs_without_hit,
        )
        for policy, row in scores.items()
    )
    return Sheet(key, title, columns, rows)


# What was run


def setup_sheet(runs: StudyRuns) -> Sheet:
    groups = (runs.shared, runs.alone)

    def described(group: Group) -> dict[str, str]:
        if not group.runs:
            return {}
        study = group.study()
        tuned = [v for v in STUDY_VARIANTS if scores_of(group, v) is not None]
        cells = len({(cell.trace, cell.capacity) for cell, _ in group.runs})
        return {
            "traces": str(len(study.traces)),
            "accesses": f"{sum(facts.accesses for facts in study.traces) / 1e6:.1f} M",
            "working set": format_size(sum(_working_sets(group).values())),
            "policies": str(len(study.chosen)),
            "capacities": f"{len(study.axis.points)} fractions",
            "runs": f"{sum(not cell.params for cell, _ in group.runs):,}",
            "runs of 13 variants": f"{len(tuned) * cells:,}" if len(tuned) == len(STUDY_VARIANTS) else "-",
        }

    found = [described(group) for group in groups]
    kinds = ("requests of users to one cache", "one conversation with a cache of its own")
    for column, kind in zip(found, kinds, strict=True):
        column["what a trace is"] = kind if column else "-"
    columns = (
        Column("", TEXT),
        Column("seed", TEXT),
        Column("here: shared caches", TEXT),
        Column("here: alone", TEXT),
    )
    rows = tuple((what, said, *(of.get(what, "-") for of in found)) for what, said in seed.SETUP.items())
    return Sheet("setup", "What was run", columns, rows)


def _working_sets(group: Group) -> dict[str, int]:
    """Bytes of the unique blocks per trace."""
    return {
        run.trace: run.unique_blocks * run.capacity_bytes // max(1, run.capacity_blocks)
        for run in group.results
    }


def length_sheet(runs: StudyRuns) -> Sheet:
    """The shared traces: how much comes back, and how long requests are beside the smallest caches."""
    study = runs.shared.study()
    smallest = study.axis.points[: min(2, len(study.axis.points))]
    columns = (
        Column("trace", TEXT),
        Column("requests", COUNT),
        Column("accesses", COUNT),
        Column("unique blocks", COUNT),
        Column("reuse", RATIO),
        Column("median request, blocks", COUNT),
        Column("longest request, blocks", COUNT),
        *(Column(f"cache at {study.axis.label(point)}, blocks", COUNT) for point in smallest),
    )
    rows: tuple[tuple[Value, ...], ...] = tuple(
        (
            facts.name,
            facts.requests,
            facts.accesses,
            facts.unique_blocks,
            facts.reuse,
            runs.lengths[facts.name].median,
            runs.lengths[facts.name].longest,
            *(max(1, int(point * facts.unique_blocks)) for point in smallest),
        )
        for facts in study.traces
    )
    return Sheet("traces", "Shared traces", columns, rows)


# What the seed says


@dataclass(frozen=True, slots=True)
class Claim:
    """One statement of the seed: its own figure, ours per group, and whether ours bear it out."""

    said: str
    seed: str
    here: tuple[str, ...]
    holds: tuple[str, ...]


def claims(groups: Sequence[Group]) -> list[Claim]:
    """The seed's statements whose policies were run, tested on every group."""
    found: list[list[tuple[str, str, str, str]]] = []
    for group in groups:
        scores = scores_by_policy(group)
        tuned = {v.name: row for v in STUDY_VARIANTS if (row := scores_of(group, v)) is not None}
        found.append([*_comparisons(scores), *_tunings(tuned, scores)])
    merged = []
    for said in dict.fromkeys(one[0] for of_group in found for one in of_group):
        of = [next((one for one in of_group if one[0] == said), None) for of_group in found]
        merged.append(
            Claim(
                said,
                next(one[1] for one in of if one),
                tuple(one[2] if one else "-" for one in of),
                tuple(one[3] if one else "-" for one in of),
            )
        )
    return merged


def _verdict(holds: bool) -> str:
    return "yes" if holds else "no"


def _side(difference: float) -> str:
    """Of a policy to what it is compared with."""
    return f"{points(difference)} {'behind' if difference >= 0 else 'ahead'}"


def _comparisons(scores: dict[str, Scores]) -> list[tuple[str, str, str, str]]:
    """(what the seed says, its figure, ours, does it hold)"""
    hits = {policy: row.block_hit_ratio for policy, row in scores.items()}
    theirs = {policy: score.hit_ratio for policy, score in seed.POLICIES.items()}
    if not {*TIED, ORACLE} <= hits.keys():
        return []

    def best(of: dict[str, float]) -> float:
        return max(of[policy] for policy in TIED)

    def spread(of: dict[str, float]) -> float:
        return best(of) - min(of[policy] for policy in TIED)

    found = [
        (
            "ARC, LRU and 2Q tie within 1 point",
            points(spread(theirs)),
            points(spread(hits)),
            _verdict(spread(hits) <= TIE + ROUND),
        ),
        (
            "the best of them is within 7 points of Belady",
            points(theirs[ORACLE] - best(theirs)),
            points(hits[ORACLE] - best(hits)),
            _verdict(hits[ORACLE] - best(hits) <= NEAR + ROUND),
        ),
    ]
    if "clock_pro" in hits:
        behind = best(hits) - hits["clock_pro"]
        found.append((
            "CLOCK-Pro is second: behind, by less than 5 points",
            _side(best(theirs) - theirs["clock_pro"]),
            _side(behind),
            _verdict(0 <= behind <= LEAP + ROUND),
        ))  # fmt: skip
    if "lfu_aging" in hits:
        behind = best(hits) - hits["lfu_aging"]
        found.append((
            "LFU with aging is an outlier: further behind than that",
            _side(best(theirs) - theirs["lfu_aging"]),
            _side(behind),
            _verdict(behind > LEAP),
        ))  # fmt: skip
    if "tinylfu_slru" in hits:
        behind = best(hits) - hits["tinylfu_slru"]
        found.append((
            "TinyLFU + SLRU is an outlier too",
            _side(best(theirs) - theirs["tinylfu_slru"]),
            _side(behind),
            _verdict(behind > LEAP),
        ))  # fmt: skip
        ours = _over(scores["lru_forward"].amplification, scores["tinylfu_slru"].amplification)
        saved = seed.POLICIES["lru"].amplification / seed.POLICIES["tinylfu_slru"].amplification
        found.append((
            "TinyLFU + SLRU has a tenth of LRU's amplification",
            f"{saved:.1f} times less",
            f"{ours:.1f} times less",
            _verdict(ours >= TENFOLD - ROUND),
        ))  # fmt: skip
    return found


def _over(over: float, under: float) -> float:
    return over / under if under else float("inf")


def _tunings(tuned: dict[str, Scores], scores: dict[str, Scores]) -> list[tuple[str, str, str, str]]:
    if any(name not in tuned for name in seed.VARIANTS) or "lru_forward" not in scores:
        return []
    hits = {name: row.block_hit_ratio for name, row in tuned.items()}
    theirs = seed.VARIANTS

    def spread(of: dict[str, float], start: str, without: str = "-") -> float:
        chosen = [value for name, value in of.items() if name.startswith(start) and without not in name]
        return max(chosen) - min(chosen)

    def wider(of: dict[str, float]) -> float:
        return of["tinylfu_p20_w65k"] - of["tinylfu_p20"]

    def shifts(of: dict[str, float]) -> float:
        chosen = [of[f"lfu_e10k_s{shift}"] for shift in (1, 2, 3)]
        return max(chosen) - min(chosen)

    def missing(of: dict[str, float], start: str, lru: float) -> float:
        return lru - max(value for name, value in of.items() if name.startswith(start))

    lru, their_lru = scores["lru_forward"].block_hit_ratio, seed.POLICIES["lru"].hit_ratio
    return [
        (
            "tuning moves TinyLFU + SLRU by no more than 1.5 points",
            points(spread(theirs, "tinylfu")),
            points(spread(hits, "tinylfu")),
            _verdict(spread(hits, "tinylfu") <= 0.015 + ROUND),
        ),
        (
            "a wider sketch helps it",
            f"{wider(theirs) * 100:+.1f} points",
            f"{wider(hits) * 100:+.1f} points",
            _verdict(wider(hits) > ROUND),
        ),
        (
            "prob_frac does less than the sketch",
            points(spread(theirs, "tinylfu", "w65k")),
            points(spread(hits, "tinylfu", "w65k")),
            _verdict(spread(hits, "tinylfu", "w65k") < wider(hits)),
        ),
        (
            "age_shift has no effect",
            points(shifts(theirs)),
            points(shifts(hits)),
            _verdict(shifts(hits) <= NO_EFFECT + ROUND),
        ),
        *(
            (
                f"no setting closes the gap of {name} to LRU",
                _side(missing(theirs, start, their_lru)),
                _side(missing(hits, start, lru)),
                _verdict(missing(hits, start, lru) > ROUND),
            )
            for start, name in (("tinylfu", "TinyLFU + SLRU"), ("lfu", "LFU with aging"))
        ),
    ]


def claim_sheet(groups: Sequence[Group]) -> Sheet:
    columns = (
        Column("the seed says", TEXT),
        Column("its figure", TEXT),
        Column("here: shared caches", TEXT),
        Column("holds", TEXT),
        Column("here: alone", TEXT),
        Column("holds, alone", TEXT),
    )
    dash = ("-", "-")
    rows = tuple(
        (one.said, one.seed, *(cell for pair in zip(
            (*one.here, *dash)[:2], (*one.holds, *dash)[:2], strict=True
        ) for cell in pair))
        for one in claims([group for group in groups if group.runs])
    )  # fmt: skip
    return Sheet("claims", "What the seed says", columns, rows)


def variant_sheets(runs: StudyRuns) -> list[Sheet]:
    """The seed's tuning tables with our figures beside."""
    sheets = []
    for policy in TUNED:
        knobs = ("prob_frac", "cms_width") if policy == "tinylfu_slru" else ("age_every", "age_shift")
        columns = (
            Column("variant", TEXT),
            *(Column(knob, TEXT) for knob in knobs),
            Column("seed: hits", RATIO),
            Column("here: hits", RATIO),
            Column("here: usable prefix", RATIO),
            Column("here: amplif.", AMPLIFICATION),
            Column("alone: hits", RATIO),
            Column("alone: amplif.", AMPLIFICATION),
        )
        rows: list[tuple[Value, ...]] = []
        for variant in STUDY_VARIANTS:
            shared, alone = scores_of(runs.shared, variant), scores_of(runs.alone, variant)
            if variant.policy != policy or shared is None:
                continue
            values = [f"{variant.params[knob]:,g}" for knob in knobs]
            ours = (shared.block_hit_ratio, shared.usable_prefix_hit_ratio, shared.amplification)
            theirs = (alone.block_hit_ratio, alone.amplification) if alone else (None, None)
            rows.append((variant.name, *values, seed.VARIANTS[variant.name], *ours, *theirs))
        if rows:
            sheets.append(Sheet(f"beside-seed-{policy}", f"Variants of {policy}", columns, tuple(rows)))
    return sheets


# Which policy when


@dataclass(frozen=True, slots=True)
class Choice:
    """What `kvstrata sim advise` takes of the runs of one trace at one capacity."""

    trace: str
    capacity: str
    bottleneck: str
    chosen: RunResult


def choices(group: Group) -> list[Choice]:
    found = []
    default = [(cell, run) for cell, run in group.runs if not cell.params]
    for trace in dict.fromkeys(cell.trace.name for cell, _ in default):
        of_trace = [(cell, run) for cell, run in default if cell.trace.name == trace]
        runs = [run for _, run in of_trace]
        for capacity in dict.fromkeys(cell.capacity for cell, _ in of_trace):
            for bottleneck in (LATENCY, BANDWIDTH):
                try:
                    chosen = advise(runs, bottleneck, capacity).chosen
                except ConfigError:  # the oracle alone was run
                    continue
                found.append(Choice(trace, capacity, bottleneck, chosen))
    return found


def choice_sheet(found: Sequence[Choice]) -> Sheet:
    """Policy, usable prefix hit ratio and amplification per trace and bottleneck, by capacity."""
    capacities = list(dict.fromkeys(choice.capacity for choice in found))
    columns = (
        Column("trace", TEXT),
        Column("what is short", TEXT),
        *(Column(capacity, TEXT) for capacity in capacities),
    )
    rows: list[tuple[Value, ...]] = []
    for trace in dict.fromkeys(choice.trace for choice in found):
        for bottleneck in (LATENCY, BANDWIDTH):
            of = {
                choice.capacity: choice.chosen
                for choice in found
                if (choice.trace, choice.bottleneck) == (trace, bottleneck)
            }
            rows.append((trace, bottleneck, *(_choice(of.get(capacity)) for capacity in capacities)))
    return Sheet("advice", "Which policy when", columns, tuple(rows))


def _choice(run: RunResult | None) -> str:
    if run is None:
        return "-"
    writes = "no hits" if run.amplification is None else amplification(run.amplification)
    return f"{run.policy} {run.usable_prefix_hit_ratio:.3f}, {writes}"


def choice_counts(found: Sequence[Choice], bottleneck: str) -> tuple[list[tuple[str, int]], int]:
    """How often each policy is chosen, the most frequent first, and how often one was to be chosen."""
    counts = Counter(choice.chosen.policy for choice in found if choice.bottleneck == bottleneck)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0])), counts.total()


# How far chance goes


def seed_sheet(group: Group) -> Sheet:
    """Mean block hit ratio of every policy on the stream in each random order."""
    if not group.runs:
        return Sheet("orders", "Random orders", (), ())
    per_trace: dict[str, dict[str, Scores]] = {}
    for trace in dict.fromkeys(cell.trace.name for cell, _ in group.runs):
        of_trace = tuple((cell, run) for cell, run in group.runs if cell.trace.name == trace)
        per_trace[trace] = scores_by_policy(Group(of_trace))
    names = list(per_trace)
    first = per_trace[names[0]]
    columns = (
        Column("policy", TEXT),
        *(Column(f"order {place}", RATIO) for place in range(1, len(names) + 1)),
        Column("largest difference, points", TEXT),
    )
    rows: list[tuple[Value, ...]] = []
    for policy in first:
        ratios = [per_trace[name][policy].block_hit_ratio for name in names]
        rows.append((policy, *ratios, f"{(max(ratios) - min(ratios)) * 100:.1f}"))
    return Sheet("orders", "Random orders", columns, tuple(rows))


@dataclass(frozen=True, slots=True)
class Chance:
    """What the random orders change. shift: how far the mean of all real policies moves. orders: how many
    there are. best: the policy that leads in the first; led: in how many of them; leads: its lead over the
    second, least and largest. swapped: neighbours in the first ranking that some order swaps."""

    shift: float
    orders: int
    best: str
    led: int
    leads: tuple[float, float]
    swapped: tuple[tuple[str, str], ...]


def chance(sheet: Sheet) -> Chance:
    """Of the sheet that `seed_sheet` makes, with two real policies at least."""
    table: dict[str, list[float]] = {}
    for row in sheet.rows:
        if row[0] != ORACLE:
            table[str(row[0])] = [value for value in row[1:-1] if isinstance(value, float)]
    names = list(table)
    best, orders = names[0], len(table[names[0]])
    means = [sum(ratios[order] for ratios in table.values()) / len(table) for order in range(orders)]
    others = [max(table[name][order] for name in names[1:]) for order in range(orders)]
    leads = [table[best][order] - others[order] for order in range(orders)]
    swapped = tuple(
        (one, other)
        for one, other in pairwise(names)
        if any(a < b for a, b in zip(table[one], table[other], strict=True))
    )
    led = sum(lead > 0 for lead in leads)
    return Chance(max(means) - min(means), orders, best, led, (min(leads), max(leads)), swapped)


def without(sheet: Sheet, name: str) -> Sheet:
    """The sheet without one of its columns."""
    keep = [place for place, column in enumerate(sheet.columns) if column.name != name]
    return Sheet(
        sheet.key,
        sheet.title,
        tuple(sheet.columns[place] for place in keep),
        tuple(tuple(row[place] for place in keep) for row in sheet.rows),
    )
